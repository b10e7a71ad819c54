"""Fault points: places of the shipped code where a test can make it slow, short of memory, or fail. Off by default."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

Point = Literal["staging", "digest", "read", "shadow"]

_faults: dict[Point, Callable[[int], int]] = {}


def reach(point: Point, nbytes: int = 0) -> int:
    """Return how many of ``nbytes`` to handle now: all of them, unless a test has injected a fault here."""
    return fault(nbytes) if (fault := _faults.get(point)) else nbytes


@contextlib.contextmanager
def injected(point: Point, fault: Callable[[int], int]) -> Iterator[None]:
    """Inject a fault inside this context; it gets a number of bytes and returns how many to handle, sleeps, or raises."""
    _faults[point] = fault
    try:
        yield
    finally:
        del _faults[point]
