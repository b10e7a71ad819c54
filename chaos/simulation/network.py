"""The network of the simulation: losses, delays, copies and cuts."""

from __future__ import annotations

import random
from collections.abc import Callable

from .process import Process


class Network:
    """Decides what becomes of each message.

    Attributes:
        lost, late, doubled, bursts: the share of all messages that this happens to, 0 to 1.
        late_seconds: how late a late message is, on average.
        cut: the places on one side of a partition; messages do not cross to the other side.
        blocked: pairs of places; messages from the first to the second do not arrive.
        joined: the true time at which cuts ended last, also those of one way.
        held: messages that a cut link will deliver once it is joined.
    """

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.lost = self.late = self.doubled = self.bursts = 0.0
        self.late_seconds = 2.0
        self.cut: set[str] = set()
        self.blocked: set[tuple[str, str]] = set()
        self.joined = float("-inf")
        self.held: list[tuple[Process, Callable[[], None]]] = []

    def passes(self, source: Process, target: Process) -> bool:
        """Return whether messages get from ``source`` to ``target``."""
        if self.cut and (source.place in self.cut) != (target.place in self.cut):
            return False
        return not self.blocked or (source.place, target.place) not in self.blocked

    def delays(self, now: float) -> list[float]:
        """Return after how many seconds the message arrives, once for each copy."""
        dice = self.dice
        if not (self.lost or self.late or self.doubled or self.bursts):
            return [0.0002 + 0.0018 * dice.random()]
        if self.lost and dice.random() < self.lost:
            return []
        copies = 2 if self.doubled and dice.random() < self.doubled else 1
        delays = []
        for _ in range(copies):
            delay = dice.uniform(0.0002, 0.002)
            if self.late and dice.random() < self.late:
                delay += dice.expovariate(1 / self.late_seconds)
            if self.bursts and dice.random() < self.bursts:
                delay += 0.5 - now % 0.5  # messages of half a second arrive together, in any order
            delays.append(delay)
        return delays
