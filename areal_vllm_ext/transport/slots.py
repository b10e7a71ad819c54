"""Slots: memory of trainer and workers. The trainer fills one slot while the workers copy the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import CompletedWork

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..protocol import Bucket
    from . import buckets
    from .base import Work


class SlotsSink:
    """The trainer's end without the memory itself."""

    slots = 2
    announced_is_sent = True

    def __init__(self, bucket_bytes: int, slot_bytes: int) -> None:
        """
        Args:
            bucket_bytes: size of a bucket.
            slot_bytes: size of a slot, so that the largest tensor fits.
        """
        self.bucket_bytes = bucket_bytes
        self.filled: dict[int, buckets.Bucket] = {}
        self._slot_bytes = slot_bytes
        self._memory: torch.Tensor | None = None

    def buffer(self, index: int, nbytes: int) -> tuple[int, torch.Tensor]:
        """Return location and memory for a bucket; see ``Sink.buffer``."""
        assert self._memory is not None
        if nbytes > self._slot_bytes:
            raise RuntimeError(f"a tensor of {nbytes >> 20} MiB is larger than every tensor of the engines' checkpoint")
        start = (index % self.slots) * self._slot_bytes
        return start, self._memory[start : start + nbytes]

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        """Do nothing, because workers read the slot as soon as it is announced."""
        return CompletedWork(buffer)


def check_inside(bucket: Bucket, nbytes: int, memory: str) -> None:
    """Raise ValueError if ``bucket`` does not lie inside the ``nbytes`` of ``memory`` (its name)."""
    if min(bucket.location, bucket.nbytes) < 0 or bucket.location + bucket.nbytes > nbytes:
        raise ValueError(f"the bucket does not lie inside {memory}")
