"""A plain torch process group of the trainer and all workers, for baselines and for the raw link."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(seconds=120)


class Link:
    """A process group: gloo on CPU, NCCL on CUDA. The trainer is rank 0."""

    def __init__(self, address: str, port: int, rank: int, size: int, device: torch.device) -> None:
        """Join the group at ``address:port``, where rank 0 listens."""
        self._device = device
        self._store = dist.TCPStore(address, port, is_master=rank == 0, wait_for_workers=False, timeout=_TIMEOUT)
        self._group: Any
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._group = dist.ProcessGroupNCCL(self._store, rank, size, dist.ProcessGroupNCCL.Options())
        else:
            self._group = dist.ProcessGroupGloo(self._store, rank, size, _TIMEOUT)
        self.meet()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Broadcast from rank 0; returns when the current stream may use the tensor (gloo: when it has arrived)."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()

    def meet(self) -> None:
        """Wait until all ranks have come to this call."""
        self._group.allreduce([torch.zeros(1, device=self._device)]).wait()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
