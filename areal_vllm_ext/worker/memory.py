"""How much memory is free."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the free memory of ``device``; for a CPU, of the host or of this container's limit."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    host = int(facts["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        host = min(host, limit - used + int(stat["inactive_file"]))
    return max(host, 0)
