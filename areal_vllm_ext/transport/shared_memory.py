"""Shared memory: trainer and workers on one host. Two slots: the trainer fills one while the workers copy the other.

The segment's name is gone from the file system as soon as every worker has opened it, so that nothing is left behind
when a process is killed.
"""

from __future__ import annotations

import mmap
import os
import re
import uuid
from typing import TYPE_CHECKING

import torch

from ..protocol import Bucket, SharedMemory

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future
from pathlib import Path

_FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_NAME = re.compile(r"areal-[0-9a-f]{32}")


class SharedMemorySource:
    """The worker's end."""

    reusable = True
    unchecked = False
    nbytes = 0

    def __init__(self, transfer: SharedMemory, device: torch.device) -> None:
        if not _NAME.fullmatch(transfer.segment):
            raise ValueError(f"{transfer.segment!r} is no name of a segment")
        try:
            descriptor = os.open(_FOLDER / transfer.segment, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise RuntimeError(
                "the trainer's shared memory is not on this host (or not in this container): use transport='broadcast'"
            ) from None
        with os.fdopen(descriptor, "rb+") as file:
            self._map = mmap.mmap(file.fileno(), transfer.nbytes)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self._device = device

    def receive(self, bucket: Bucket, timeout: float, cancelled: threading.Event) -> torch.Tensor:
        if min(bucket.location, bucket.nbytes) < 0 or bucket.location + bucket.nbytes > self._memory.numel():
            raise ValueError("the bucket does not lie inside the shared memory")
        slot = self._memory[bucket.location : bucket.location + bucket.nbytes]
        return slot.to(self._device, copy=True)

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        """Nothing to do: the memory is unmapped with its last tensor."""


class SharedMemorySink:
    """The trainer's end."""

    slots = 2
    announced_is_sent = True

    def __init__(self, engines: int, bucket_bytes: int, slot_bytes: int) -> None:
        """Make the segment.

        Args:
            engines: how many engines will be told of it.
            bucket_bytes: size of a bucket.
            slot_bytes: the largest bucket, which a large tensor has for itself.

        Raises:
            RuntimeError: where /dev/shm has no room.
        """
        name = f"areal-{uuid.uuid4().hex}"
        transfer = SharedMemory(segment=name, nbytes=self.slots * slot_bytes)
        self.transfers = [transfer] * engines
        self.bucket_bytes = bucket_bytes
        self._slot_bytes = slot_bytes
        self._path: Path | None = _FOLDER / name
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "rb+") as file:
            # Reserved now: a full /dev/shm is an error here, not a SIGBUS in the middle.
            try:
                os.posix_fallocate(file.fileno(), 0, transfer.nbytes)
            except OSError as error:
                self.close()
                raise RuntimeError(
                    f"{_FOLDER} has no room for {transfer.nbytes >> 20} MiB ({error.strerror}): use a smaller "
                    "bucket_mib, or transport='broadcast'"
                ) from None
            self._map = mmap.mmap(file.fileno(), transfer.nbytes)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def meet(self, opening: Future[None]) -> None:
        try:
            opening.result()
        finally:
            self.close()

    def buffer(self, index: int, nbytes: int) -> tuple[int, torch.Tensor]:
        if nbytes > self._slot_bytes:
            raise RuntimeError(f"a tensor of {nbytes >> 20} MiB is larger than every tensor of the engines' checkpoint")
        start = (index % self.slots) * self._slot_bytes
        return start, self._memory[start : start + nbytes]

    def push(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> None:
        """Nothing to do: announced is sent."""

    def release(self) -> None:
        """The memory is kept for the next update: it was reserved for it."""

    def close(self) -> None:
        """Take the name away; the memory is freed with the last process that uses it."""
        if self._path:
            self._path.unlink()
            self._path = None
