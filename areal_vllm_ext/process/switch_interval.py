"""Let the threads of an update get the interpreter's lock sooner.

An engine that generates holds the interpreter's lock nearly all the time. A thread beside it waits for Python's switch
interval (5 ms) each time it wants the lock back, that is, after every message and every call that released the lock:
dozens of times in one update.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

SHORT_SECONDS = 2e-4

_usual_seconds = sys.getswitchinterval()
_active: set[ShortSwitchInterval] = set()
_lock = threading.Lock()


class ShortSwitchInterval:
    """Shortens the interval of this process from ``begin`` to ``end``, or within a ``with`` block.

    Several may be active at the same time: the last one to end restores the usual interval. Both calls are idempotent and
    may come from any thread.
    """

    def begin(self) -> None:
        """Shorten the interval."""
        with _lock:
            _active.add(self)
            sys.setswitchinterval(SHORT_SECONDS)

    def end(self) -> None:
        """Restore the usual interval, unless another one is active."""
        with _lock:
            _active.discard(self)
            sys.setswitchinterval(SHORT_SECONDS if _active else _usual_seconds)

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
