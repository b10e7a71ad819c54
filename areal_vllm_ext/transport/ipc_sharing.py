"""Zero-copy by CUDA IPC: workers read tensors where they live in the trainer's memory.

The trainer announces the allocations that its tensors lie in. A worker on the same GPU stages that memory itself; a worker
on another GPU copies it. The trainer revokes its memory when the update is over, by changing a stamp. Workers read the stamp
after they have loaded: one that is too late learns that its copy may be wrong, and its engine is tainted.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import msgspec
import torch

from ..integrity import digest
from ..protocol import Allocation, Bucket, CudaIpc, Segment, TensorMeta
from . import ipc_memory
from .buckets import UnpackedBucket, aligned, digest_and_check_finite_async, nbytes_of, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .base import Work
    from .cuda_runtime import CudaRuntime, Memory
    from .ipc_memory import OpenedMemory

STAMP_BYTES = digest.ROW_BYTES
# Limits of one announcement. Workers hash one announcement while the trainer hashes the next. But the two processes
# time-slice the GPU, so many small tensors stay together.
_BATCH_TENSORS, _BATCH_BYTES = 4096, 2 << 30


class SharedTensorsReader:
    """The worker's end.

    Attributes:
        in_place: whether the worker stages the trainer's memory itself, because it is on the same GPU.
    """

    def __init__(self, memory: OpenedMemory, transfer: CudaIpc, *, in_place: bool) -> None:
        self.in_place = in_place
        self._memory, self._transfer = memory, transfer
        memory.on_close = self._forget_views
        # The current update's stamp, and the handles that it shared so far.
        self._stamp = 0
        self._shared: set[bytes] = set()
        # The tensors of the last update and of the current one, by the bucket's index.
        self._last_views: dict[int, UnpackedBucket] = {}
        self._views: dict[int, UnpackedBucket] = {}

    def views(self, bucket: Bucket) -> UnpackedBucket:
        """Return a bucket's tensors in the trainer's own memory.

        Raises:
            RuntimeError: the memory cannot be opened.
            ValueError: a tensor does not lie inside its allocation.
        """
        opened = self._open(bucket)
        unpacked = self._last_views.get(bucket.index)
        if unpacked is None or (unpacked.segments, unpacked.memory) != (bucket.segments, bucket.allocations):
            tensors: dict[str, torch.Tensor] = {}
            for segment in bucket.segments:
                tensors.update(unpack([segment], opened[segment.allocation][1]))
            unpacked = UnpackedBucket(bucket.segments, bucket.allocations, tensors)
        self._views[bucket.index] = unpacked
        return unpacked

    def start_copy(self, bucket: Bucket, buffer: torch.Tensor) -> Work:
        """Start to copy a bucket's tensors into ``buffer``, laid out as ``packed_layout`` says.

        Raises:
            RuntimeError: the memory cannot be opened.
            ValueError: a tensor does not lie inside its allocation.
        """
        opened = self._open(bucket)
        slices = []
        for segment in bucket.segments:
            memory, _ = opened[segment.allocation]
            nbytes = nbytes_of(segment.tensor)
            if segment.offset < 0 or segment.offset + nbytes > memory.nbytes:
                raise ValueError(f"{segment.tensor.name} does not lie inside its allocation")
            slices.append((memory, segment.offset, aligned(nbytes)))
        return self._memory.copy(slices, buffer)

    def stamp(self) -> torch.Tensor:
        """Return the trainer's stamp: one int64, equal to ``bucket.stamp`` until the trainer revokes its memory."""
        _, whole = self._memory.open(self._transfer.handle, self._transfer.nbytes)
        return whole[-8:].view(torch.int64)

    def _open(self, bucket: Bucket) -> list[tuple[Memory, torch.Tensor]]:
        """Open the bucket's allocations."""
        if bucket.stamp != self._stamp:
            # Close what the last update did not share, because the trainer may have freed it.
            self._memory.keep_only({self._transfer.handle, *self._shared})
            self._last_views, self._views = self._views, {}
            self._stamp, self._shared = bucket.stamp, set()
        self._shared.update(one.handle for one in bucket.allocations)
        return [self._memory.open(one.handle, one.nbytes) for one in bucket.allocations]

    def _forget_views(self) -> None:
        self._last_views, self._views = {}, {}


