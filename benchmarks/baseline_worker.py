"""The workers' end of the baselines, beside our own extension: reached over vLLM's ``/collective_rpc``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from areal_vllm_ext.worker import WorkerExtension

from .link import Link


class BaselineWorker(WorkerExtension):
    """Receives as AReaL's worker does: each tensor by a broadcast of its own, loaded when it has come."""

    def baseline_join(self: Any, address: str, port: int, size: int) -> None:
        """Meet the trainer and all other workers."""
        parallel = self.vllm_config.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        with _plain_nccl():
            self._baseline_link = Link(address, port, rank, size, self.device)

    def baseline_receive(
        self: Any, names: list[str], dtypes: list[str], shapes: list[list[int]], layerwise: bool
    ) -> None:
        """Receive and load; ``layerwise`` in one of vLLM's reloads, else by ``load_weights`` on the live model."""

        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                self._baseline_link.broadcast(tensor)
                yield name, tensor

        if layerwise:
            self.reload_weights(weights_iterator=received())
        else:
            for one in received():
                self.get_model().load_weights([one])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def baseline_raw(self: Any, nbytes: int, rounds: int) -> None:
        """Receive ``nbytes`` by one broadcast, ``rounds`` times."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        for _ in range(rounds):
            self._baseline_link.meet()
            self._baseline_link.broadcast(buffer)
            self._baseline_link.meet()

    def baseline_memory(self: Any) -> list[int]:
        """Bytes on this worker's GPU now, and at most since the last call; empty without a GPU."""
        if self.device.type != "cuda":
            return []
        found = [torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)]
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


def _plain_nccl() -> contextlib.AbstractContextManager[None]:
    """NCCL as the trainer sets it up: vLLM's worker has variables of its own, and both ends must agree."""
    try:
        from vllm.utils.nccl import unpinned_nccl_env
    except ImportError:
        return contextlib.nullcontext()
    environment: contextlib.AbstractContextManager[None] = unpinned_nccl_env()
    return environment
