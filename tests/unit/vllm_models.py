"""Tiny models of many families, loaded by vLLM's own loader in this process: what a worker holds, without an engine."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lazily import imported
from safetensors.torch import load_file, save_file

from harness.peft_models import with_adapter

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
# By name: the class of transformers, and its configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("Qwen3", {"head_dim": 32}),
    "tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "biases": ("Qwen2", {}),
    "moe": ("Qwen3Moe", {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "mla": ("DeepseekV2", _MLA),
}


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp())


def checkpoint(family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random model of ``family``, and return its folder."""
    import transformers

    folder = _folder() / f"{family}-{dtype}"
    if not folder.exists():
        kind, special = FAMILIES[family]
        config = getattr(transformers, f"{kind}Config")(**(_COMMON | special | {"dtype": dtype}))
        torch.manual_seed(0)
        getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def trained(weights: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return other weights of the same names, dtypes and shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.05
        if tensor.is_floating_point()
        else tensor
        for name, tensor in weights.items()
    }


@functools.cache
def _initialise() -> None:
    """Import vLLM and set up its groups of one rank, once in a process."""
    for name in ("engine.arg_utils", "model_executor.model_loader", "model_executor.models.registry"):
        imported(f"vllm.{name}")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    torch.accelerator.empty_cache = lambda: None  # as vLLM's worker for CPUs does
    with set_current_vllm_config(VllmConfig()):
        rendezvous = (_folder() / "rendezvous").as_uri()
        init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        initialize_model_parallel(1, 1)
    gc.freeze()  # vLLM collects garbage with each load, and would look through all of its own modules


@contextlib.contextmanager
def skipped_without_mla() -> Iterator[None]:
    """Skip the test if this vLLM has no MLA on a CPU: 0.19 has none."""
    try:
        yield
    except NotImplementedError as error:
        if "MLA is not supported on CPU" not in str(error):
            raise
        torch.set_default_dtype(torch.float32)  # what 0.19 has set for the load stays after an error
        pytest.skip("its CPU build has no MLA")


class LoadedWorker:
    """What is asked of vLLM's worker, with a real model."""

    def __init__(self, folder: Path, **options: Any) -> None:
        _initialise()
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model

        arguments = {"enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True, "dtype": "float32"}
        self.vllm_config = EngineArgs(os.fspath(folder), **(arguments | options)).create_engine_config()
        self.rank, self.device = 0, torch.device("cpu")
        with set_current_vllm_config(self.vllm_config), skipped_without_mla():
            self._model = get_model(vllm_config=self.vllm_config)
        self.model_runner = SimpleNamespace()
        self.reloads = 0

    def get_model(self) -> torch.nn.Module:
        return self._model

    def reload_weights(self, weights_iterator: Any) -> None:
        self.reloads += 1
        reload_weights(self.vllm_config, self._model, weights_iterator)


def reload_weights(config: Any, model: Any, weights: Any) -> None:
    """Do what ``reload_weights`` of vLLM's worker does."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import reload

    with set_current_vllm_config(config):
        if find_spec("vllm.model_executor.model_loader.reload.inplace"):
            from vllm.model_executor.model_loader.reload import inplace

            inplace.reload_weights(config, model, weights, None, True)
        else:  # 0.19 has it in its runner, as these three calls
            reload.initialize_layerwise_reload(model)
            model.load_weights(weights)
            reload.finalize_layerwise_reload(model, config.model_config)


def lora_worker(family: str = "dense", folder: Path | None = None, **options: Any) -> LoadedWorker:
    """Return a worker whose model serves adapters, as vLLM's own model runner has it."""
    _initialise()
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1, "max_cpu_loras": 2} | options
    worker: Any = LoadedWorker(folder or checkpoint(family), **settings)
    runner: Any = LoRAModelRunnerMixin()
    runner.lora_config, runner.get_model = worker.vllm_config.lora_config, worker.get_model
    worker.model_runner = runner
    with set_current_vllm_config(worker.vllm_config):
        worker._model = runner.load_lora_model(worker._model, worker.vllm_config, worker.device)
    return worker  # type: ignore[no-any-return]


def adapted(seed: int = 0, family: str = "dense", **options: Any) -> Any:
    """Return a PeftModel whose adapter changes the model."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj"]} | options
    return with_adapter(model, seed, 0.1, **settings)


def lora_slots(runner: Any) -> dict[str, list[torch.Tensor]]:
    """Return what vLLM computes with, in its only slot."""
    modules = runner.lora_manager._adapter_manager.modules
    return {
        name: [one[0].clone() for one in (*module.lora_a_stacked, *module.lora_b_stacked)]
        for name, module in modules.items()
    }


def same_slots(one: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> bool:
    """Return whether two models compute with the same adapter."""
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


@contextlib.contextmanager
def saved(weights: Mapping[str, torch.Tensor], like: Path) -> Iterator[Path]:
    """Yield a checkpoint of ``weights`` with the configuration of another."""
    import shutil

    with tempfile.TemporaryDirectory() as folder:
        for file in like.iterdir():
            if file.suffix == ".json" and "index" not in file.name:
                shutil.copy(file, folder)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, Path(folder) / "model.safetensors")
        yield Path(folder)
