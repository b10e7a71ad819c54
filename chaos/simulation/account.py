"""The account of a simulated round: what every engine served and when, as a history that can be checked."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from typing import NamedTuple

from areal_vllm_ext.protocol import Version
from chaos.history import Read, Write, problems

from .base import FIRST_VERSION


class Served(NamedTuple):
    """What an engine serves.

    Attributes:
        version: what it claims.
        weights: the update whose units it has; None if its adapters are not those that it claims.
        units: these units.
    """

    engine: str
    version: Version
    weights: Version | None
    units: tuple[object, ...] = ()


class Account:
    """Records what engines serve.

    An engine that serves counts as answering one request at the first and one at the last moment of each stretch: that is
    the strictest history that its clients could see.

    Attributes:
        versions: the versions that engines serve now, with the number of engines.
        newest: the highest committed epoch that an engine has served or an update has returned.
        forgotten: the moments at which the last memory of ``newest`` died. After them, any earlier version may be served.
    """

    def __init__(self) -> None:
        self.versions: collections.Counter[tuple[Version | None, tuple[object, ...]]] = collections.Counter()
        self.newest = 0
        self.forgotten: list[float] = []
        self._serving: dict[int, Served] = {}
        self._reads: list[Read] = []

    def serves(self, rank: int, served: Served | None, now: float) -> None:
        """Note what engine ``rank`` serves from now on; None for nothing."""
        before = self._serving.get(rank)
        if before == served:
            return
        if before:
            self._read(before, now)
            del self._serving[rank]
            self.versions[before.weights, before.units] -= 1
            self.versions += collections.Counter()  # drop zeros
        if served:
            self._read(served, now)
            self._serving[rank] = served
            self.versions[served.weights, served.units] += 1

    def remembered(self, epoch: int, now: float) -> None:
        """Note the highest committed epoch that a living process remembers."""
        if epoch < self.newest:
            self.newest = epoch
            self.forgotten.append(now)

    def problems(self, writes: Iterable[Write], now: float) -> list[str]:
        """Return why what engines served up to ``now`` is not the history of one register; empty if it is."""
        for served in self._serving.values():
            self._read(served, now)
        writes = [Write(FIRST_VERSION, -math.inf, -math.inf, "committed"), *writes]
        found = []
        for start, end in zip([-math.inf, *self.forgotten], [*self.forgotten, math.inf], strict=True):
            reads = [read for read in self._reads if start <= read.started < end]
            found += problems([_within(write, start, end) for write in writes if write.started < end], reads)
        return found

    def _read(self, served: Served, now: float) -> None:
        self._reads.append(Read(served.engine, served.version, served.weights, now, now))


def _within(write: Write, start: float, end: float) -> Write:
    """Return a write as it looks between two moments at which all memory of it may have been lost."""
    outcome = "unknown" if write.ended > end and write.outcome == "committed" else write.outcome
    if write.started >= start or start == -math.inf or write.outcome == "aborted":
        return write._replace(outcome=outcome)
    return write._replace(started=start, ended=math.inf, outcome="unknown")
