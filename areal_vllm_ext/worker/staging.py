"""Where new weights lie until the commit: on the worker's device, in host memory, or nowhere.

What it costs is known before the first byte comes, and refused with the numbers where there is no room, so that an engine
that generates is never brought down by an update.
"""

from __future__ import annotations

import threading
from typing import Literal

import torch

from ..protocol import Staging
from ..transport import host_memory
from .memory import free_bytes

Place = Literal["device", "host", "none"]

# Of the device's memory, for whatever else asks for some meanwhile: kernels' workspaces, a communicator's buffers.
_DEVICE_RESERVE = 512 << 20


def choose(staging: Staging, nbytes: int, of_shard: int, device: torch.device) -> Place:
    """Where a worker stages an update.

    Args:
        staging: what was asked for.
        nbytes: of all that comes. ``of_shard``: of what stays of it on the worker's own device.
        device: that.

    Raises:
        RuntimeError: there is no room; the message has what is needed and what is free, and the other choices.
    """
    if staging.kind == "none":
        return "none"
    on_device, on_host = of_shard * staging.on_device, (of_shard if device.type == "cpu" else nbytes) * staging.on_host
    if device.type != "cpu" and staging.kind in ("auto", "device"):
        free_device = max(free_bytes(device) - _DEVICE_RESERVE, 0) if nbytes else 0
        if on_device <= free_device:
            return "device"
        of_device = f"{_gib(on_device)} on {device} ({staging.on_device} workers), {_gib(free_device)} are free"
    if device.type == "cpu" or staging.kind in ("auto", "host"):
        free_host = free_bytes(torch.device("cpu")) if nbytes else 0
        if on_host <= free_host:
            return "host"
        host = f"{_gib(on_host)} of host memory ({staging.on_host} workers of this host), {_gib(free_host)} are free"
    if device.type == "cpu":
        raise RuntimeError(f"staging needs {host}: use staging='none', which pauses first and keeps no old weights")
    needs = of_device if staging.kind == "device" else host if staging.kind == "host" else f"{of_device}, or {host}"
    others = {"device": "staging='host', or 'none'", "host": "staging='device', or 'none'", "auto": "staging='none'"}
    raise RuntimeError(
        f"staging='{staging.kind}' needs {needs}: use {others[staging.kind]}, which pauses first and keeps no old weights"
    )


class Pool:
    """Where buckets arrive on a device: memory apart from the engine's, so that all of it can be given back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: torch.cuda.MemPool | None = None
        self._lock = threading.Lock()

    def empty(self, nbytes: int) -> torch.Tensor:
        """So many bytes."""
        if self._device.type != "cuda":
            return host_memory.zeros(nbytes)
        with self._lock:
            if self._pool is None:
                with torch.cuda.device(self._device):
                    self._pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(self._pool, self._device):
                return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    @property
    def used(self) -> bool:
        """Whether there is something to give back."""
        return self._pool is not None

    def give_back(self) -> None:
        """What nobody uses any more. Takes a while: the driver waits for the device. What is in use stays until it is not."""
        with self._lock:
            self._pool = None


def put(buffer: torch.Tensor, place: Place, device: torch.device) -> torch.Tensor:
    """``buffer`` where it is to be staged; itself where it lies there."""
    if place == "device" and buffer.device != device:
        return buffer.to(device)
    if place == "host" and buffer.device.type != "cpu":
        # Pinned, so that the commit, in which generation waits, copies at the bus's full rate.
        return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True).copy_(buffer)
    return buffer


def _gib(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB"
