"""Keep Python's garbage collector from running while an update makes many objects, or while generation waits for it.

A full collection walks through all objects of a process. Where torch, transformers and vLLM are imported it takes up to 0.3 s,
longer than the update itself, and thousands of tensors are enough new objects to start one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Blocks:
    """The active blocks of this process, and whether the collector was on before the first of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active = 0
        self._was_on = False

    def enter(self) -> None:
        with self._lock:
            if not self._active:
                self._was_on = gc.isenabled()
                gc.disable()
            self._active += 1

    def leave(self) -> None:
        with self._lock:
            self._active -= 1
            if not self._active and self._was_on:
                gc.enable()

    def end_in_forked_child(self) -> None:
        """Leave the blocks of the parent's threads, which the child does not have."""
        was_on = self._active and self._was_on
        self.__init__()  # type: ignore[misc] # the lock may be held by such a thread
        if was_on:
            gc.enable()


_blocks = _Blocks()
os.register_at_fork(after_in_child=_blocks.end_in_forked_child)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Switch the collector off within the block, which must be short: cyclic garbage of all threads stays that long.

    Several blocks may be active at the same time: the last one to end switches it on again, if it was on.
    """
    _blocks.enter()
    try:
        yield
    finally:
        _blocks.leave()
