"""Host memory for buckets, in huge pages."""

from __future__ import annotations

import contextlib
import mmap

import torch


def zeros(nbytes: int) -> torch.Tensor:
    """Return ``nbytes`` zeros as ``uint8``. The memory is unmapped with the last tensor in it.

    Huge pages are requested, because a page fault for each 4 KiB costs more than the copy into them.

    Raises:
        RuntimeError: there is no room.
    """
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RuntimeError(f"host memory has no room for {nbytes >> 20} MiB more: {error.strerror}") from None
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
