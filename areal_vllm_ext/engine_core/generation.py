"""Whether an engine generates: the pause and resume half of ``participant.py``. No I/O, no clock.

    RUNNING ──pause──▶ PAUSING ──engine idle──▶ PAUSED ──resume──▶ RESUMING ──▶ RUNNING

The participant decides whether a pause or a resume is allowed, because that depends on the update. This machine decides
which calls to the engine follow, who waits for them, and for whom the engine is paused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol import Ack, Answer, Error
from .effects import CallCancelPause, CallPause, CallResume, Effect, Reply

if TYPE_CHECKING:
    from ..protocol import Generation, KeepPaused, Pause, PauseMode
    from ..protocol.server import ReplyTo

# Sentinel for ``paused_for``: paused because the weights are stale or tainted, not for an update.
STALE = "stale"


class GenerationMachine:
    """The pauses of one engine.

    Attributes:
        state: what generation does.
        mode: of the pause; None while the engine runs.
        paused_for: the update that needs the pause, ``STALE``, or empty: running, or a user's own pause. A user pauses
            through this package, or by one of vLLM's own calls.
        runs_when_awake: the engine ran before it was paused to sleep, so the client that wakes it up resumes it.
        orphaned: the engine is in a user's own pause, and its holder was silent for longer than the lease.
    """

    def __init__(self) -> None:
        self.state: Generation = "running"
        self.mode: PauseMode | None = None
        self.paused_for = ""
        self.runs_when_awake = False
        self.orphaned = False
        self._cache_cleared = False
        self._paused_before = False
        self._hold_ended = False  # a user's pause has ended, but the engine stayed paused because of its weights
        self._holder = ""
        self._lease_ends = float("inf")
        self._call = 0
        self._ends = 0.0
        self._called_for = ""  # the update of the last call to pause
        self._pause_waiting: dict[ReplyTo, str] = {}  # and the update that each one pauses for
        self._resume_waiting: dict[ReplyTo, bool] = {}  # and whether each one lifts a user's own pause
        self._last_resume = CallResume(0)

    # Requests that the participant allowed

    def pause(self, caller: ReplyTo, message: Pause, now: float) -> list[Effect]:
        """Pause; ``caller`` is answered when the engine is idle."""
        clear = message.kv == "recompute"
        # A user's own pause outlasts the updates that come during it.
        if self.state == "running" or not message.update:
            self.paused_for, self._hold_ended = message.update, False
            self._hold(message.holder, message.lease, now)
            self.runs_when_awake = message.to_sleep
        # An update needs a call of its own, because only the engine's loop knows that no other user has resumed meanwhile.
        same = self.state != "running" and self._called_for == message.update
        same = same and self.mode == message.mode and (self._cache_cleared or not clear)
        if same and self.state == "paused":
            return [Reply(caller, Ack())]
        self._pause_waiting[caller] = message.update
        self._ends = now + message.timeout
        # The ranks of an MoE group pause by consent, in rounds. So whether a request starts a new round depends only on
        # earlier requests, never on this rank's progress; otherwise one rank could wait for a round alone.
        if same:
            return []
        self._paused_before = self.state == "paused" or (self.state == "pausing" and self._paused_before)
        root = message.update if message.kv != "reuse" else ""
        return [self._pause(message.mode, message.update, clear=clear, users=not message.update, root=root)]

    def keep_paused(self, message: KeepPaused, now: float) -> bool:
        """Renew the lease of ``message.holder``'s own pause; return False if there is no such pause."""
        if self.state == "running" or self.paused_for or self._holder != message.holder:
            return False
        self._hold(message.holder, message.lease, now)
        return True

    def resume(self, caller: ReplyTo, *, lifts: bool) -> list[Effect]:
        """Resume; ``caller`` is answered when the engine runs. Unless it ``lifts`` all pauses, a user's own stands."""
        if self.state == "running":
            return [Reply(caller, Ack())]
        self._resume_waiting[caller] = lifts
        if self.state == "resuming":
            return []
        return [
            *self._answer_pauses(Error(kind="state", message="a resume cancelled the pause")),
            self.resume_unasked(lifts=lifts),
        ]

    # What the participant does on its own

    def resume_unasked(self, *, lifts: bool = False) -> CallResume:
        """Resume although no client asks for it."""
        self._call += 1
        self.state = "resuming"
        self._last_resume = CallResume(self._call, lifts or self._hold_ended, asked=lifts)
        return self._last_resume

    def pause_for_weights(self) -> CallPause:
        """Pause until an update commits, because these weights must not be served."""
        self.paused_for = STALE
        self._paused_before = False
        return self._pause("keep", STALE, clear=False, users=False)

    def end_hold(self) -> None:
        """End the user's pause but stay paused: the weights are stale or tainted, so resume when an update commits."""
        if not self.paused_for:
            self.paused_for, self._hold_ended = STALE, True
        self._hold("", 0, 0)

    def refuse_pauses_for(self, update: str, answer: Answer) -> list[Effect]:
        """Answer those who wait for a pause for ``update``: this engine could no longer commit it."""
        callers = [caller for caller, wanted in self._pause_waiting.items() if wanted == update]
        for caller in callers:
            del self._pause_waiting[caller]
        return [Reply(caller, answer) for caller in callers]

    # Completed calls

    def pause_done(self, call: int, error: str) -> list[Effect]:
        """The engine completed a pause, or failed to."""
        if call != self._call or self.state != "pausing":
            return []
        if error and not self._paused_before:
            self._runs()
        else:
            self.state = "paused"
        return self._answer_pauses(_outcome(error))

    def resume_done(self, call: int, error: str, *, paused: bool = False) -> list[Effect]:
        """The engine runs again, or failed to resume, or stays ``paused`` for a user or because it sleeps."""
        if call != self._call or self.state != "resuming":
            return []
        asked, last = any(self._resume_waiting.values()), self._last_resume
        if paused and ((asked and not last.asked) or (self._hold_ended and not last.lifts)):
            return [self.resume_unasked(lifts=asked)]
        if error or paused:
            self.state = "paused"
            if not error:
                self.paused_for, self._hold_ended = "", False
        else:
            self._runs()
        return self._answer_resumes(_outcome(error))

    def cancel_done(self, call: int, cancelled: bool) -> list[Effect]:
        """A pause that took too long was cancelled; or it had completed after all, and then it stands."""
        if call != self._call or self.state != "resuming":
            return []
        if cancelled:
            self._runs()
            return self._answer_resumes(Ack())
        if not self._resume_waiting:
            self.state = "paused"
            return []
        return [self.resume_unasked(lifts=any(self._resume_waiting.values()))]

    # Calls of other users, through vLLM's own interfaces

    def observed(self, scheduler_paused: bool | None) -> Generation:
        """Return what generation does, given what vLLM's scheduler does: between two calls of ours, that counts."""
        if scheduler_paused is None or self.state in ("pausing", "resuming"):
            return self.state
        return "paused" if scheduler_paused else "running"

    def paused_elsewhere(self) -> list[Effect]:
        """Another user has paused the engine: a user's own pause, without a lease."""
        self._paused_before = self._paused_before or self.state == "pausing"
        if self.state == "running":
            self.state, self.mode, self._called_for = "paused", None, ""
        self.paused_for, self._hold_ended, self.runs_when_awake = "", False, False
        self._hold("", 0, 0)
        return []

    def resumed_elsewhere(self) -> None:
        """Another user has resumed the engine, which the guard allowed."""
        if self.state == "paused" and not self.paused_for:
            self._runs()
        elif self.state == "pausing":  # our call came later, and pauses again
            self._paused_before, self.paused_for = False, self._called_for

    def resume_refused_elsewhere(self) -> list[Effect]:
        """Another user's resume was refused because of the weights: it still ends that user's own pause."""
        self.end_hold()
        return []

    # Time

    def tick(self, now: float, *, stands: bool = False) -> list[Effect]:
        """Cancel a pause that is over its time, and see whether a user's pause is orphaned.

        A pause that ``stands`` is not cancelled, because these weights must not be served. Only its callers are refused.
        """
        self.orphaned = self.state != "running" and not self.paused_for and now >= self._lease_ends
        if self.state != "pausing" or not self._pause_waiting or now < self._ends:
            return []
        late = Error(kind="timeout", message="the engine did not become idle in time; the pause was cancelled")
        effects = self._answer_pauses(late)
        if stands:
            self.paused_for = self.paused_for and STALE
        # Where an earlier pause was complete it stands, and this one joins it late.
        elif not self._paused_before:
            self._call += 1
            self.state = "resuming"
            effects.append(CallCancelPause(self._call))
        return effects

    def _pause(self, mode: PauseMode, called_for: str, *, clear: bool, users: bool, root: str = "") -> CallPause:
        self._call += 1
        self.state, self.mode, self._cache_cleared, self._called_for = "pausing", mode, clear, called_for
        return CallPause(self._call, mode, clear, users, root)

    def _hold(self, holder: str, lease: float, now: float) -> None:
        self._holder, self.orphaned = holder, False
        self._lease_ends = now + lease if lease else float("inf")

    def _runs(self) -> None:
        self.state, self.mode, self.paused_for, self._hold_ended = "running", None, "", False
        self.runs_when_awake = False
        self._hold("", 0, 0)

    def _answer_pauses(self, answer: Answer) -> list[Effect]:
        callers, self._pause_waiting = self._pause_waiting, {}
        return [Reply(caller, answer) for caller in callers]

    def _answer_resumes(self, answer: Answer) -> list[Effect]:
        callers, self._resume_waiting = self._resume_waiting, {}
        return [Reply(caller, answer) for caller in callers]


def _outcome(error: str) -> Answer:
    return Error(kind="failed", message=error) if error else Ack()
