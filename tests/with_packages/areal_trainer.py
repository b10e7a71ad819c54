"""AReaL's own trainer and client, driven line by line: its FSDP engine on a CPU, and its client of vLLM servers.

    python areal_trainer.py MODEL ADDRESSES BACKEND FOLDER FD [lora]    commands on standard input, answers on the descriptor

Commands are lists of JSON: ["train", seed], ["update", "xccl" or "disk", version], ["bad bucket"], ["generate", tokens],
["call", method of the client], ["save adapter", path]. With ``lora`` it trains an adapter, and updates bring that.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from areal.api.alloc_mode import ModelAllocation
from areal.api.cli_args import GenerationHyperparameters, InferenceEngineConfig, NameResolveConfig
from areal.api.io_struct import FinetuneSpec, ModelRequest, ParamSpec, WeightUpdateMeta
from areal.engine import fsdp_engine
from areal.engine.fsdp_engine import FSDPEngine
from areal.engine.vllm_remote import RemotevLLMEngine
from areal.utils import name_resolve
from safetensors.torch import save_file

# Small, so that an update has several buckets.
_BUCKET_MIB = 1


class Trainer:
    """One rank of a trainer, and the client that it commands."""

    def __init__(self, model: str, addresses: list[str], backend: str, folder: str, *, lora: bool) -> None:
        names = {"experiment_name": "areal_vllm_ext", "trial_name": str(os.getpid())}
        name_resolve.reconfigure(NameResolveConfig(nfs_record_root=f"{folder}/names"))
        config = InferenceEngineConfig(
            backend=backend, fileroot=folder, tokenizer_path=model, setup_timeout=60, request_timeout=120, **names
        )
        self.client = RemotevLLMEngine(config)
        self.client.initialize(addr=addresses, train_data_parallel_size=1)
        adapter = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
        self.engine = FSDPEngine.from_pretrained(
            model, dtype="float32", attn_impl="sdpa", **names, **(adapter if lora else {})
        )
        self.engine.create_process_group()
        self.engine.initialize(None, FinetuneSpec(1, 1, 1))
        self.xccl = WeightUpdateMeta.from_fsdp_xccl(
            gen_allocation=ModelAllocation.from_str(backend, name="rollout"),
            weight_chunked_mem_mb=_BUCKET_MIB,
            use_lora=lora,
            lora_name="lora" if lora else "",
        )
        self.disk = WeightUpdateMeta.from_disk(file_root=folder, **names)
        if host := os.environ.get("AREAL_TEST_HOST"):  # AReaL asks for this host's name, which no namespace has
            fsdp_engine.gethostip = lambda: host
        self.engine.connect_engine(self.client, self.xccl)

    def do(self, command: str, *arguments: Any) -> Any:
        """Carry out a command; returns what JSON can carry."""
        return getattr(self, command.replace(" ", "_"))(*arguments)

    def train(self, seed: int) -> None:
        """Move the weights as ``Cluster.train`` does."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in filter(lambda one: one.requires_grad, self.engine.model.parameters()):
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local.add_(torch.randn(local.shape, generator=generator) * 0.05)

    def update(self, kind: str, version: int) -> None:
        meta = (self.xccl if kind == "xccl" else self.disk).with_version(version)
        self.client.pause()
        self.engine.set_version(version)
        self.client.set_version(version)
        self.engine.update_weights(meta)
        self.client.resume()

    def bad_bucket(self) -> None:
        """What the engine does for a bucket, with a shape that the model does not have."""
        self.client.pause_generation()
        meta = self.xccl
        meta.nccl_group_name = self.engine.weight_update_group_names[0]
        name = next(iter(dict(self.engine.model.named_parameters())))
        future = self.client.update_weights_from_distributed(meta, [ParamSpec(name, (3, 5), "float32")])
        dist.broadcast(torch.zeros(3, 5), src=0, group=self.engine.weight_update_groups[0], async_op=True)
        future.result()

    def save_adapter(self, path: str) -> None:
        named = ((name, one) for name, one in self.engine.model.named_parameters() if one.requires_grad)
        save_file({name: one.full_tensor() if hasattr(one, "full_tensor") else one.data for name, one in named}, path)

    def call(self, method: str) -> None:
        getattr(self.client, method)()

    def generate(self, tokens: int) -> list[Any]:
        """Tokens, log-probabilities and reason of the client's own request; the server balances them over engines."""
        wanted = GenerationHyperparameters(max_new_tokens=tokens, greedy=True, n_samples=1)
        request = ModelRequest(input_ids=[10, 20, 30, 40], gconfig=wanted)
        answer = asyncio.run(self.client.agenerate(request))
        return [list(answer.output_tokens), list(answer.output_logprobs), answer.stop_reason]


def main() -> None:
    model, addresses, backend, folder, descriptor, *kinds = sys.argv[1:]
    with os.fdopen(int(descriptor), "w") as answers:

        def answer(value: Any = None, error: str = "") -> None:
            answers.write(json.dumps({"value": value, "error": error}) + "\n")
            answers.flush()

        trainer = Trainer(model, addresses.split(","), backend, folder, lora="lora" in kinds)
        answer()
        for line in sys.stdin:
            try:
                answer(trainer.do(*json.loads(line)))
            except Exception as error:
                answer(error=f"{type(error).__name__}: {error}")
    os._exit(0)  # AReaL's pools and groups have no clean end that does not wait


if __name__ == "__main__":
    main()
