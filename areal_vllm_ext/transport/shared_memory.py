"""Shared memory: trainer and workers on one host, with two slots.

``auto`` chooses it for a colocated trainer on CPU. Elsewhere it is for hosts without CUDA IPC.

The segment's name is removed as soon as every worker has opened it, so a killed process leaves nothing behind. Until then its
maker holds a lock on the segment, which the kernel releases when the maker ends. A segment without a lock is a leftover, and
the maker of the next segment removes it. A process id would not do, because containers have their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..protocol import Bucket, SharedMemory
from .base import CompletedWork
from .slots import SlotsSink, check_inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from .base import Work

_FOLDER = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_NAME = re.compile(r"areal-[0-9a-f]{32}")


def remove_leftovers() -> None:
    """Remove the segments of trainers that were killed before their workers had opened them."""
    for path in _FOLDER.glob("areal-*"):
        if not _NAME.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another user's, or already removed
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # its maker is alive
        finally:
            os.close(descriptor)


class SharedMemorySource:
    """The worker's end."""

    reusable = True
    unchecked = False
    sharing = None
    nbytes = 0

    def __init__(self, transfer: SharedMemory, device: torch.device) -> None:
        if not _NAME.fullmatch(transfer.segment):
            raise ValueError(f"{transfer.segment!r} is not the name of a shared memory segment")
        try:
            descriptor = os.open(_FOLDER / transfer.segment, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise RuntimeError(
                "the trainer's shared memory is not on this host (or not in this container): use transport='broadcast'"
            ) from None
        with os.fdopen(descriptor, "rb+") as file:
            self._map = mmap.mmap(file.fileno(), transfer.nbytes)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)
        self.device = device

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        check_inside(bucket, self._memory.numel(), "the shared memory")
        slot = self._memory[bucket.location : bucket.location + bucket.nbytes]
        return CompletedWork(buffer.copy_(slot))

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        """Do nothing, because the memory is unmapped with its last tensor."""


class SharedMemorySink(SlotsSink):
    """The trainer's end."""

    sharing = None

    def __init__(self, engines: int, bucket_bytes: int, slot_bytes: int) -> None:
        """Create the segment.

        Args:
            engines: how many engines read from it.
            bucket_bytes: size of a bucket.
            slot_bytes: size of a slot, so that the largest tensor fits.

        Raises:
            RuntimeError: /dev/shm has no room, or cannot be used.
        """
        super().__init__(bucket_bytes, slot_bytes)
        remove_leftovers()
        name = f"areal-{uuid.uuid4().hex}"
        transfer = SharedMemory(segment=name, nbytes=self.slots * slot_bytes)
        self.transfers = [transfer] * engines
        with contextlib.ExitStack() as undo:
            # Unnamed at first, so that no other process finds it before it is locked.
            try:
                descriptor = os.open(_FOLDER, os.O_RDWR | os.O_TMPFILE, 0o600)
            except OSError as error:
                raise RuntimeError(
                    f"shared memory cannot be created in {_FOLDER}: {error.strerror}; use transport='broadcast'"
                ) from None
            undo.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Reserve it now: a full /dev/shm is an error here instead of a SIGBUS later.
            try:
                os.posix_fallocate(descriptor, 0, transfer.nbytes)
            except OSError as error:
                raise RuntimeError(
                    f"{_FOLDER} has no room for {transfer.nbytes >> 20} MiB ({error.strerror}): use a smaller "
                    "bucket_mib, or transport='broadcast'"
                ) from None
            self._map = mmap.mmap(descriptor, transfer.nbytes)
            # src_dir_fd has no meaning for an absolute path, but makes Python call linkat: link does not follow links in /proc.
            os.link(f"/proc/self/fd/{descriptor}", _FOLDER / name, src_dir_fd=descriptor, follow_symlinks=True)
            undo.pop_all()
        self._named: tuple[Path, int] | None = (_FOLDER / name, descriptor)
        self._memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def connect(self, opening: Future[None]) -> None:
        try:
            opening.result()
        finally:
            self.close()

    def release(self) -> None:
        """Keep the memory, because it is reserved for the next update too."""

    def close(self) -> None:
        """Remove the name. The memory is freed with the last process that uses it."""
        if self._named:
            path, descriptor = self._named
            self._named = None
            path.unlink(missing_ok=True)
            os.close(descriptor)
