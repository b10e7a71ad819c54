"""Check a history: do all engines behave like one register of weights?

Every update is a write. Every answered request is a read: an engine served a version from ``started`` to ``ended``, and its
tokens prove which weights it used. The history must be linearizable: there is an order of all writes and reads in which each
read returns the latest write, and which keeps the order of operations that did not overlap. So once any engine has served
a version, and once its update has returned, no engine serves an older version.

Versions are unique, so linearizability is decided by zones (Gibbons and Korach, *Testing Shared Memories*, 1997). The zone of
a version spans the earliest end and the latest start of its write and reads. If the end comes first (a forward zone), the
register must hold the version throughout. Otherwise (a backward zone) there must be some moment between the two.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

Outcome = Literal["committed", "aborted", "unknown"]


class Write(NamedTuple):
    """An update.

    Attributes:
        outcome: ``aborted``: no engine may ever serve the version; ``unknown``: engines may serve it, also much later.
    """

    version: object
    started: float
    ended: float
    outcome: Outcome


class Read(NamedTuple):
    """An answered request, or the part of it that was served under one version.

    Attributes:
        version: the version that the engine claims.
        proven: the version whose weights made the tokens; None if the tokens fit no version.
    """

    engine: str
    version: object
    proven: object
    started: float
    ended: float


class Zone(NamedTuple):
    """The span in which a register must hold, or may hold, a version."""

    version: object
    first_end: float
    last_start: float

    @property
    def forward(self) -> bool:
        """Whether the register must hold the version from ``first_end`` to ``last_start``."""
        return self.first_end < self.last_start

    @property
    def low(self) -> float:
        return min(self.first_end, self.last_start)

    @property
    def high(self) -> float:
        return max(self.first_end, self.last_start)


def problems(writes: Sequence[Write], reads: Sequence[Read]) -> list[str]:
    """Return what is wrong with a history; empty if all engines behave like one register.

    The weights of the start are a write like any other, which ended before everything else.

    Raises:
        ValueError: two writes have one version, so the history cannot be judged.
    """
    by_version = {write.version: write for write in writes}
    if len(by_version) != len(writes):
        raise ValueError("two writes have the same version")
    found = [*_wrong_reads(by_version, reads)]
    return found or [*_overlaps(_zones(by_version, reads))]


def _wrong_reads(writes: dict[object, Write], reads: Iterable[Read]) -> Iterable[str]:
    for read in reads:
        write = writes.get(read.version)
        told = f"{read.engine} served {read.version} from {read.started:.3f} to {read.ended:.3f}"
        if read.proven != read.version:
            weights = "of no version" if read.proven is None else f"of {read.proven}"
            yield f"{told}, but the tokens are {weights}"
        elif write is None:
            yield f"{told}, which no update brought"
        elif write.outcome == "aborted":
            yield f"{told}, but that update was aborted"
        elif read.ended < write.started:
            yield f"{told}, before its update began at {write.started:.3f}"


def _zones(writes: dict[object, Write], reads: Iterable[Read]) -> list[Zone]:
    by_version: dict[object, list[Read]] = collections.defaultdict(list)
    for read in reads:
        by_version[read.version].append(read)
    zones = []
    for version, write in writes.items():
        seen = by_version[version]
        if write.outcome == "aborted" or (write.outcome == "unknown" and not seen):
            continue  # no engine served it, so it need not have happened
        ends = [math.inf if write.outcome == "unknown" else write.ended, *(read.ended for read in seen)]
        zones.append(Zone(version, min(ends), max(write.started, *(read.started for read in seen), write.started)))
    return zones


def _overlaps(zones: Iterable[Zone]) -> Iterable[str]:
    """Yield each pair of zones that no order of the versions can satisfy."""
    forward = sorted((zone for zone in zones if zone.forward), key=lambda zone: zone.low)
    for one, other in itertools.pairwise(forward):
        if other.low < one.high:
            yield (
                f"{one.version} was current until {one.high:.3f} (from {one.low:.3f}), but {other.version} was current "
                f"at {other.low:.3f} (until {other.high:.3f})"
            )
    for zone in zones:
        if zone.forward:
            continue
        for held in forward:
            if held.low < zone.low and zone.high < held.high:
                yield (
                    f"{zone.version} was current between {zone.low:.3f} and {zone.high:.3f}, when {held.version} was "
                    f"(from {held.low:.3f} to {held.high:.3f})"
                )
