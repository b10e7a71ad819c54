"""Host memory for buckets."""

from __future__ import annotations

import contextlib
import mmap

import torch


def zeros(nbytes: int) -> torch.Tensor:
    """So many bytes, zero, as ``uint8``; given back to the system with the last tensor in them.

    In huge pages, where Linux lets a process ask for them: a fault for each 4 KiB costs more than the copy into them.

    Raises:
        RuntimeError: there is no room.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"host memory has no room for {nbytes >> 20} MiB more: {error.strerror}") from None
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
