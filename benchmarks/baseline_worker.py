"""The workers' end of the baselines, which the trainer calls over vLLM's ``/collective_rpc``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from areal_vllm_ext.worker import WorkerExtension

from .link import Link


class BaselineWorker(WorkerExtension):
    """Our worker extension and AReaL's way to receive: each tensor by its own broadcast, loaded on arrival."""

    def baseline_join(self: Any, address: str, port: int, size: int) -> None:
        """Join the process group of the trainer and all workers."""
        parallel = self.vllm_config.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        with _plain_nccl():
            self._baseline_link = Link(address, port, rank, size, self.device)

    def baseline_receive(
        self: Any, names: list[str], dtypes: list[str], shapes: list[list[int]], layerwise: bool
    ) -> None:
        """Receive and load: in one of vLLM's reloads if ``layerwise``, else by ``load_weights`` on the live model."""

        def received() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                self._baseline_link.broadcast(tensor)
                yield name, tensor

        # Our extension would find the weights damaged, and keep the engine from generating.
        with self._areal_receiver.context.live_weights.committing({}):
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
        """Return the bytes on this worker's GPU: now, and the peak since the last call. Empty without a GPU."""
        if self.device.type != "cuda":
            return []
        found = [torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)]
        torch.cuda.reset_peak_memory_stats(self.device)
        return found


def _plain_nccl() -> contextlib.AbstractContextManager[None]:
    """Set up NCCL as the trainer does: vLLM's worker sets other variables, and both ends must agree."""
    try:
        from vllm.utils.nccl import unpinned_nccl_env
    except ImportError:
        return contextlib.nullcontext()
    environment: contextlib.AbstractContextManager[None] = unpinned_nccl_env()
    return environment
