"""``Leases``: one client commands the engines at a time, first come, first served. No I/O, no clock.

A client that is refused asks again until it is granted the lease or gives up; meanwhile it keeps its place in the queue.
The queue is ordered by how long each client has waited. Clients send that time with each request, so that the order
survives a restart of the directory.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..protocol import Error, Lease

if TYPE_CHECKING:
    from ..protocol import AcquireLease, RenewLease

# A waiting client that has not asked again for this time loses its place, because it may be gone. A request that the
# network lost is repeated after 1 s.
PLACE_SECONDS = 1.5
# Upper bound of waiting clients; further ones are refused without a place.
MAX_WAITING = 1024


@dataclasses.dataclass
class _Place:
    """A waiting client: when it came, and when it asked last."""

    since: float
    asked: float


class Leases:
    """The lease of one directory, and the queue for it.

    Attributes:
        epoch: the highest epoch that was seen. Every lease gets a higher one.
        ends: when the lease in force ends, or when the last one ended; 0 before the first.
    """

    def __init__(self, opens: float) -> None:
        """
        Args:
            opens: when the first lease is granted. A directory that has just started waits until clients that have waited
                for longer, and the holder of a lease from before the restart, were heard.
        """
        self.epoch = 0
        self.ends = 0.0
        self._opens = opens
        self._holder = ""
        self._released = (
            0  # the epoch that was released last: a renewal that arrives late does not bring its lease back
        )
        self._waiting: dict[str, _Place] = {}

    def acquire(self, message: AcquireLease, now: float, joining: str = "") -> Lease | Error:
        """Grant the lease, or say who is ahead; ``joining`` names an engine that is."""
        holder = message.holder
        if holder == self._holder and now < self.ends:
            self.ends = now  # it asks for its next command, so its last one is over
        self._waiting = {name: place for name, place in self._waiting.items() if now - place.asked <= PLACE_SECONDS}
        place = self._waiting.get(holder)
        if place is None and len(self._waiting) < MAX_WAITING:
            place = self._waiting[holder] = _Place(now - message.waited, now)
        if place:
            place.asked = now
        if ahead := self._ahead_of(holder, now) or joining:
            return Error(kind="held", holder=self._holder if now < self.ends else "", epoch=self.epoch, message=ahead)
        self._waiting.pop(holder, None)
        self.epoch += 1
        self._holder = holder
        self.ends = now + message.seconds
        return Lease(epoch=self.epoch, seconds=message.seconds)

    def _ahead_of(self, holder: str, now: float) -> str:
        """Say why ``holder`` has to wait; empty if it does not."""
        if now < self.ends:
            who = self._holder or "a client from before the directory's restart"
            return f"{who} commands these engines (its lease ends in {self.ends - now:.1f} s unless renewed)"
        if now < self._opens:
            return f"the directory has just started and grants the first lease in {self._opens - now:.1f} s"
        first = min(self._waiting, key=lambda name: self._waiting[name].since, default=holder)
        return "" if first == holder else f"{first} has waited for longer and commands these engines next"

    def leave(self, holder: str, now: float) -> None:
        """Take a client that has given up out of the queue; a lease that it was granted too late ends."""
        self._waiting.pop(holder, None)
        if holder == self._holder and now < self.ends:
            self.ends = now

    def renew(self, message: RenewLease, now: float) -> Lease | Error:
        """Extend the lease; also one from before a restart, whose epoch the engines have brought back."""
        if message.epoch != self.epoch or message.epoch == self._released:
            return Error(kind="fenced", epoch=self.epoch, message="the lease was lost: another client holds it now")
        self._holder = message.holder
        self.ends = now + message.seconds
        return Lease(epoch=self.epoch, seconds=message.seconds)

    def release(self, epoch: int, now: float) -> None:
        """End the lease of ``epoch``; another epoch changes nothing."""
        if epoch == self.epoch:
            self.ends, self._released = now, epoch
