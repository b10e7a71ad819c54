"""Where new weights lie until the commit: on the worker's device, in host memory, or nowhere.

What it costs is known before the first byte comes, and refused with the numbers where there is no room, so that an engine
that generates is never brought down by an update.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..protocol import Staging
from .memory import free_bytes

Place = Literal["device", "host", "none"]

# Of the device's memory, for whatever else asks for some meanwhile: kernels' workspaces, a communicator's buffers.
_DEVICE_RESERVE = 512 << 20


def choose(staging: Staging, nbytes: int, device: torch.device) -> Place:
    """Where a worker on ``device`` stages ``nbytes``.

    Raises:
        RuntimeError: there is no room; the message has what is needed and what is free, and the other choices.
    """
    if staging.kind == "none":
        return "none"
    on_host, free_host = nbytes * staging.on_host, free_bytes(torch.device("cpu"))
    host = f"{_gib(on_host)} of host memory ({staging.on_host} workers of this host), {_gib(free_host)} are free"
    if device.type == "cpu":
        if on_host > free_host:
            raise RuntimeError(f"staging needs {host}: use staging='none', which pauses first and keeps no old weights")
        return "host"
    on_device, free_device = nbytes * staging.on_device, max(free_bytes(device) - _DEVICE_RESERVE, 0)
    of_device = f"{_gib(on_device)} on {device} ({staging.on_device} workers), {_gib(free_device)} are free"
    if staging.kind in ("auto", "device") and on_device <= free_device:
        return "device"
    if staging.kind in ("auto", "host") and on_host <= free_host:
        return "host"
    needs = {"device": of_device, "host": host, "auto": f"{of_device}, or {host}"}[staging.kind]
    others = {"device": "staging='host', or 'none'", "host": "staging='device', or 'none'", "auto": "staging='none'"}
    raise RuntimeError(
        f"staging='{staging.kind}' needs {needs}: use {others[staging.kind]}, which pauses first and keeps no old weights"
    )


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
