"""Names of devices and hosts on which trainer and workers agree."""

from __future__ import annotations

from pathlib import Path

import torch


def device_id(device: torch.device) -> str:
    """Return a GPU's UUID, or ``cpu``.

    Never a GPU's index: ``CUDA_VISIBLE_DEVICES`` gives the same GPU another index in each process.
    """
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def own_device_id() -> str:
    """Return ``device_id`` of the device that this process would use."""
    return device_id(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def host_id() -> str:
    """Return this host's name on which all its containers agree: the boot id of its kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
