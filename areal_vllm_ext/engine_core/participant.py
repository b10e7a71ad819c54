"""An engine's side of pause and update: a state machine with no I/O, no clock and no randomness.

    update_phase:  IDLE ──Begin──▶ RECEIVING ──Prepare, all workers yes──▶ PREPARED ──Commit──▶ COMMITTING ──▶ IDLE (new)
                     ▲                 │ Abort, timeout, worker error          │ Abort, timeout     │ a worker failed
                     └─────────────────┴───────────────────────────────────────┘                    └──▶ IDLE, tainted
    generation:    RUNNING ──Pause──▶ PAUSING ──engine idle──▶ PAUSED ──Resume──▶ RESUMING ──▶ RUNNING (``generation.py``)

Messages, completed calls and clock readings go in; effects come out, for ``endpoint.py`` to carry out in order. Rules:

- A request with an epoch lower than the highest seen is refused (``fenced``).
- A pause for an update needs PREPARED, and Commit needs PREPARED and PAUSED. So an engine that is PREPARED but was never
  paused knows that no engine committed, and gives up at its deadline. An engine that is PREPARED and PAUSED is in doubt:
  it waits for the coordinator or its successor.
- A repeated request is answered like the first one and done once.
- An engine whose commit failed is tainted: it holds a partially loaded set of weights. It stays paused until a later update
  commits. An engine whose worker finds that it serves other weights than it was sent is tainted too, and pauses.
- An engine that hears from the directory of a later committed update than its own is stale: it was restarted, or lost
  during a commit. It pauses, and stays paused until an update commits, or until it has fetched that update's weights from
  a peer (``returning.py``) and the directory says that nothing newer can have been committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..protocol import (
    Abort,
    Ack,
    AdoptEpoch,
    Answer,
    Begin,
    Bucket,
    Commit,
    Error,
    ErrorKind,
    Generation,
    KeepPaused,
    Pause,
    Prepare,
    Resume,
    ServedAdapter,
    Sleep,
    Version,
    WakeUp,
    WeightsMismatch,
    WorkerDone,
)
from .effects import CallCommit, Effect, Order, Reply
from .epochs import outside
from .generation import STALE, GenerationMachine
from .in_flight import UpdateInFlight, wrong_senders
from .sleep import SleepMachine

if TYPE_CHECKING:
    from ..protocol.server import ReplyTo

Phase = Literal["idle", "receiving", "prepared", "committing"]

ParticipantRequest = (
    Pause | KeepPaused | Resume | Sleep | WakeUp | Begin | Bucket | Prepare | Commit | Abort | AdoptEpoch
)


class Participant:
    """The state machine of one engine.

    Attributes:
        committed_epoch: the epoch of the update that brought ``version``; 0 for the weights that the engine was started with.
        pauses: the half that pauses and resumes.
        tainted: why its set of weights is partially loaded or damaged; empty if it is not.
        stale: why its weights are older than the group's; empty if they are not.
        group_epoch: the newest committed epoch that it has heard of.
        fetching: from which peer it fetches its group's weights, or why it cannot; empty if it is not stale.
        foreign: which call of another user has changed its weights or their version; empty if none has.
        adapters: the LoRA adapters that updates brought, by name.
        draft_version: of the last update that moved the drafter; None if none has.
        sleep: what of it is on the device.
        joined: whether it has heard the group's committed epoch. Before that it serves nothing.
    """

    def __init__(
        self,
        version: Version,
        workers: frozenset[int],
        epoch: int = 0,
        *,
        resume_orphans: bool = True,
        joined: bool = True,
    ) -> None:
        """Start idle and running.

        Args:
            version: of the weights that the engine serves.
            workers: the ranks that must finish every step.
            epoch: the highest seen so far.
            resume_orphans: whether recovery resumes an engine that a client paused before it was lost.
            joined: see above.
        """
        self.version = version
        self.workers = workers
        self.epoch = epoch
        self.update_phase: Phase = "idle"
        self.update: UpdateInFlight | None = None
        self.last_update = ""
        self.weights = ""
        self.loaded = self.unproven = ""
        self.error = self.tainted = self.stale = self.fetching = self.foreign = ""
        self.adapters: dict[str, ServedAdapter] = {}
        self.draft_version: Version | None = None
        self.sleep = SleepMachine()
        self.joined = joined
        self.committed_epoch = self.group_epoch = 0
        self.pauses = GenerationMachine()
        self._resume_orphans = resume_orphans
        self._commit_waiting: list[ReplyTo] = []
        self._given_up = ""  # the update that ``error`` is about
        self._begin_waiting: list[tuple[ReplyTo, Begin, float]] = []

    @property
    def generation(self) -> Generation:
        """What generation does."""
        return self.pauses.state

    # Requests

    def handle(self, caller: ReplyTo, message: ParticipantRequest, now: float) -> list[Effect]:
        """Take a request; return what to do."""
        if isinstance(message, KeepPaused):
            return self._keep_paused(caller, message, now)
        if refusal := self.fence(message.epoch):
            return self._refuse(caller, "fenced", self._cause(getattr(message, "update", ""), refusal.message))
        if not self.joined and isinstance(message, Begin | Pause):
            return self._refuse(
                caller, "state", "this engine has just started and has not joined its group yet: try again"
            )
        match message:
            case Pause():
                return self._pause(caller, message, now)
            case Resume():
                return self._resume(caller, message)
            case Begin():
                return self._begin(caller, message, now)
            case Bucket() | Prepare():
                return self._step(caller, message)
            case Commit():
                return self._commit(caller, message)
            case Abort():
                return self._abort(caller, message)
            case AdoptEpoch():
                return self._adopt_epoch(caller, message)
            case Sleep() | WakeUp():
                return self._change_sleep(caller, message, now)

    @property
    def needs_recovery(self) -> bool:
        """True if recovery would have work to do here once no client is active."""
        if self.update is not None:
            return True
        pauses = self.pauses
        # Also after an update that healed a stale engine, whose trainer never sent the Resume.
        left_paused = pauses.state != "running" and bool(pauses.paused_for) and not (self.tainted or self.stale)
        return self._resume_orphans and (self.orphaned or left_paused)

    @property
    def orphaned(self) -> bool:
        """True if the client is silent that paused this engine. Who sleeps is not: an engine sleeps until it is woken up."""
        return self.pauses.orphaned and self.sleep.is_awake

    def fence(self, epoch: int) -> Error | None:
        """Obey ``epoch`` and higher ones from now on; return the refusal of a lower one."""
        if problem := outside(epoch, self.epoch):
            return Error(kind="fenced", epoch=self.epoch, message=problem)
        self.epoch = epoch
        return None

    def _refuse(self, caller: ReplyTo, kind: ErrorKind, message: str) -> list[Effect]:
        return [Reply(caller, Error(kind=kind, message=message, epoch=self.epoch))]

    def _refuse_other(self, caller: ReplyTo, update: str) -> list[Effect]:
        return self._refuse(caller, "state", self._cause(update, f"update {update} is not in flight here"))

    def _cause(self, update: str, problem: str) -> str:
        """Return why this engine cannot go on with ``update``: a cause of its own, or the ``problem`` of a request."""
        if self.update and self.update.begin.update == update:
            return self.update.failure or problem
        return (update == self._given_up and self.error) or problem

    def _pause(self, caller: ReplyTo, message: Pause, now: float) -> list[Effect]:
        prepared = self.update.begin.update if self.update and self.update_phase == "prepared" else ""
        if message.update and message.update != prepared:
            # Acknowledging this pause is a second vote: the coordinator commits as soon as all engines have paused, so
            # refuse it unless this engine can still commit.
            problem = self._cause(message.update, f"update {message.update} is not prepared here")
            return self._refuse(caller, "state", problem)
        if self.pauses.state == "resuming":
            return self._refuse(caller, "busy", "the engine is resuming")
        return self.pauses.pause(caller, message, now)

    def _keep_paused(self, caller: ReplyTo, message: KeepPaused, now: float) -> list[Effect]:
        if not self.pauses.keep_paused(message, now):
            return self._refuse(caller, "state", f"this engine is not paused for {message.holder}")
        return [Reply(caller, Ack())]

    def _adopt_epoch(self, caller: ReplyTo, message: AdoptEpoch) -> list[Effect]:
        if self.update_phase != "idle" or self.tainted or self.stale:
            return self._refuse(caller, "state", self.tainted or self.stale or f"this engine is {self.update_phase}")
        self.committed_epoch = message.epoch
        return [Reply(caller, Ack())]

    def _resume(self, caller: ReplyTo, message: Resume) -> list[Effect]:
        if self.update_phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing an update")
        if not message.update and not self.sleep.is_awake:
            return self._refuse(
                caller, "state", f"this engine is not awake ({self.sleep.state}): call group.wake_up() first"
            )
        if (self.tainted or self.stale) and not message.update:
            self.pauses.end_hold()
        if self.tainted:
            return self._refuse(caller, "state", f"the weights are tainted ({self.tainted}): send another update")
        if self.stale:
            return self._refuse(caller, "state", f"the weights are stale ({self.stale}): send an update")
        return self.pauses.resume(caller, lifts=not message.update)

    def _change_sleep(self, caller: ReplyTo, message: Sleep | WakeUp, now: float) -> list[Effect]:
        if isinstance(message, WakeUp):
            return self.sleep.wake_up(caller, message, now)
        if self.update_phase != "idle":
            return self._refuse(
                caller, "busy", "an update is in flight on this engine: end it before the engine sleeps"
            )
        if self.pauses.state != "paused":
            return self._refuse(caller, "state", f"generation is {self.generation}: pause this engine before it sleeps")
        return self.sleep.sleep(caller, message, now)

    def _begin(self, caller: ReplyTo, message: Begin, now: float) -> list[Effect]:
        if self.update_phase == "committing" and self.update is None:  # what was fetched, which takes a moment
            self._begin_waiting.append((caller, message, now))
            return []
        if self.update_phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing an update")
        if self.update and self.update.begin.update == message.update:
            return self.update.wait(caller, "begin", [])
        if message.update in (self.last_update, self._given_up):  # a copy that came late
            return self._refuse(caller, "state", f"update {message.update} has ended here")
        if self.in_doubt:
            return self._refuse(caller, "state", "an update is in doubt on this engine: commit or abort it first")
        if self.sleep.reason:
            return self._refuse(caller, "state", self.sleep.reason)
        if problem := wrong_senders(message, self.workers):
            return self._refuse(caller, "state", problem)
        effects = self._give_up("a newer update began") if self.update else []
        self.update = UpdateInFlight(message, now + message.timeout, self.workers)
        self.update_phase = "receiving"
        return [*effects, *self.update.wait(caller, "begin", [Order(message)])]

    def _step(self, caller: ReplyTo, message: Bucket | Prepare) -> list[Effect]:
        update = self.update
        if update is None or update.begin.update != message.update:
            return self._refuse_other(caller, message.update)
        if isinstance(message, Prepare):
            update.units = message.units
            failed: list[Effect] = []
            if (unfit := self.tainted or self.stale or self.foreign) and not message.units.weights:
                failed = self._fail(
                    update, f"base weights must be in this update, because this engine's are not: {unfit}"
                )
            return [*failed, *update.wait(caller, "prepare", [Order(message)])]
        if problem := update.expect(message):
            return self._refuse(caller, "state", problem)
        return update.wait(caller, message.step, [Order(message)])

    def _commit(self, caller: ReplyTo, message: Commit) -> list[Effect]:
        if message.update == self.last_update:
            return [Reply(caller, Ack())]
        if self.update is None or self.update.begin.update != message.update:
            return self._refuse_other(caller, message.update)
        if self.update_phase == "committing":
            self._commit_waiting.append(caller)
            return []
        if self.update_phase != "prepared" or self.generation != "paused":
            problem = f"commit needs a prepared, paused engine; this one is {self.update_phase}, {self.generation}"
            return self._refuse(caller, "state", self._cause(message.update, problem))
        self.update_phase = "committing"
        self._commit_waiting = [caller]
        return [CallCommit(message.update, self.update.begin.version, self.update.units)]

    def _abort(self, caller: ReplyTo, message: Abort) -> list[Effect]:
        if message.update == self.last_update:
            return self._refuse(caller, "state", f"update {message.update} is committed here")
        if self.update is None or self.update.begin.update != message.update:
            return [Reply(caller, Ack())]
        if self.update_phase == "committing":
            return self._refuse(caller, "busy", "the engine is committing this update")
        return [*self._give_up(message.reason), Reply(caller, Ack())]

    @property
    def in_doubt(self) -> bool:
        """True if another engine may have committed the update in flight."""
        return self.update_phase == "prepared" and self.generation != "running"

    def _give_up(self, reason: str) -> list[Effect]:
        """Go back to IDLE with the old weights, which were never touched."""
        assert self.update is not None
        update, self.update, self.update_phase = self.update, None, "idle"
        reason = update.cause_of_end(reason)
        self._given_up = update.begin.update
        if reason:  # else it was begun to connect only
            self.error = f"update {self._given_up} (version {update.begin.version}) was given up: {reason}"
        order = Order(Abort(epoch=self.epoch, update=update.begin.update, reason=reason))
        return [order, *self._answer_all(update, reason)]

    def ending(self, reason: str) -> list[Effect]:
        """Answer everyone who waits for the update in flight, because the engine's process ends."""
        return self._answer_all(self.update, self.update.cause_of_end(reason)) if self.update else []

    def _answer_all(self, update: UpdateInFlight, failure: str) -> list[Effect]:
        """Answer everyone who waits for the update's workers, or for a pause for the update."""
        answer = Error(kind="failed", message=failure)
        committing, self._commit_waiting = [Reply(one, answer) for one in self._commit_waiting], []
        return [*committing, *update.answer_all(answer), *self.pauses.refuse_pauses_for(update.begin.update, answer)]

    # What the workers say

    def worker_done(self, message: WorkerDone) -> list[Effect]:
        """Take a worker's report that it finished a step of the update, or failed."""
        update = self.update
        if update is None or update.begin.update != message.update or self.update_phase == "committing":
            return []
        problem, voted, answers = update.worker_done(message, accepts_base=not self.foreign)
        if problem:
            return self._fail(update, problem)
        if voted:
            self.update_phase = "prepared"
        return answers

    def _fail(self, update: UpdateInFlight, problem: str) -> list[Effect]:
        """Vote no, or take the vote back. The cause answers every request until the coordinator aborts."""
        update.failure = update.failure or problem
        self.update_phase = "receiving"
        return self._answer_all(update, update.failure)

    def weights_mismatch(self, message: WeightsMismatch) -> None:
        """Note that a worker serves other weights than it was sent; ``tick`` pauses the engine."""
        if message.update == self.last_update and self.update_phase != "committing":
            self.tainted = f"worker {message.rank}: {message.reason}"

    # Completed calls

    def commit_done(self, error: str, seconds: float, loaded: str = "", unproven: str = "") -> list[Effect]:
        """Every worker committed, or one failed and left a partially loaded set of weights.

        Args:
            error: why a worker failed; empty if none did.
            seconds: how long the commit took.
            loaded: how the workers loaded the weights.
            unproven: why a worker could not compare its weights with a fresh load; empty if it could.
        """
        assert self.update is not None
        update, self.update, self.update_phase = self.update, None, "idle"
        answer: Answer
        if error:
            self.tainted = f"commit of update {update.begin.update} failed: {error}"
            self._given_up, self.error = update.begin.update, self.tainted
            answer = Error(kind="failed", message=self.tainted)
        else:
            if update.units.weights:
                self.weights, self.loaded, self.unproven = update.manifest, loaded, unproven
                self.tainted, self.stale, self.foreign = "", "", ""
            self.adapters, self.error = update.adapters_after(self.adapters), ""
            self.committed_epoch = self.group_epoch = update.begin.epoch
            self.version, self.last_update = update.begin.version, update.begin.update
            if update.units.draft:
                self.draft_version = self.version
            answer = Ack(seconds=seconds)
        callers, self._commit_waiting = self._commit_waiting, []
        return [Reply(caller, answer) for caller in callers]

    def fetch_committed(self) -> list[Effect]:
        """What was fetched is live, or could not be made so: take the updates that waited for that."""
        self.update_phase = "idle"
        waiting, self._begin_waiting = self._begin_waiting, []
        return [effect for one in waiting for effect in self.handle(*one)]

    def sleep_done(
        self, call: int, error: str, free_memory: int | None = None, *, touched: bool = True
    ) -> list[Effect]:
        """The engine fell asleep, or woke up, or failed to. Arguments as in ``SleepMachine.done``."""
        level, effects = self.sleep.done(call, error, free_memory, touched=touched)
        self.discarded(level)
        if self.sleep.is_awake and self.pauses.runs_when_awake and (self.tainted or self.stale):
            self.pauses.end_hold()  # an update resumes it
        return effects

    def discarded(self, level: int | None) -> None:
        """Note a sleep of this level."""
        if level == 2:
            self.tainted = "vLLM's sleep level 2 discarded them"

    def fail_before_commit(self, problem: str) -> list[Effect]:
        """Fail the update in flight, unless it is being committed."""
        if self.update is None or self.update_phase == "committing":
            return []
        return self._fail(self.update, problem)

    # What the directory says

    def on_group_epoch(self, version: Version, committed_epoch: int, *, settled: bool = True) -> list[Effect]:
        """Take the newest committed update of the group: serve nothing older.

        Args:
            version: of the update.
            committed_epoch: of the update.
            settled: whether no newer one can have been committed.
        """
        pauses, self.joined = self.pauses, True
        self.group_epoch = max(self.group_epoch, committed_epoch)
        # A directory that has restarted may not have heard of the newest one.
        if committed_epoch < self.group_epoch or self.update_phase == "committing" or self.in_doubt:
            return []
        if committed_epoch > self.committed_epoch:
            self.stale = f"the group is at version {version}, this engine at {self.version}"
            if pauses.state == "running":
                return [pauses.pause_for_weights()]
            if pauses.paused_for:  # an engine that is resuming is paused by the next tick
                pauses.paused_for = STALE
            return []
        if not self.stale or not settled or self.update_phase != "idle" or pauses.state == "resuming":
            return []
        self.stale = ""  # it has fetched the group's weights
        return [pauses.resume_unasked()] if pauses.paused_for == STALE and not self.tainted else []

    # Time

    def tick(self, now: float) -> list[Effect]:
        """Let time pass: give up what is over its time."""
        effects: list[Effect] = []
        unfit = bool(self.tainted or self.stale)
        if unfit and self.generation == "running":
            effects.append(self.pauses.pause_for_weights())
        if unfit and self.update is None and self.pauses.paused_for:
            self.pauses.paused_for = STALE  # no resume will come that other users' calls could wait for
        effects += self.pauses.tick(now, stands=unfit)
        effects += self.sleep.tick(now)
        if self.orphaned and unfit:
            self.pauses.end_hold()
        undecided = self.update_phase == "committing" or self.in_doubt
        if self.update and not undecided and now >= self.update.ends:
            effects += self._give_up("its time was over before it was committed")
        return effects
