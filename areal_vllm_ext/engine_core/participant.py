"""An engine's side of pause and update: a state machine with no I/O, no clock and no randomness.

    phase:  IDLE ──Begin──▶ RECEIVING ──Prepare, all workers yes──▶ PREPARED ──Commit──▶ COMMITTING ──▶ IDLE (new version)
              ▲                 │ Abort, timeout, worker error          │ Abort, timeout     │ a worker failed
              └─────────────────┴───────────────────────────────────────┘                    └──▶ IDLE, tainted
    generation:   RUNNING ──Pause──▶ PAUSING ──engine idle──▶ PAUSED ──Resume──▶ RESUMING ──▶ RUNNING

Messages, completed calls and clock readings go in; effects come out, for ``endpoint.py`` to carry out in order. Rules:

- A request with an epoch lower than the highest seen is refused (``fenced``).
- A pause for an update needs PREPARED, and Commit needs PREPARED and PAUSED. So an engine that is PREPARED but was never
  paused knows that nobody committed, and gives up by itself when its time is over; one that is PREPARED and PAUSED waits
  for the coordinator or its successor.
- A repeated request is answered like the first one and done once.
- An update without staging (``none``) pauses before its first byte, and loads as the bytes come. From then on the old weights
  are gone: until it is committed the engine is tainted, and giving it up leaves it so.
- An engine whose commit failed is tainted: its weights are nobody's. It stays paused until a later update commits. So is one
  whose worker finds afterwards that it serves other weights than it was sent: it pauses.
- An engine that hears from the directory that the group has agreed on a later update than its own is stale: it was
  restarted, or lost in a commit. It pauses, and stays paused until an update commits.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from ..errors import SEND_AGAIN
from ..protocol import (
    EPOCH_JUMP,
    Abort,
    Ack,
    AdoptEpoch,
    Answer,
    Begin,
    Bucket,
    Commit,
    EngineInfo,
    Error,
    ErrorKind,
    Generation,
    KeepPaused,
    Pause,
    PauseMode,
    Prepare,
    Register,
    Resume,
    Status,
    UpdatePhase,
    Version,
    WeightsMismatch,
    WorkerDone,
    WorkerOrder,
)

if TYPE_CHECKING:
    from ..protocol.server import ReplyTo

Phase = Literal["idle", "receiving", "prepared", "committing"]

ParticipantRequest = Pause | KeepPaused | Resume | Begin | Bucket | Prepare | Commit | Abort | AdoptEpoch

# In place of an update's name in ``paused_for``.
STALE = "stale"


@dataclasses.dataclass(frozen=True)
class Reply:
    """Answer a request."""

    caller: ReplyTo
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


@dataclasses.dataclass(frozen=True)
class CallLoad:
    """Load an update without staging into the live weights, as its bytes come; report to ``load_done``."""

    update: str
    version: Version


Effect = Reply | Order | CallPause | CallResume | CallCancelPause | CallCommit | CallLoad


@dataclasses.dataclass
class _Update:
    """The update under way."""

    begin: Begin
    ends: float
    failure: str = ""
    loading: bool = False
    loaded: bool = False
    manifest: str = ""
    # What all workers have, where each could do with what has changed since.
    base: str = ""
    # Who waits for which step ("begin", "prepare", a bucket's), which workers it is for where not all, and who has finished.
    waiting: dict[str, list[ReplyTo]] = dataclasses.field(default_factory=dict)
    workers: dict[str, frozenset[int]] = dataclasses.field(default_factory=dict)
    finished: dict[str, set[int]] = dataclasses.field(default_factory=dict)

    @property
    def in_place(self) -> bool:
        return self.begin.staging.kind == "none"


class Participant:
    """The state machine of one engine.

    Attributes:
        committed_epoch: the epoch of the update that brought ``version``; 0 for the weights that the engine was started with.
        paused_for: the update that it is paused for, ``stale``, or empty: running, or a user's own pause.
        orphaned: it is in a user's own pause, whose holder was not heard for longer than the lease.
        tainted: why its weights are nobody's; stale: why they are no longer the group's. Empty where they are.
    """

    def __init__(
        self, version: Version, workers: frozenset[int], epoch: int = 0, *, resume_orphans: bool = True
    ) -> None:
        """
        Args:
            version: of the weights that it serves.
            workers: the ranks whose word every step needs.
            epoch: the highest seen so far.
            resume_orphans: whether it is to run again when whoever paused it is gone.
        """
        self.version = version
        self.workers = workers
        self.epoch = epoch
        self.update_phase: Phase = "idle"
        self.generation: Generation = "running"
        self.pause_mode: PauseMode | None = None
        self._cache_cleared = False
        self._paused_before = False
        self.update: _Update | None = None
        self.last_update = ""
        self.weights = ""
        self.unproven = ""
        self.paused_for = ""
        self.error = ""
        self.tainted = ""
        self.stale = ""
        self.committed_epoch = 0
        self.orphaned = False
        self._resume_orphans = resume_orphans
        self._pause_holder = ""
        self._pause_lease_ends = float("inf")
        self._call = 0
        self._pause_ends = 0.0
        self._pause_waiting: list[ReplyTo] = []
        self._resume_waiting: list[ReplyTo] = []
        self._commit_waiting: list[ReplyTo] = []

    # Requests

    def handle(self, caller: ReplyTo, message: ParticipantRequest, now: float) -> list[Effect]:
        """A request came; returns what to do."""
        if isinstance(message, KeepPaused):
            return self._keep_paused(caller, message, now)
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
                return self._bucket(caller, message)
            case Prepare():
                return self._step(caller, message, "prepare")
            case Commit():
                return self._commit(caller, message)
            case Abort():
                return self._abort(caller, message)
            case AdoptEpoch():
                return self._agree(caller, message)

    @property
    def needs_recovery(self) -> bool:
        """Whether, were there no client, something would have to be settled here."""
        if self.update_phase != "idle":
            return True
        left_paused = self.generation != "running" and self.paused_for not in ("", STALE) and not self.tainted
        return self._resume_orphans and (self.orphaned or left_paused)

    def status(self, engine: EngineInfo, running: int = 0, waiting: int = 0, waiting_for_engine: float = 0.0) -> Status:
        """What the engine says of itself; ``running`` and ``waiting`` requests, and for how long its loop came to no call."""
        phase: UpdatePhase = self.update_phase
        if phase == "idle" and (self.tainted or self.stale):
            phase = "tainted" if self.tainted else "stale"
        return Status(
            engine=engine,
            version=self.version,
            update_phase=phase,
            generation=self.generation,
            pause_mode=self.pause_mode,
            paused_for=self.paused_for,
            epoch=self.epoch,
            update=self.update.begin.update if self.update else "",
            last_update=self.last_update,
            committed_epoch=self.committed_epoch,
            orphaned=self.orphaned,
            requests_running=running,
            requests_waiting=waiting,
            waiting_for_engine=waiting_for_engine,
            error=self.tainted or self.stale or self.error,
            weights=self.weights,
            unproven=self.unproven,
        )

    def beat(self, engine: EngineInfo) -> Register:
        """What the engine tells the directory every second."""
        return Register(
            engine=engine,
            epoch=self.epoch,
            version=self.version,
            committed_epoch=self.committed_epoch,
            needs_recovery=self.needs_recovery,
        )

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

    def _refuse(self, caller: ReplyTo, kind: ErrorKind, message: str) -> list[Effect]:
        return [Reply(caller, Error(kind=kind, message=message, epoch=self.epoch))]

    def _pause(self, caller: ReplyTo, message: Pause, now: float) -> list[Effect]:
        if self.generation == "resuming":
            return self._refuse(caller, "busy", "the engine is resuming")
        update = self.update
        ready = update and (
            self.update_phase == "prepared" or (update.in_place and not update.loading and not update.failure)
        )
        held = update.begin.update if update and ready else ""
        if message.update and message.update != held:
            # A second vote: the coordinator commits once all have paused, so this engine must still be able to.
            return self._refuse(caller, "state", self.error or f"update {message.update} is not prepared here")
        clear = message.kv == "recompute"
        # A pause of the user's own outlasts the updates that come in it.
        if self.generation == "running" or not message.update:
            self.paused_for = message.update
            self._hold(message.holder, message.lease, now)
        same = self.generation != "running" and self.pause_mode == message.mode and (self._cache_cleared or not clear)
        if same and self.generation == "paused":
            return [Reply(caller, Ack())]
        self._pause_waiting.append(caller)
        self._pause_ends = now + message.timeout
        # The ranks of an MoE group pause by consent, in rounds. Whether a request starts a new round depends only on what
        # was asked before, never on how far this rank has come: otherwise one rank could wait for a round alone.
        if same:
            return []
        self._call += 1
        self._paused_before = self.generation == "paused" or (self.generation == "pausing" and self._paused_before)
        self.generation, self.pause_mode, self._cache_cleared = "pausing", message.mode, clear
        return [CallPause(self._call, message.mode, clear)]

    def _hold(self, holder: str, lease: float, now: float) -> None:
        self._pause_holder, self.orphaned = holder, False
        self._pause_lease_ends = now + lease if lease else float("inf")

    def _hold_ends(self) -> None:
        """No user keeps it paused any more, but its weights do: it is to run once they are right."""
        self.paused_for = self.paused_for or STALE
        self._hold("", 0, 0)

    def _keep_paused(self, caller: ReplyTo, message: KeepPaused, now: float) -> list[Effect]:
        if self.generation == "running" or self.paused_for or self._pause_holder != message.holder:
            return self._refuse(caller, "state", f"this engine is not paused for {message.holder}")
        self._hold(message.holder, message.lease, now)
        return [Reply(caller, Ack())]

    def _agree(self, caller: ReplyTo, message: AdoptEpoch) -> list[Effect]:
        if self.update_phase != "idle" or self.tainted or self.stale:
            return self._refuse(caller, "state", self.tainted or self.stale or f"this engine is {self.update_phase}")
        self.committed_epoch = message.epoch
        return [Reply(caller, Ack())]

    def _resume(self, caller: ReplyTo) -> list[Effect]:
        if self.update_phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing an update")
        if self.tainted or self.stale:
            self._hold_ends()
        if self.tainted:
            return self._refuse(caller, "state", f"the weights are tainted ({self.tainted}): send another update")
        if self.stale:
            return self._refuse(caller, "state", f"the weights are stale ({self.stale}): send an update")
        if self.generation == "running":
            return [Reply(caller, Ack())]
        self._resume_waiting.append(caller)
        if self.generation == "resuming":
            return []
        effects: list[Effect] = [
            Reply(waiting, Error(kind="state", message="the pause was taken back by a resume"))
            for waiting in self._pause_waiting
        ]
        self._pause_waiting.clear()
        self._call += 1
        self.generation = "resuming"
        return [*effects, CallResume(self._call)]

    def _begin(self, caller: ReplyTo, message: Begin, now: float) -> list[Effect]:
        if self.update_phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing an update")
        if self.update and self.update.begin.update == message.update:
            return self._wait_for_workers(caller, self.update, "begin", [])
        if self.update_phase == "prepared" and self.generation != "running":
            return self._refuse(caller, "state", "an update is in doubt on this engine: commit or abort it first")
        receiving = [set(sender.workers) for sender in message.senders.values()]
        if not receiving or not all(self.workers.issuperset(ranks) for ranks in receiving):
            problem = f"this engine has workers 0 to {len(self.workers) - 1}, and the update has {message.senders}"
            return self._refuse(caller, "state", problem)
        effects = self._give_up("a newer update began") if self.update else []
        self.update = _Update(message, ends=now + message.timeout)
        self.update_phase = "receiving"
        return [*effects, *self._wait_for_workers(caller, self.update, "begin", [Order(message)])]

    def _bucket(self, caller: ReplyTo, message: Bucket) -> list[Effect]:
        update = self.update
        if update is not None and update.begin.update == message.update:
            sender = update.begin.senders.get(message.sender)
            if sender is None:
                return self._refuse(caller, "state", f"sender {message.sender} is none of this update's here")
            if sender.workers:
                update.workers[message.step] = frozenset(sender.workers)
        return self._step(caller, message, message.step)

    def _step(self, caller: ReplyTo, message: Bucket | Prepare, step: str) -> list[Effect]:
        update = self.update
        if update is None or update.begin.update != message.update:
            return self._refuse(caller, "state", self.error or f"update {message.update} is not under way here")
        effects: list[Effect] = [Order(message)]
        if update.in_place and not update.loading:
            if self.generation != "paused":
                return self._refuse(
                    caller, "state", f"an update without staging needs a paused engine; this one is {self.generation}"
                )
            update.loading = True
            self.tainted = (
                f"update {message.update} (version {update.begin.version}) was loaded in part, without staging"
            )
            effects.insert(0, CallLoad(message.update, update.begin.version))
        return self._wait_for_workers(caller, update, step, effects)

    def _wait_for_workers(self, caller: ReplyTo, update: _Update, step: str, orders: list[Effect]) -> list[Effect]:
        """Answer when every worker has finished ``step``; ``orders`` go out the first time only."""
        if update.failure:
            return self._refuse(caller, "failed", update.failure)
        if self._finished(update, step):
            return [Reply(caller, self._done(update, step))]
        asked_before = step in update.waiting
        update.waiting.setdefault(step, []).append(caller)
        return [] if asked_before else orders

    def _finished(self, update: _Update, step: str) -> bool:
        """Whether all have done ``step``; the vote without staging is that all is loaded."""
        loaded = update.loaded or step != "prepare" or not update.in_place
        return loaded and update.finished.get(step, set()) >= update.workers.get(step, self.workers)

    def _commit(self, caller: ReplyTo, message: Commit) -> list[Effect]:
        if message.update == self.last_update:
            return [Reply(caller, Ack())]
        if self.update is None or self.update.begin.update != message.update:
            return self._refuse(caller, "state", self.error or f"update {message.update} is not under way here")
        if self.update_phase == "committing":
            self._commit_waiting.append(caller)
            return []
        if self.update_phase != "prepared" or self.generation != "paused":
            return self._refuse(
                caller,
                "state",
                f"commit needs a prepared, paused engine; this one is {self.update_phase}, {self.generation}",
            )
        if self.update.in_place:
            self._switched()
            return [Reply(caller, Ack())]
        self.update_phase = "committing"
        self._commit_waiting = [caller]
        return [CallCommit(message.update, self.update.begin.version)]

    def _abort(self, caller: ReplyTo, message: Abort) -> list[Effect]:
        if message.update == self.last_update:
            return self._refuse(caller, "state", f"update {message.update} is committed here")
        if self.update is None or self.update.begin.update != message.update:
            return [Reply(caller, Ack())]
        if self.update_phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing this update")
        return [*self._give_up(message.reason), Reply(caller, Ack())]

    def _give_up(self, reason: str) -> list[Effect]:
        """Back to IDLE with the old weights, which were never touched; without staging, they are lost."""
        assert self.update is not None
        update, self.update, self.update_phase = self.update, None, "idle"
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
        if update is None or update.begin.update != message.update or self.update_phase == "committing":
            return []
        problem = message.error
        if not problem and message.step == "prepare":
            update.manifest = update.manifest or message.manifest
            if message.manifest != update.manifest:
                problem = f"holds other weights than another worker of this engine: {SEND_AGAIN}"
        if problem:
            # Kept until the coordinator aborts: whatever it asks meanwhile is answered with the cause.
            update.failure = update.failure or f"worker {message.rank}: {problem}"
            self.update_phase = "receiving"
            return self._answer_all(update, Error(kind="failed", message=update.failure))
        if message.step == "begin":
            first = "begin" not in update.finished
            update.base = message.manifest if first or message.manifest == update.base else ""
        update.finished.setdefault(message.step, set()).add(message.rank)
        return self._step_done(update, message.step)

    def _step_done(self, update: _Update, step: str) -> list[Effect]:
        if not self._finished(update, step):
            return []
        if step == "prepare" and not update.failure:
            self.update_phase = "prepared"
        return [Reply(caller, self._done(update, step)) for caller in update.waiting.pop(step, [])]

    @staticmethod
    def _done(update: _Update, step: str) -> Ack:
        return Ack(manifest=update.base if step == "begin" else update.manifest)

    def weights_mismatch(self, message: WeightsMismatch) -> None:
        """A worker serves other weights than it was sent: they are nobody's. ``tick`` pauses the engine."""
        if message.update == self.last_update and self.update_phase != "committing":
            self.tainted = f"worker {message.rank}: {message.reason}"

    # Completed calls

    def pause_done(self, call: int, error: str) -> list[Effect]:
        """The engine completed a pause, or failed to."""
        if call != self._call or self.generation != "pausing":
            return []
        if error and not self._paused_before:
            self._runs()
        else:
            self.generation = "paused"
        answer: Answer = Error(kind="failed", message=error) if error else Ack()
        callers, self._pause_waiting = self._pause_waiting, []
        return [Reply(caller, answer) for caller in callers]

    def resume_done(self, call: int, error: str) -> list[Effect]:
        """The engine runs again, or failed to resume."""
        if call != self._call or self.generation != "resuming":
            return []
        if error:
            self.generation = "paused"
        else:
            self._runs()
        answer: Answer = Error(kind="failed", message=error) if error else Ack()
        callers, self._resume_waiting = self._resume_waiting, []
        return [Reply(caller, answer) for caller in callers]

    def cancel_done(self, call: int, cancelled: bool) -> list[Effect]:
        """A pause that took too long was taken back; or it had completed after all, and then it stands."""
        if call != self._call or self.generation != "resuming":
            return []
        if cancelled:
            self._runs()
            callers, self._resume_waiting = self._resume_waiting, []
            return [Reply(caller, Ack()) for caller in callers]
        if not self._resume_waiting:
            self.generation = "paused"
            return []
        self._call += 1
        return [CallResume(self._call)]

    def _runs(self) -> None:
        self.generation, self.pause_mode, self.paused_for = "running", None, ""
        self._hold("", 0, 0)

    def commit_done(self, error: str, seconds: float, unproven: str = "") -> list[Effect]:
        """Every worker switched, or one failed and left weights that nobody can vouch for.

        ``unproven`` says why a worker could not compare its weights with a fresh load.
        """
        assert self.update is not None
        answer: Answer
        if error:
            self.tainted = f"commit of update {self.update.begin.update} failed: {error}"
            self.update, self.update_phase = None, "idle"
            answer = Error(kind="failed", message=self.tainted)
        else:
            self.unproven = unproven
            self._switched()
            answer = Ack(seconds=seconds)
        callers, self._commit_waiting = self._commit_waiting, []
        return [Reply(caller, answer) for caller in callers]

    def _switched(self) -> None:
        assert self.update is not None
        begin, self.weights = self.update.begin, self.update.manifest
        self.update, self.update_phase = None, "idle"
        self.tainted, self.stale, self.error = "", "", ""
        self.committed_epoch, self.version, self.last_update = begin.epoch, begin.version, begin.update

    def load_done(self, name: str, error: str, unproven: str = "") -> list[Effect]:
        """Without staging: every worker has loaded the last byte, or one failed. ``unproven`` as in ``commit_done``."""
        update = self.update
        if update is None or update.begin.update != name:
            return []  # given up meanwhile
        if error:
            update.failure = update.failure or f"loading failed: {error}"
            self.update_phase = "receiving"
            return self._answer_all(update, Error(kind="failed", message=update.failure))
        update.loaded, self.unproven = True, unproven
        return self._step_done(update, "prepare")

    # What the directory says

    def on_group_epoch(self, version: Version, committed_epoch: int) -> list[Effect]:
        """The newest update that the group has agreed on: serve nothing older."""
        if self.update_phase != "idle" or self.generation == "resuming":
            return []
        if committed_epoch > self.committed_epoch:
            self.stale = f"the group is at version {version}, this engine at {self.version}"
            if self.generation == "running":
                return [self._pause_for_weights()]
            if self.paused_for:
                self.paused_for = STALE
            return []
        if not self.stale:
            return []
        # All others were started anew as well.
        self.stale = ""
        if self.paused_for != STALE:
            return []
        self._call += 1
        self.generation = "resuming"
        return [CallResume(self._call)]

    def _pause_for_weights(self) -> CallPause:
        """What it serves must not be served: until an update commits."""
        self._call += 1
        self.generation, self.pause_mode, self.paused_for = "pausing", "keep", STALE
        self._cache_cleared = self._paused_before = False
        return CallPause(self._call, "keep", False)

    # Time

    def tick(self, now: float) -> list[Effect]:
        """Time passed: give up what is over its time."""
        effects: list[Effect] = []
        if self.tainted and self.generation == "running":
            effects.append(self._pause_for_weights())
        self.orphaned = self.generation != "running" and not self.paused_for and now >= self._pause_lease_ends
        if self.orphaned and (self.tainted or self.stale):
            self._hold_ends()
        if self.generation == "pausing" and self._pause_waiting and now >= self._pause_ends:
            waited = Error(kind="timeout", message="the engine did not become idle in time, the pause was taken back")
            effects += [Reply(caller, waited) for caller in self._pause_waiting]
            self._pause_waiting.clear()
            # Where an earlier pause was complete it stands, and this one joins it late.
            if not self._paused_before:
                self._call += 1
                self.generation = "resuming"
                effects.append(CallCancelPause(self._call))
        in_doubt = self.update_phase == "committing" or (
            self.update_phase == "prepared" and self.generation != "running"
        )
        if self.update and not in_doubt and now >= self.update.ends:
            effects += self._give_up("its time was over before it was committed")
        return effects
