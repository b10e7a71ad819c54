"""What an engine says about itself, out of its state machine. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol import Status

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
        orphaned=participant.pauses.orphaned,
        requests_running=running,
        requests_waiting=waiting,
        waiting_for_engine=waiting_for_engine,
        error=participant.tainted
        or participant.stale
        or participant.foreign
        or participant.asleep
        or participant.error,
        weights="" if participant.foreign else participant.weights,
        loaded=participant.loaded,
        unproven=participant.unproven,
        asleep=bool(participant.asleep),
    )
