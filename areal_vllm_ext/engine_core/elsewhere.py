"""What other users of an engine have done to it through vLLM's own interfaces, as its participant takes it. No I/O.

The engine's loop has carried these calls out (``foreign_calls.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..protocol import SleepTag
    from .effects import Effect
    from .participant import Participant


def resumed(p: Participant) -> list[Effect]:
    """Another user has resumed the engine; if its weights must not be served, pause it again."""
    p.pauses.resumed_elsewhere()
    unfit = (p.tainted or p.stale) and p.generation == "running"
    return [p.pauses.pause_for_weights()] if unfit else []


def weights_changed(p: Participant, what: str) -> list[Effect]:
    """Another user has changed the weights or their version by ``what``: an update in flight cannot build on them."""
    p.foreign = (
        f"the weights are foreign: {what} was called through vLLM, not through this package; send an update to bring this "
        "engine back to the group's version"
    )
    return p.fail_before_commit(f"{what} was called through vLLM during the update; send it again")


def waits(p: Participant, what: str) -> list[Effect]:
    """Another user has called ``what``, which waits until the update in flight has ended."""
    if p.update:
        p.update.delayed.append(what)
    return []


def slept(p: Participant, asleep: Iterable[SleepTag], level: int, *, ran: bool) -> list[Effect]:
    """Another user has put the engine to sleep; ``ran``: it generated before."""
    p.sleep.moved_elsewhere(asleep, level)
    p.pauses.runs_when_awake = p.pauses.runs_when_awake or ran
    p.discarded(level)
    return p.fail_before_commit(p.sleep.reason) if p.sleep.reason else []


def woke(p: Participant, asleep: Iterable[SleepTag]) -> list[Effect]:
    """Another user has woken the engine up; ``asleep``: what is not on the device yet."""
    p.sleep.moved_elsewhere(asleep)
    return []
