"""vLLM's own weight transfer on one engine: when its weights are tainted, and which version they are. No I/O, no clock.

vLLM loads into the live model, piece by piece, so nothing can be taken back. From the start of a session until every worker has
finished, the weights are tainted: no resume runs the engine, whoever asks. A session that ends in an error stays tainted
until another update, by whichever way, succeeds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..protocol import Error, transfer_steps

if TYPE_CHECKING:
    from ..protocol import Call, CallAnswer, Version
    from .participant import Participant

_LOADED = "vLLM's weight transfer"
# An error in one of these leaves weights that are half loaded.
_LOADING = (transfer_steps.START, transfer_steps.UPDATE, transfer_steps.FINISH)


class NativeTransfer:
    """The session of one engine, if any."""

    def __init__(self, participant: Participant) -> None:
        self._participant = participant
        self._epoch: int | None = None  # of the session; None while there is none

    def ask(self, message: Call) -> Error | None:
        """Take a step before the workers do; return why it is refused."""
        step = message.method
        if step not in transfer_steps.STEPS:
            return None
        participant = self._participant
        if message.epoch is None:
            return Error(kind="state", message=f"{transfer_steps.name_of(step)} needs the group's lease")
        if step == transfer_steps.START:
            if participant.update is not None:
                return Error(kind="busy", message="an update is in flight on this engine")
            if participant.generation != "paused" or not participant.joined:
                return Error(kind="state", message=f"generation is {participant.generation}, not paused")
            self._epoch = message.epoch
            participant.tainted = (
                "vLLM's weight transfer has begun to load into the live model, and has not finished on this engine"
            )
        elif step in (transfer_steps.UPDATE, transfer_steps.FINISH) and self._epoch != message.epoch:
            return Error(kind="state", message="no session of vLLM's weight transfer has been started here: start one")
        return None

    def done(self, step: str, arguments: bytes, workers: tuple[CallAnswer, ...], error: str) -> None:
        """Take the workers' answers to a step. If all have finished, the engine serves the new version."""
        if step not in _LOADING or self._epoch is None:
            return
        participant = self._participant
        problem = error or next((f"worker {one.rank}: {one.error}" for one in workers if one.error_type), "")
        if problem:
            participant.tainted = f"vLLM's weight transfer failed at {transfer_steps.name_of(step)}: {problem}"
            self._epoch = None
        elif step == transfer_steps.FINISH:
            participant.tainted = participant.stale = participant.foreign = participant.error = ""
            participant.weights, participant.loaded = "", _LOADED
            participant.unproven = "vLLM's weight transfer compares nothing with what was sent"
            participant.committed_epoch, participant.version = self._epoch, version_of(arguments)
            participant.last_update = f"transfer {self._epoch}"
            self._epoch = None


def version_of(arguments: bytes) -> Version:
    """Return the version that a ``FINISH`` brings."""
    (version,) = msgspec.msgpack.decode(arguments, type=tuple[int | str])
    return version