def _writes(tensor: torch.Tensor) -> int:
    """Return how often torch has written to a tensor. It does not count for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


class SharedTensors:
    """The trainer's end: what it shares during one update."""

    batch_bytes = _BATCH_BYTES

    def __init__(
        self, runtime: CudaRuntime, device: torch.device, stamp: torch.Tensor, transfers: Sequence[CudaIpc]
    ) -> None:
        """
        Args:
            runtime: CUDA's functions.
            device: the trainer's device.
            stamp: one int64 that the workers can read.
            transfers: the sink's.
        """
        self._runtime, self._device, self._stamp = runtime, device, stamp
        self._stream = torch.cuda.Stream(device)
        self.transfers = [msgspec.structs.replace(transfer, shared=True) for transfer in transfers]
        # Each shared tensor with its write count when it was offered.
        self._shared: list[tuple[str, torch.Tensor, int]] = []
        self._shown = 0
        # The batch that is being collected, and the batches whose digests are being computed.
        self._batch: list[tuple[TensorMeta, torch.Tensor]] = []
        self._batch_nbytes = 0
        self._hashing: list[tuple[list[tuple[TensorMeta, torch.Tensor]], Callable[[], list[int]]]] = []
        self._allocations: dict[bytes, Memory] = {}
        self._handles: dict[int, bytes] = {}  # by the address of an allocation or of a tensor
        self._last: Memory | None = None
        # Allocations of the last update and of this one, by number. They are cached because handles cost system calls.
        self._cached: dict[int, tuple[Memory, bytes]] = {}
        self._used: dict[int, tuple[Memory, bytes]] = {}

    def can_share(self, tensor: torch.Tensor) -> bool:
        """Return whether workers can read ``tensor`` where it is."""
        if tensor.device != self._device or not tensor.is_contiguous() or not tensor.nbytes:
            return False
        address = tensor.data_ptr()
        try:
            memory = self._allocation_of(address)
        except (RuntimeError, OSError):
            return False
        if (address - memory.address) % digest.ROW_BYTES:
            return False
        self._handles[address] = self._handles[memory.address]
        return True

    def _allocation_of(self, address: int) -> Memory:
        """Return the allocation that ``address`` lies in; its handle is in ``_handles`` then."""
        last = self._last  # neighbouring tensors ask the driver only once
        if last is not None and last.address <= address < last.address + last.nbytes:
            return last
        number = self._runtime.allocation_id(address)
        if number not in self._used:
            if (found := self._cached.get(number)) is None:
                with torch.cuda.device(self._device):
                    memory = self._runtime.allocation(address)
                    found = memory, self._runtime.share(memory)
            memory, handle = self._used[number] = found
            self._handles[memory.address] = handle
            self._allocations[handle] = ipc_memory.own[handle] = memory
        self._last = self._used[number][0]
        return self._last

    def offer(self, meta: TensorMeta, tensor: torch.Tensor) -> bool:
        """Share ``tensor`` if workers can read it where it is.

        A shared tensor must not change until ``revoke``. Its digest is started as soon as the batch is full.
        """
        if not self.can_share(tensor):
            return False
        if not self._shared:
            torch.cuda.synchronize(self._device)  # workers read on other streams
            self._shown = secrets.randbits(62) | 1
            self._write_stamp(self._shown)
        if self._batch and (self._batch_nbytes + tensor.nbytes > _BATCH_BYTES or len(self._batch) >= _BATCH_TENSORS):
            self._start_digests()
        self._batch.append((meta, tensor))
        self._batch_nbytes += tensor.nbytes
        self._shared.append((meta.name, tensor, _writes(tensor)))
        return True

    def _start_digests(self) -> None:
        batch, self._batch, self._batch_nbytes = self._batch, [], 0
        self._hashing.append((batch, digest_and_check_finite_async([(meta.name, tensor) for meta, tensor in batch])))

    def next_announcement(self) -> Bucket | None:
        """Return the announcement of the oldest batch, if the device has a batch after it to hash meanwhile.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
        """
        if len(self._hashing) < 2:
            return None
        batch, digests = self._hashing.pop(0)
        return self._announcement(batch, tuple(digests()))

    def announcements(self) -> Iterator[Bucket]:
        """Yield announcements of all shared tensors that ``next_announcement`` has not returned.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
        """
        if self._batch:
            self._start_digests()
        hashing, self._hashing = self._hashing, []
        return (self._announcement(batch, tuple(digests())) for batch, digests in hashing)

    def _announcement(self, batch: Sequence[tuple[TensorMeta, torch.Tensor]], digests: tuple[int, ...]) -> Bucket:
        numbers: dict[bytes, int] = {}
        segments = []
        for meta, tensor in batch:
            handle = self._handles[tensor.data_ptr()]
            number = numbers.setdefault(handle, len(numbers))
            offset = tensor.data_ptr() - self._allocations[handle].address
            segments.append(Segment(meta, offset, number))
        return Bucket(
            epoch=0,
            update="",
            index=0,
            nbytes=sum(tensor.nbytes for _, tensor in batch),
            segments=tuple(segments),
            digests=digests,
            allocations=tuple(Allocation(handle, self._allocations[handle].nbytes) for handle in numbers),
            stamp=self._shown,
        )

    def first_changed(self) -> str | None:
        """Return the name of a shared tensor that was written to since it was offered, as far as torch knows."""
        return next((name for name, tensor, writes in self._shared if _writes(tensor) != writes), None)

    def revoke(self) -> None:
        """End the sharing: the tensors may change from now on, and late workers notice it by the stamp."""
        if self._shared:
            self._write_stamp(0)
        for handle in self._allocations:
            ipc_memory.own.pop(handle, None)
        self._shared, self._batch, self._batch_nbytes, self._hashing = [], [], 0, []
        self._allocations, self._handles, self._last = {}, {}, None
        self._cached, self._used = self._used, {}

    def close(self) -> None:
        """Revoke, and let go of the stamp's memory, which is the sink's."""
        self.revoke()
        del self._stamp

    def _write_stamp(self, value: int) -> None:
        with torch.cuda.stream(self._stream):
            self._stamp.fill_(value)
        self._stream.synchronize()
