"""The pace of Python work beside generation."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# An engine that generates shares the interpreter's lock with such work, and waits for it again and again in each step. So the
# work rests for most of the time: it takes nine times as long then. A rest of 2 ms was felt more, one of 7 ms no less: see
# docs/performance.md.
_WORK_SECONDS, _REST_SECONDS = 5e-4, 4e-3


class Pace:
    """Called often by work beside generation, it makes the work rest while requests are served, and end if it must."""

    def __init__(self, serves: Callable[[], bool], check: Callable[[], None]) -> None:
        """
        Args:
            serves: tells whether the engine has requests.
            check: raises if the work must end.
        """
        self._serves, self._check = serves, check
        self._rest_at = 0.0

    def __call__(self) -> None:
        """Go on, or rest first."""
        if time.perf_counter() < self._rest_at:
            return
        self._check()
        if self._serves():
            time.sleep(_REST_SECONDS)
        self._rest_at = time.perf_counter() + _WORK_SECONDS
