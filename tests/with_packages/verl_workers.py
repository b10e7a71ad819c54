"""The Ray actor of test_verl.py: verl's own actor worker around a small FSDP model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.import_utils import import_external_libs
from verl.workers.engine_workers import ActorRolloutRefWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from verl.workers.config import CheckpointEngineConfig


class Model:
    """In the place of verl's FSDP engine, which needs a GPU: its weights are gathered as that does it."""

    def __init__(self, path: str) -> None:
        self.module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(self.module, mesh=mesh)
        self.breaks = False

    def get_per_tensor_param(self) -> tuple[Iterator[tuple[str, torch.Tensor]], None]:
        return self._gathered(), None

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        for place, (name, parameter) in enumerate(self.module.state_dict().items()):
            whole = parameter.full_tensor()
            yield name, whole[:1] if self.breaks and place == 1 else whole


class Actor(ActorRolloutRefWorker):  # type: ignore[misc, no-any-unimported]
    """verl's actor, without its rollout and its optimiser."""

    def __init__(self, path: str, config: CheckpointEngineConfig) -> None:  # type: ignore[no-any-unimported]
        Worker.__init__(self)
        initialize_global_process_group_ray(timeout_second=60, backend="cpu:gloo")
        self.config = SimpleNamespace(rollout=SimpleNamespace(checkpoint_engine=config))
        self.actor = SimpleNamespace(engine=Model(path))
        # As ActorRolloutRefWorker.init_model does.
        import_external_libs(config.custom_backend_module)
        settings = config.engine_kwargs.get(config.backend, {})
        self.checkpoint_engine = CheckpointEngineRegistry.new(
            config.backend, is_master=dist.get_rank() == 0, bucket_size=2048 << 20, **settings
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)  # type: ignore[untyped-decorator]
    def train(self, seed: int, breaks: bool = False) -> None:
        model = self.actor.engine
        model.breaks = breaks
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.module.parameters():
                change = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_(distribute_tensor(change, parameter.device_mesh, parameter.placements))
