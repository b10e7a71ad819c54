"""A clock that stands still while its process is stopped."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# A process that has not read the clock for longer was stopped meanwhile.
LONGEST_STEP_SECONDS = 1.0


class AwakeClock:
    """The seconds in which this process could read messages.

    A directory that was stopped (SIGSTOP, a loop that was starved) finds the messages of that time still unread. By another
    clock, its leases would be over, its engines lost and its settling done before it has read any of them.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """
        Args:
            clock: the time in seconds, with the stops.
        """
        self._clock = clock
        self._read = self._now = clock()

    def __call__(self) -> float:
        """Return the time. Read it at least once per ``LONGEST_STEP_SECONDS``."""
        read = self._clock()
        self._now += min(read - self._read, LONGEST_STEP_SECONDS)
        self._read = read
        return self._now
