"""How soon a thread gets the interpreter's lock from one that does not let go of it.

An engine that generates holds the lock nearly all the time. A thread beside it waits for Python's switch interval, 5 ms, each
time that it wants the lock back, after every message and every call that released it: dozens of times in an update.
"""

from __future__ import annotations

import sys
import threading

_HURRIED_SECONDS = 2e-4

_usual_seconds = sys.getswitchinterval()
_holders: set[str] = set()
_lock = threading.Lock()


def hurry(holder: str, wanted: bool) -> None:
    """Have threads of this process take turns quickly for as long as any ``holder`` wants it."""
    with _lock:
        if wanted:
            _holders.add(holder)
        else:
            _holders.discard(holder)
        sys.setswitchinterval(_HURRIED_SECONDS if _holders else _usual_seconds)
