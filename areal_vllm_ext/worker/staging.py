"""Where new weights wait until the commit: on the worker's device, or in host memory.

The size is known before the first byte arrives. Without room the update is refused with the numbers, so that it never brings
a generating engine down.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from ..observability import fault_points
from ..protocol import Staging
from ..transport import host_memory
from ..transport.buckets import UnpackedBucket
from . import background
from .memory import free_bytes

Place = Literal["device", "host"]
# Unpacked buckets by sender and index.
Buckets = dict[tuple[int, int], UnpackedBucket]

# Device memory that staging leaves free for others: kernels' workspaces, a communicator's buffers.
_DEVICE_RESERVE = 512 << 20
# From an update's end until its memory goes back to the device: the engine generates again by then.
_GIVE_BACK_SECONDS = 0.3


def choose(staging: Staging, nbytes: int, of_shard: int, device: torch.device, beside: int = 0) -> Place:
    """Return where a worker stages an update.

    Args:
        staging: what the client asked for.
        nbytes: bytes of all that arrives.
        of_shard: bytes of what stays of it on the worker's own device.
        device: the worker's device.
        beside: bytes of the device that the update would use besides, if they are free. Staging keeps off them if it can.

    Raises:
        RuntimeError: there is no room; the message has the bytes needed and free, and the alternatives.
    """
    on_device, on_host = of_shard * staging.on_device, (of_shard if device.type == "cpu" else nbytes) * staging.on_host
    lacks: list[str] = []
    if device.type != "cpu" and staging.kind in ("auto", "device"):
        free = max(free_bytes(device) - _DEVICE_RESERVE, 0) if nbytes else 0
        if on_device <= free:
            fits_beside = on_device + beside > free >= beside and on_host <= free_bytes(torch.device("cpu"))
            return "host" if staging.kind == "auto" and on_device and fits_beside else "device"
        lacks.append(f"{_gib(on_device)} on {device} for {staging.on_device} workers, where {_gib(free)} are free")
    if device.type == "cpu" or staging.kind in ("auto", "host"):
        free = free_bytes(torch.device("cpu")) if nbytes else 0
        if on_host <= free:
            return "host"
        lacks.append(
            f"{_gib(on_host)} of host memory for {staging.on_host} workers of this host, where {_gib(free)} are free"
        )
    raise RuntimeError(f"staging='{staging.kind}' needs {', or '.join(lacks)}: {_alternative(staging, device)}")


def fits(nbytes: int, device: torch.device) -> bool:
    """Return whether ``device`` has room for ``nbytes`` that an update uses besides, if they are free."""
    return nbytes <= free_bytes(device) - (_DEVICE_RESERVE if device.type != "cpu" else 0)


def _alternative(staging: Staging, device: torch.device) -> str:
    if device.type == "cpu" or staging.kind == "auto":
        return "free memory on the engine's host, or start the engine with less of it for its KV cache"
    other = "host" if staging.kind == "device" else "device"
    return f"use staging='{other}' or 'auto'"


class Pool:
    """Device memory for arriving buckets, apart from the engine's, so that all of it can be given back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        self._lock = threading.Lock()

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return a buffer of ``nbytes``."""
        fault_points.reach("staging", nbytes)
        if self._device.type != "cuda":
            return host_memory.zeros(nbytes)
        with self._lock, self.allocating():
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """Take the device memory that the body allocates on this thread from this pool."""
        if self._device.type != "cuda":
            yield
            return
        if (pool := self._pool) is None:
            with torch.cuda.device(self._device):
                pool = self._pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool, self._device):
            yield

    @property
    def used(self) -> bool:
        """Whether there is memory to give back."""
        return self._pool is not None

    def give_back(self) -> None:
        """Free the unused memory. It takes a while, because the driver waits for the device."""
        with self._lock:
            self._pool = None


class StagingMemory:
    """The memory that a worker's updates stage in, kept from one update to the next if the client asks for it.

    Attributes:
        pool: where buckets arrive on the worker's device.
        shadows: where shadows are built.
        kept: unpacked buckets of the last update, if it asked to keep them.
        keeps: whether the last update asked to keep its memory.
        in_use: whether an update is in progress.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool, self.shadows = Pool(device), Pool(device)
        self.kept: Buckets = {}
        self.keeps = False
        self.in_use: Callable[[], bool] = lambda: False
        self._to_free: list[Callable[[], None]] = []

    def take_kept(self) -> Buckets:
        """Return the kept buckets, which are the caller's from now on."""
        kept, self.kept = self.kept, {}
        return kept

    def give_back_later(self, free: Callable[[], None] | None = None) -> None:
        """Give the memory back to the device soon, beside the running engine, unless it is kept or in use then.

        Args:
            free: called before, to free what is still used of it.
        """
        if free:
            self._to_free.append(free)
        if free or self.pool.used or self.shadows.used:
            background.run_later(_GIVE_BACK_SECONDS, self._give_back)

    def free_now(self) -> None:
        """Free what earlier updates have left to be freed."""
        while self._to_free:
            with contextlib.suppress(IndexError):  # another thread was first
                self._to_free.pop()()

    def give_back_now(self) -> None:
        """Give all memory back to the device, also what was kept for the next update, because the engine falls asleep."""
        if not self.in_use():
            self.kept, self.keeps = {}, False
            self.free_now()
            self.shadows.give_back()
            self.pool.give_back()

    def _give_back(self) -> None:
        self.free_now()
        if not self.in_use():
            self.shadows.give_back()
            if not self.keeps:
                self.pool.give_back()


def put(buffer: torch.Tensor, place: Place, device: torch.device) -> torch.Tensor:
    """Return ``buffer`` in the place of staging: a copy, or itself if it is there."""
    if place == "device" and buffer.device != device:
        return buffer.to(device)
    if place == "host" and buffer.device.type != "cpu":
        # Pinned, so that the commit, in which generation waits, copies at the bus's full rate.
        return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True).copy_(buffer)
    return buffer


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
