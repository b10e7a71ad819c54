"""What an engine tells others, out of its state machine: its status, its heartbeat and its guard. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol import Register, Status
from .effects import Guard
from .generation import STALE

if TYPE_CHECKING:
    from ..protocol import EngineInfo, UpdatePhase
    from .participant import Participant


def status_of(
    participant: Participant,
    engine: EngineInfo,
    running: int = 0,
    waiting: int = 0,
    waiting_for_engine: float = 0.0,
    scheduler_paused: bool | None = None,
) -> Status:
    """Return what an engine says about itself.

    Args:
        participant: its state machine.
        engine: who it is.
        running: requests that run.
        waiting: requests that wait.
        waiting_for_engine: seconds since the oldest call that the engine's loop has not come to.
        scheduler_paused: what vLLM's scheduler does; None if it cannot be asked.
    """
    phase: UpdatePhase = participant.update_phase
    if phase == "idle" and (participant.tainted or participant.stale or participant.foreign):
        phase = "tainted" if participant.tainted else "stale" if participant.stale else "foreign"
    return Status(
        engine=engine,
        version=participant.version,
        update_phase=phase,
        generation=participant.pauses.observed(scheduler_paused),
        pause_mode=participant.pauses.mode,
        paused_for=participant.pauses.paused_for,
        epoch=participant.epoch,
        update=participant.update.begin.update if participant.update else "",
        last_update=participant.last_update,
        committed_epoch=participant.committed_epoch,
        orphaned=participant.orphaned,
        requests_running=running,
        requests_waiting=waiting,
        waiting_for_engine=waiting_for_engine,
        error=participant.tainted
        or "; ".join(filter(None, (participant.stale, participant.stale and participant.fetching)))
        or participant.foreign
        or participant.sleep.reason
        or participant.error,
        weights="" if participant.foreign else participant.weights,
        loaded=participant.loaded,
        unproven=participant.unproven,
        sleep=participant.sleep.state,
        free_memory=participant.sleep.free_memory,
        runs_when_awake=participant.pauses.runs_when_awake,
        adapters=participant.adapters,
        draft_version=participant.draft_version,
    )


def guard_of(participant: Participant) -> Guard:
    """Return what other users of an engine must not do now, because it is paused for an update or must not be served."""
    update = ""
    if (
        participant.update_phase == "committing"
        or participant.in_doubt
        or participant.pauses.paused_for not in ("", STALE)
    ):
        update = "an update is being committed on this engine"
    elif participant.pauses.state == "pausing":
        update = "this engine is being paused"
    tainted, stale = participant.tainted, participant.stale
    unfit = f"tainted ({tainted})" if tainted else f"stale ({stale})" if stale else ""
    return Guard(update, f"its weights are {unfit}" if unfit else "")


def beat_of(participant: Participant, engine: EngineInfo) -> Register:
    """Return what an engine tells the directory every second."""
    return Register(
        engine=engine,
        epoch=max(participant.epoch, participant.group_epoch),
        version=participant.version,
        committed_epoch=participant.committed_epoch,
        needs_recovery=participant.needs_recovery,
        stale=bool(participant.stale),
    )
