"""The network of the simulation: losses, delays, copies and cuts."""

from __future__ import annotations

import random
from collections.abc import Callable

from .process import Process


class Network:
    """What becomes of each message. Shares are of all messages, 0 to 1."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.lost = self.late = self.doubled = self.bursts = 0.0
        self.cut: set[str] = set()  # processes that the others do not reach
        self.held: list[tuple[Process, Callable[[], None]]] = []

    def delays(self, now: float) -> list[float]:
        """After how many seconds the message arrives; once for each copy."""
        dice = self.dice
        if self.lost and dice.random() < self.lost:
            return []
        copies = 2 if self.doubled and dice.random() < self.doubled else 1
        delays = []
        for _ in range(copies):
            delay = dice.uniform(0.0002, 0.002)
            if self.late and dice.random() < self.late:
                delay += dice.expovariate(0.5)
            if self.bursts and dice.random() < self.bursts:
                delay += 0.5 - now % 0.5  # all that was sent in half a second comes at its end, in any order
            delays.append(delay)
        return delays
