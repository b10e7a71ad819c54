"""The Ray actor of test_openrlhf.py: OpenRLHF's own actor trainer around a small model that ZeRO-3 has partitioned.

What a CPU lacks is stood in for: flash_attn's functions, which need a GPU to be built, and two calls of CUDA.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
# The defaults of OpenRLHF's command line, as far as the trainer reads them.
ARGUMENTS = SimpleNamespace(
    train=SimpleNamespace(max_epochs=1, colocate_all=False, async_enable=False, dynamic_batch_enable=False),
    actor=SimpleNamespace(
        eps_clip_low_high=(0.2, 0.2),
        dual_clip=None,
        loss_agg_mode="token-mean",
        policy_loss_type="ppo",
        aux_loss_coef=0.0,
    ),
    algo=SimpleNamespace(
        advantage=SimpleNamespace(
            is_correction_level="off",
            is_correction_mode="mask",
            is_correction_gating="ratio",
            is_correction_threshold=(0.5, 5.0),
        )
    ),
    ds=SimpleNamespace(zero_stage=3, tensor_parallel_size=1, packing_samples=False),
    vllm=SimpleNamespace(sync_backend="nccl", num_engines=2, tensor_parallel_size=2, enable_prefix_caching=True),
)


def actor_trainer() -> Any:
    """OpenRLHF's class, imported in the actor's process only, because of what is stood in for."""
    for name, functions in {
        "flash_attn": (),
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils": (),
        "flash_attn.utils.distributed": ("all_gather",),
    }.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
        for function in functions:
            setattr(module, function, None)
        sys.modules[name] = module
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda: None
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    return ActorPPOTrainer


class DeepSpeedEngine(torch.nn.Module):
    """As DeepSpeed's, of which it has the name and the module."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model


class Policy:
    """One rank."""

    def __init__(self, path: str, rank: int, port: int) -> None:
        trainer = self._class = actor_trainer()
        import deepspeed
        import deepspeed.comm.torch

        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        deepspeed.comm.torch.build_shm_op = lambda: None  # it would be compiled for minutes
        deepspeed.init_distributed("gloo", verbose=False)
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        deepspeed.zero.Init(module=self._model, config_dict_or_path=CONFIG)
        strategy, actor = SimpleNamespace(args=ARGUMENTS), SimpleNamespace(model=DeepSpeedEngine(self._model))
        self._trainer = trainer(strategy, actor, None, None, None, vllm_engines=[])

    def replaced(self) -> str:
        """Whose method OpenRLHF will call."""
        return str(self._class.broadcast_to_vllm.__module__)

    def is_partitioned(self) -> bool:
        return all(parameter.numel() == 0 for parameter in self._model.parameters())

    def broadcast_to_vllm(self, tensor_parallel_size: int = 1) -> None:
        ARGUMENTS.ds.tensor_parallel_size = tensor_parallel_size
        self._trainer.broadcast_to_vllm()

    def train(self, seed: int, factor: float = 0.05) -> None:
        import deepspeed

        generator = torch.Generator().manual_seed(seed)
        for parameter in self._model.parameters():
            change = torch.randn(parameter.ds_shape, generator=generator) * factor
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if dist.get_rank() == 0:
                    parameter.add_(change)
