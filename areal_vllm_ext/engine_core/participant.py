"""An engine's side of pause and update: a state machine with no I/O, no clock and no randomness.

    phase:  IDLE ──Begin──▶ RECEIVING ──Prepare, all workers yes──▶ PREPARED ──Commit──▶ COMMITTING ──▶ IDLE (new version)
              ▲                 │ Abort, timeout, worker error          │ Abort, timeout     │ a worker failed
              └─────────────────┴───────────────────────────────────────┘                    └──▶ IDLE, tainted
    flow:   RUNNING ──Pause──▶ PAUSING ──engine idle──▶ PAUSED ──Resume──▶ RESUMING ──▶ RUNNING

Messages, completed calls and clock readings go in; effects come out, for ``endpoint.py`` to carry out in order. Rules:

- A request with an epoch lower than the highest seen is refused (``fenced``).
- A pause for an update needs PREPARED, and Commit needs PREPARED and PAUSED. So an engine that is PREPARED but was never
  paused knows that nobody committed, and gives up by itself when its time is over; one that is PREPARED and PAUSED waits
  for the coordinator or its successor.
- A repeated request is answered like the first one and done once.
- An engine whose commit failed is tainted: its weights are nobody's. It stays paused until a later update commits.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from ..protocol import (
    EPOCH_JUMP,
    Abort,
    Ack,
    Answer,
    Begin,
    Bucket,
    Commit,
    Error,
    ErrorKind,
    Pause,
    PauseMode,
    Prepare,
    Resume,
    Version,
    WorkerDone,
    WorkerOrder,
)

if TYPE_CHECKING:
    from ..wire import Caller

Phase = Literal["idle", "receiving", "prepared", "committing"]
Flow = Literal["running", "pausing", "paused", "resuming"]

ParticipantRequest = Pause | Resume | Begin | Bucket | Prepare | Commit | Abort


@dataclasses.dataclass(frozen=True)
class Reply:
    """Answer a request."""

    caller: Caller
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Order:
    """Send ``message`` to every worker of the engine."""

    message: WorkerOrder


@dataclasses.dataclass(frozen=True)
class CallPause:
    """Pause the engine; report to ``pause_done`` with ``call``."""

    call: int
    mode: PauseMode
    clear_cache: bool


@dataclasses.dataclass(frozen=True)
class CallResume:
    """Resume the engine, also from a pause that has not completed; report to ``resume_done`` with ``call``."""

    call: int


@dataclasses.dataclass(frozen=True)
class CallCancelPause:
    """Take a pause back unless it has completed meanwhile; report to ``cancel_done`` with ``call``."""

    call: int


@dataclasses.dataclass(frozen=True)
class CallCommit:
    """Switch every worker to the staged weights and set the engine's version; report to ``commit_done``."""

    update: str
    version: Version


Effect = Reply | Order | CallPause | CallResume | CallCancelPause | CallCommit


@dataclasses.dataclass
class _Update:
    """The update under way."""

    begin: Begin
    ends: float
    failure: str = ""
    # Who waits for which step ("begin", "bucket 3", "prepare"), and which workers have finished it.
    waiting: dict[str, list[Caller]] = dataclasses.field(default_factory=dict)
    finished: dict[str, set[int]] = dataclasses.field(default_factory=dict)


