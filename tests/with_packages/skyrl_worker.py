"""The Ray actor of test_skyrl.py: SkyRL's own worker around a small FSDP model.

SkyRL asks for Python 3.12, whose ``TypedDict`` pydantic takes; on 3.11 it takes that of typing_extensions.
"""

from __future__ import annotations

import sys
import typing
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import typing_extensions
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict

from skyrl.backends.skyrl_train.weight_sync import weight_senders
from skyrl.backends.skyrl_train.weight_sync.sources import FsdpWeightSource
from skyrl.backends.skyrl_train.workers.worker import PolicyWorkerBase
from skyrl.train.config.config import InferenceEngineConfig
from transformers import AutoModelForCausalLM


class Client:
    """What the sync asks of SkyRL's client of its inference servers."""

    server_urls = ("http://not.asked",)
    data_parallel_size = 1

    async def get_world_size(self) -> tuple[int, int]:
        return 4, 2


class Policy(PolicyWorkerBase):  # type: ignore[misc, no-any-unimported]
    """SkyRL's policy worker; its FSDP strategy, which needs a GPU, is torch's own here."""

    def __init__(self, path: str, rank: int, port: int) -> None:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
        self._module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        fully_shard(self._module, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        self.cfg = SimpleNamespace(
            placement=SimpleNamespace(colocate_all=False),
            policy=SimpleNamespace(model=SimpleNamespace(path=path)),
            fully_async=SimpleNamespace(enabled=False),
        )
        self._breaks = False

    def _build_weight_source(self, dtype: torch.dtype, backend: str) -> Any:
        assert backend == "nccl"
        source = FsdpWeightSource(self._module, dtype)
        return Breaking(source, self)

    def replaced(self) -> str:
        """Which module's function SkyRL will call."""
        return str(weight_senders.build_trainer_engine.__module__)

    async def connect(self, **config: Any) -> None:
        self.engine_config = InferenceEngineConfig(model_dtype="float32", **config)
        await self.init_weight_sync_state(Client(), self.engine_config)

    async def sync(self) -> None:
        await self._sync_weights_to_inference_engines(Client(), self.engine_config)

    def train(self, seed: int, breaks: bool = False) -> None:
        self._breaks = breaks
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self._module.parameters():
                change = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(distribute_tensor(change, parameter.device_mesh, parameter.placements))


class Breaking:
    """SkyRL's source, whose second tensor does not fit while ``_breaks``."""

    def __init__(self, source: Any, policy: Policy) -> None:
        self._source, self._policy = source, policy

    def __iter__(self) -> Any:
        for place, (name, tensor) in enumerate(self._source):
            yield name, tensor[:1] if self._policy._breaks and place == 1 else tensor
