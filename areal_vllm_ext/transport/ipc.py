"""CUDA IPC: trainer and workers on one host, best on one GPU.

Tensors travel in one of two ways. Tensors that live on in the trainer unchanged (a module, a state dict) are shared in place:
``ipc_sharing.py``. All others go through two slots of device memory: the trainer fills one while the workers copy the other.

The slots come from ``cudaMalloc`` rather than from torch, because torch's expandable segments have no handle. With expandable
segments nothing can be shared in place either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..protocol import Bucket, CudaIpc
from . import cuda_runtime, ipc_memory
from .device import device_id, host_id
from .ipc_memory import OpenedMemory
from .ipc_sharing import STAMP_BYTES, SharedTensors, SharedTensorsReader
from .slots import SlotsSink, check_inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from .base import Work, WorkerSite


class CudaIpcSource:
    """The worker's end."""

    reusable = True
    unchecked = False
    nbytes = 0

    def __init__(self, transfer: CudaIpc, site: WorkerSite) -> None:
        """Open the trainer's slots.

        Raises:
            RuntimeError: this worker cannot reach them.
        """
        self.device = site.device
        if self.device.type != "cuda":
            raise RuntimeError(
                f"transport 'ipc' brings weights to GPUs, and this worker runs on {self.device}: use transport='broadcast'"
            )
        if transfer.host != host_id():
            raise RuntimeError("the trainer is on another host: use transport='broadcast'")
        same_gpu = transfer.device_id == device_id(self.device)
        if not same_gpu:
            _check_peer(self.device, transfer.device_id)
        self._transfer = transfer
        self._memory = OpenedMemory(self.device, transfer.device_id)
        self.sharing = SharedTensorsReader(self._memory, transfer, in_place=transfer.shared and same_gpu)
        self._memory.open(transfer.handle, transfer.nbytes)

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        memory, _ = self._memory.open(self._transfer.handle, self._transfer.nbytes)
        check_inside(bucket, memory.nbytes, "the trainer's memory")
        return self._memory.copy([(memory, bucket.location, bucket.nbytes)], buffer)

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        self._memory.close()


def _check_peer(device: torch.device, other: str) -> None:
    """Refuse a GPU whose memory ``device`` cannot read. A GPU that this process does not see is tried."""
    for index in range(torch.cuda.device_count()):
        if device_id(torch.device("cuda", index)) == other and not torch.cuda.can_device_access_peer(device, index):
            raise RuntimeError(
                f"this worker's {device} cannot read the memory of the trainer's GPU {other}: use transport='broadcast'"
            )


class CudaIpcSink(SlotsSink):
    """The trainer's end."""

    def __init__(self, engines: int, device: torch.device, bucket_bytes: int, slot_bytes: int) -> None:
        """Allocate the slots. They are kept from one update to the next.

        Args:
            engines: how many engines read from them.
            device: the trainer's device.
            bucket_bytes: size of a bucket.
            slot_bytes: size of a slot: the largest tensor, which gets a bucket of its own.

        Raises:
            RuntimeError: the device is no GPU, or has no room.
        """
        if device.type != "cuda":
            raise RuntimeError(
                f"transport 'ipc' sends from a GPU, and these weights are on {device}: use 'shared_memory'"
            )
        super().__init__(bucket_bytes, slot_bytes)
        runtime = cuda_runtime.load()
        with torch.cuda.device(device):
            torch.cuda.empty_cache()  # torch's unused reserve counts as room
            try:
                memory = runtime.allocate(self.slots * slot_bytes + STAMP_BYTES)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{device} has no room for two slots of {slot_bytes >> 20} MiB ({error}): use a smaller bucket_mib"
                ) from None
            self._handle = runtime.share(memory)
            self._memory = torch.as_tensor(memory, device=device)
        ipc_memory.own[self._handle] = memory
        transfer = CudaIpc(host=host_id(), device_id=device_id(device), handle=self._handle, nbytes=memory.nbytes)
        self.transfers = [transfer] * engines
        self.sharing = SharedTensors(runtime, device, self._memory[-8:].view(torch.int64), self.transfers)

    def connect(self, opening: Future[None]) -> None:
        opening.result()

    def release(self) -> None:
        """Keep the slots for the next update."""

    def close(self) -> None:
        self.sharing.close()
        ipc_memory.own.pop(self._handle, None)
        self.filled.clear()
        self._memory = None