class Participant:
    """The state machine of one engine. ``workers`` are the ranks whose word every step needs."""

    def __init__(self, version: Version, workers: frozenset[int], epoch: int = 0) -> None:
        self.version = version
        self.workers = workers
        self.epoch = epoch
        self.phase: Phase = "idle"
        self.flow: Flow = "running"
        self.pause_mode: PauseMode | None = None
        self._cache_cleared = False
        self._paused_before = False
        self.update: _Update | None = None
        self.last_update = ""
        self.paused_for = ""
        self.error = ""
        self.tainted = ""
        self._call = 0
        self._pause_ends = 0.0
        self._pause_waiting: list[Caller] = []
        self._resume_waiting: list[Caller] = []
        self._commit_waiting: list[Caller] = []

    # Requests

    def handle(self, caller: Caller, message: ParticipantRequest, now: float) -> list[Effect]:
        """A request came; returns what to do."""
        if refusal := self.fence(message.epoch):
            return [Reply(caller, refusal)]
        match message:
            case Pause():
                return self._pause(caller, message, now)
            case Resume():
                return self._resume(caller)
            case Begin():
                return self._begin(caller, message, now)
            case Bucket():
                return self._step(caller, message, f"bucket {message.index}")
            case Prepare():
                return self._step(caller, message, "prepare")
            case Commit():
                return self._commit(caller, message)
            case Abort():
                return self._abort(caller, message)

    def fence(self, epoch: int) -> Error | None:
        """Obey ``epoch`` and higher ones from now on; returns the refusal of a lower one."""
        if epoch < self.epoch:
            return Error(
                kind="fenced",
                epoch=self.epoch,
                message=f"this request is of epoch {epoch}, but a newer client (epoch {self.epoch}) commands this engine now",
            )
        if epoch > self.epoch + EPOCH_JUMP:
            return Error(
                kind="fenced",
                epoch=self.epoch,
                message=f"epoch {epoch} is no lease's: it is too far above {self.epoch}, the highest that this engine has seen",
            )
        self.epoch = epoch
        return None

    def _refuse(self, caller: Caller, kind: ErrorKind, message: str) -> list[Effect]:
        return [Reply(caller, Error(kind=kind, message=message, epoch=self.epoch))]

    def _pause(self, caller: Caller, message: Pause, now: float) -> list[Effect]:
        if self.flow == "resuming":
            return self._refuse(caller, "busy", "the engine is resuming")
        held = self.update.begin.update if self.update and self.phase == "prepared" else ""
        if message.update and message.update != held:
            # A second vote: the coordinator commits once all have paused, so this engine must still be able to.
            return self._refuse(caller, "state", self.error or f"update {message.update} is not prepared here")
        clear = message.kv == "recompute"
        # A pause of the user's own outlasts the updates that come in it.
        if self.flow == "running" or not message.update:
            self.paused_for = message.update
        same = self.flow != "running" and self.pause_mode == message.mode and (self._cache_cleared or not clear)
        if same and self.flow == "paused":
            return [Reply(caller, Ack())]
        self._pause_waiting.append(caller)
        self._pause_ends = now + message.timeout
        # The ranks of an MoE group pause by consent, in rounds. Whether a request starts a new round depends only on what
        # was asked before, never on how far this rank has come: otherwise one rank could wait for a round alone.
        if same:
            return []
        self._call += 1
        self._paused_before = self.flow == "paused" or (self.flow == "pausing" and self._paused_before)
        self.flow, self.pause_mode, self._cache_cleared = "pausing", message.mode, clear
        return [CallPause(self._call, message.mode, clear)]

    def _resume(self, caller: Caller) -> list[Effect]:
        if self.phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing an update")
        if self.tainted:
            return self._refuse(caller, "state", f"the weights are tainted ({self.tainted}): send another update")
        if self.flow == "running":
            return [Reply(caller, Ack())]
        self._resume_waiting.append(caller)
        if self.flow == "resuming":
            return []
        effects: list[Effect] = [
            Reply(waiting, Error(kind="state", message="the pause was taken back by a resume"))
            for waiting in self._pause_waiting
        ]
        self._pause_waiting.clear()
        self._call += 1
        self.flow = "resuming"
        return [*effects, CallResume(self._call)]

    def _begin(self, caller: Caller, message: Begin, now: float) -> list[Effect]:
        if self.phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing an update")
        if self.update and self.update.begin.update == message.update:
            return self._wait_for_workers(caller, self.update, "begin", [])
        if self.phase == "prepared" and self.flow != "running":
            return self._refuse(caller, "state", "an update is in doubt on this engine: commit or abort it first")
        effects = self._give_up("a newer update began") if self.update else []
        self.update = _Update(message, ends=now + message.timeout)
        self.phase = "receiving"
        return [*effects, *self._wait_for_workers(caller, self.update, "begin", [Order(message)])]

    def _step(self, caller: Caller, message: Bucket | Prepare, step: str) -> list[Effect]:
        update = self.update
        if update is None or update.begin.update != message.update:
            return self._refuse(caller, "state", self.error or f"update {message.update} is not under way here")
        return self._wait_for_workers(caller, update, step, [Order(message)])

    def _wait_for_workers(self, caller: Caller, update: _Update, step: str, orders: list[Effect]) -> list[Effect]:
        """Answer when every worker has finished ``step``; ``orders`` go out the first time only."""
        if update.failure:
            return self._refuse(caller, "failed", update.failure)
        if update.finished.get(step, set()) >= self.workers:
            return [Reply(caller, Ack())]
        asked_before = step in update.waiting
        update.waiting.setdefault(step, []).append(caller)
        return [] if asked_before else orders

    def _commit(self, caller: Caller, message: Commit) -> list[Effect]:
        if message.update == self.last_update:
            return [Reply(caller, Ack())]
        if self.update is None or self.update.begin.update != message.update:
            return self._refuse(caller, "state", self.error or f"update {message.update} is not under way here")
        if self.phase == "committing":
            self._commit_waiting.append(caller)
            return []
        if self.phase != "prepared" or self.flow != "paused":
            return self._refuse(
                caller, "state", f"commit needs a prepared, paused engine; this one is {self.phase}, {self.flow}"
            )
        self.phase = "committing"
        self._commit_waiting = [caller]
        return [CallCommit(message.update, self.update.begin.version)]

    def _abort(self, caller: Caller, message: Abort) -> list[Effect]:
        if message.update == self.last_update:
            return self._refuse(caller, "state", f"update {message.update} is committed here")
        if self.update is None or self.update.begin.update != message.update:
            return [Reply(caller, Ack())]
        if self.phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing this update")
        return [*self._give_up(message.reason), Reply(caller, Ack())]

    def _give_up(self, reason: str) -> list[Effect]:
        """Back to IDLE with the old weights, which were never touched."""
        assert self.update is not None
        update, self.update, self.phase = self.update, None, "idle"
        self.error = f"update {update.begin.update} (version {update.begin.version}) was given up: {reason}"
        order = Order(Abort(epoch=self.epoch, update=update.begin.update, reason=reason))
        return [order, *self._answer_all(update, Error(kind="failed", message=reason))]

    def _answer_all(self, update: _Update, answer: Answer) -> list[Effect]:
        callers = [caller for waiting in update.waiting.values() for caller in waiting]
        update.waiting.clear()
        return [Reply(caller, answer) for caller in callers]

    # What the workers say

    def worker_done(self, message: WorkerDone) -> list[Effect]:
        """A worker finished a step of the update, or failed."""
        update = self.update
        if update is None or update.begin.update != message.update or self.phase == "committing":
            return []
        if message.error:
            # Kept until the coordinator aborts: whatever it asks meanwhile is answered with the cause.
            update.failure = update.failure or f"worker {message.rank}: {message.error}"
            self.phase = "receiving"
            return self._answer_all(update, Error(kind="failed", message=update.failure))
        finished = update.finished.setdefault(message.step, set())
        finished.add(message.rank)
        if not finished >= self.workers:
            return []
        if message.step == "prepare" and not update.failure:
            self.phase = "prepared"
        return [Reply(caller, Ack()) for caller in update.waiting.pop(message.step, [])]

    # Completed calls

    def pause_done(self, call: int, error: str) -> list[Effect]:
        """The engine completed a pause, or failed to."""
        if call != self._call or self.flow != "pausing":
            return []
        if error and not self._paused_before:
            self._runs()
        else:
            self.flow = "paused"
        answer: Answer = Error(kind="failed", message=error) if error else Ack()
        callers, self._pause_waiting = self._pause_waiting, []
        return [Reply(caller, answer) for caller in callers]

    def resume_done(self, call: int, error: str) -> list[Effect]:
        """The engine runs again, or failed to resume."""
        if call != self._call or self.flow != "resuming":
            return []
        if error:
            self.flow = "paused"
        else:
            self._runs()
        answer: Answer = Error(kind="failed", message=error) if error else Ack()
        callers, self._resume_waiting = self._resume_waiting, []
        return [Reply(caller, answer) for caller in callers]

    def cancel_done(self, call: int, cancelled: bool) -> list[Effect]:
        """A pause that took too long was taken back; or it had completed after all, and then it stands."""
        if call != self._call or self.flow != "resuming":
            return []
        if cancelled:
            self._runs()
            callers, self._resume_waiting = self._resume_waiting, []
            return [Reply(caller, Ack()) for caller in callers]
        if not self._resume_waiting:
            self.flow = "paused"
            return []
        self._call += 1
        return [CallResume(self._call)]

    def _runs(self) -> None:
        self.flow, self.pause_mode, self.paused_for = "running", None, ""

    def commit_done(self, error: str, seconds: float) -> list[Effect]:
        """Every worker switched, or one failed and left weights that nobody can vouch for."""
        assert self.update is not None
        update, self.update, self.phase = self.update, None, "idle"
        answer: Answer
        if error:
            self.tainted = f"commit of update {update.begin.update} failed: {error}"
            answer = Error(kind="failed", message=self.tainted)
        else:
            self.tainted, self.error = "", ""
            self.version, self.last_update = update.begin.version, update.begin.update
            answer = Ack(seconds=seconds)
        callers, self._commit_waiting = self._commit_waiting, []
        return [Reply(caller, answer) for caller in callers]

    # Time

    def tick(self, now: float) -> list[Effect]:
        """Time passed: give up what is over its time."""
        effects: list[Effect] = []
        if self.flow == "pausing" and self._pause_waiting and now >= self._pause_ends:
            waited = Error(kind="timeout", message="the engine did not become idle in time, the pause was taken back")
            effects += [Reply(caller, waited) for caller in self._pause_waiting]
            self._pause_waiting.clear()
            # Where an earlier pause was complete it stands, and this one joins it late.
            if not self._paused_before:
                self._call += 1
                self.flow = "resuming"
                effects.append(CallCancelPause(self._call))
        in_doubt = self.phase == "committing" or (self.phase == "prepared" and self.flow != "running")
        if self.update and not in_doubt and now >= self.update.ends:
            effects += self._give_up("its time was over before it was committed")
        return effects
