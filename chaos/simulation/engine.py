"""One engine without time: the real participant, with queues for its loop and its workers."""

from __future__ import annotations

import collections
import contextlib
import functools
import zlib
from collections.abc import Callable
from types import SimpleNamespace

from areal_vllm_ext.engine_core.effects import (
    AskDirectory,
    AskPeer,
    CallCancelPause,
    CallCommit,
    CallCommitFetched,
    CallPause,
    CallResume,
    CallSleep,
    CallWakeUp,
    Effect,
    Guard,
    Order,
    Reply,
)
from areal_vllm_ext.engine_core.foreign_calls import ForeignCalls
from areal_vllm_ext.engine_core.offers import Offers
from areal_vllm_ext.engine_core.participant import Participant
from areal_vllm_ext.engine_core.returning import Returning
from areal_vllm_ext.engine_core.status import guard_of, status_of
from areal_vllm_ext.integrity import digest
from areal_vllm_ext.protocol import (
    Abort,
    Ack,
    Adapter,
    Answer,
    Begin,
    Bucket,
    Commit,
    EngineInfo,
    EngineRequest,
    Error,
    Fence,
    GetStatus,
    Pause,
    Prepare,
    Sleep,
    Status,
    Version,
    WorkerDone,
)
from areal_vllm_ext.protocol.peer_messages import (
    EndFetch,
    EndOffer,
    FetchWeights,
    HeldAdapter,
    OfferWeights,
    WeightsFetched,
    WorkerOffer,
    WorkerOffered,
    WorkerOfferEnded,
)
from areal_vllm_ext.protocol.server import ReplyTo

from .base import FIRST_VERSION, IDS, EngineCall, UsersCall, Violation, nothing, require
from .reading import Reading, read

WorkerReport = WorkerDone | WorkerOffered | WorkerOfferEnded | WeightsFetched


class SchedulerStandIn:
    """The methods of vLLM's engine that other users call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.model_executor = SimpleNamespace(sleeping_tags=engine.asleep)

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self._engine.running = False
        self._engine.asleep |= {"weights", "kv_cache"}
        self._engine.tainted = self._engine.tainted or level > 1

    def wake_up(self) -> None:
        self._engine.asleep.clear()
        self._engine._half_asleep = False
        self.resume_scheduler()

    def pause_scheduler(self) -> None:
        self._engine.running = False

    def resume_scheduler(self) -> None:
        self._engine.run()

    def is_scheduler_paused(self) -> bool:
        return not self._engine.running

    def collective_rpc(self, method: str) -> None:
        self._engine.reloaded = method == "reload_weights"


class Engine:
    """One engine: the real participant. The caller moves the queues of its loop and its workers on.

    Attributes:
        version: the units that the engine really holds; ``participant.version`` is what it claims.
        weights: the update that brought its base weights.
        adapters: the manifests of its adapters, by name.
        drafted: stands for the drafter's weights: a digest of the update that brought them, 0 for the first ones.
        running: whether the engine generates.
        begun: the ids of all updates whose Begin has come.
        voted: the workers' votes, as pairs of rank and update.
        vllm: vLLM's own calls, as other users of the engine make them; ``foreign`` lets them pass or not.
        asleep: what sleep mode has taken from the device.
        reloaded: another user has changed the weights.
        served_since_pause: the engine has generated since its last pause was complete.
        replies: answers that are not on the wire yet.
        cause: the last update that this engine could not go on with, and why. Later requests of it must be told that.
        asks: requests to the directory and to peers that are not on the wire yet.
        fetched: what each worker has read of a peer.
        offered: by fetch and rank, what each worker that offers its weights has sent.
        peer_at: the engine that workers reach at an address; None if there is none.
        clock: the time of this process.
    """

    def __init__(
        self,
        version: Version = FIRST_VERSION,
        info: EngineInfo | None = None,
        workers: int = 2,
        log: Callable[[str], None] = nothing,
        *,
        resume_orphans: bool = True,
        joined: bool = True,
    ) -> None:
        self.info = info or engine_info(0, 1, 0)
        self.version: Version = version
        self.weights: Version = version
        self.adapters: dict[str, str] = {}
        self.drafted = 0
        self.running = True
        self.participant = Participant(version, frozenset(range(workers)), resume_orphans=resume_orphans, joined=joined)
        self.highest_epoch = 0
        self.begun: set[str] = set()
        self.calls: collections.deque[EngineCall] = collections.deque()
        self.outcomes: collections.deque[Callable[[], list[Effect]]] = collections.deque()
        self.pausing: int | None = None
        self.orders: list[collections.deque[object]] = [collections.deque() for _ in range(workers)]
        self.reports: collections.deque[WorkerReport] = collections.deque()
        self.returning = Returning(self.participant, self.info.address, lambda: f"fetch {next(IDS)}")
        self.offers = Offers(self.participant)
        self.asks: list[AskDirectory | AskPeer] = []
        self.fetched: list[Reading | None] = [None] * workers
        self.offered: dict[tuple[str, int], list[Version]] = {}
        self.peer_at: Callable[[str], Engine | None] = lambda _: None
        self.clock: Callable[[], float] = lambda: 0.0
        self.staged: list[str] = [""] * workers
        self.voted: set[tuple[int, str]] = set()
        self.answers: dict[ReplyTo, Answer | None] = {}
        self.tainted = False
        self.reloaded = False
        self.asleep: set[str] = set()
        self.served_since_pause = False
        self.vllm = SchedulerStandIn(self)
        self.foreign = ForeignCalls(self.vllm, self.report_foreign, can_wait=True)
        self._guard = Guard()
        self._users_pause = False
        self.replies: list[tuple[ReplyTo, Answer]] = []
        self.cause = ("", "")
        self._in_flight = ""
        self._asked: dict[ReplyTo, str] = {}
        self._half_asleep = False
        self._sleepers: set[ReplyTo] = set()
        self.log = log

    # The endpoint

    def receive(self, caller: ReplyTo, message: EngineRequest, now: float) -> None:
        """Handle a request; a repeated one gets its first answer again, as from the real server."""
        if caller in self.answers:
            if (answer := self.answers[caller]) is not None:
                self.replies.append((caller, answer))
            return
        self.answers[caller] = None
        if isinstance(message, GetStatus):
            self.carry_out([Reply(caller, self.status())])
            return
        if isinstance(message, OfferWeights):
            self.carry_out(self.offers.ask(caller, message, now))
            return
        if isinstance(message, EndOffer):
            self.carry_out(self.offers.end(caller, message, now))
            return
        if isinstance(message, Begin):
            self.begun.add(message.update)
        elif isinstance(message, Bucket | Prepare | Pause | Commit) and message.update:
            self._asked[caller] = message.update
        elif isinstance(message, Sleep):
            self._sleepers.add(caller)
        epoch = getattr(message, "epoch", None)
        before = self.state if epoch is not None and epoch < self.highest_epoch else None
        if isinstance(message, Fence):
            refusal = self.participant.fence(message.epoch)
            self.carry_out([Reply(caller, refusal or self.status())])
        else:
            self.carry_out(self.participant.handle(caller, message, now))
        if epoch is None:  # it holds a pause, and commands nothing
            return
        if before is not None and self.state != before:
            raise Violation("rule", f"{message} of a lower epoch than {self.highest_epoch} changed {before}")
        self.highest_epoch = max(self.highest_epoch, epoch)

    def status(self) -> Status:
        return status_of(self.participant, self.info)

    @property
    def state(self) -> tuple[object, ...]:
        p = self.participant
        return (
            p.version,
            p.update_phase,
            p.generation,
            p.epoch,
            p.update and p.update.begin.update,
            p.last_update,
            p.sleep.state,
            len(self.calls),
        )

    def report_foreign(self, event: Callable[[Participant], list[Effect]]) -> None:
        participant = self.participant
        self.outcomes.append(lambda: event(participant))

    def carry_out(self, effects: list[Effect]) -> None:
        self._note_cause()
        if self._guard != (guard := guard_of(self.participant)):
            self._guard = guard
            self.calls.append(guard)
        for effect in effects:
            match effect:
                case Reply():
                    require(self.answers.get(effect.caller) is None, "rule", "a request was answered twice")
                    self._check_cause(effect)
                    if effect.caller in self._sleepers and isinstance(effect.answer, Ack):
                        require(not self._half_asleep, "untrue outcome", "a sleep that failed half-way is called done")
                    self.answers[effect.caller] = effect.answer
                    self.replies.append((effect.caller, effect.answer))
                case Order():
                    for orders in self.orders:
                        orders.append(effect.message)
                case AskDirectory() | AskPeer():
                    self.asks.append(effect)
                case _:
                    self.calls.append(effect)

    def _check_cause(self, reply: Reply) -> None:
        """Check that a request of an update that this engine could not go on with is told why."""
        update, answer = self._asked.pop(reply.caller, ""), reply.answer
        if update and update == self.cause[0] and isinstance(answer, Error):
            require(self.cause[1] in answer.message, "untrue outcome", f"{answer.message!r} hides {self.cause[1]!r}")

    def _note_cause(self) -> None:
        """Note why this engine cannot go on with an update: the first of its own failures, or why it gave it up."""
        participant, update, was = self.participant, self.participant.update, self._in_flight
        self._in_flight = update.begin.update if update else ""
        if update and update.failure:
            if self.cause[0] != self._in_flight:
                self.cause = (self._in_flight, update.failure)
        elif (
            not participant.error or self.cause[0] == self._in_flight
        ):  # a later update committed, or this one began again
            self.cause = ("", "")
        elif was and was not in (self._in_flight, participant.last_update, self.cause[0]):
            self.cause = (was, participant.error.partition(" was given up: ")[2] or participant.error)

    def _change_sleep(self, call: CallSleep | CallWakeUp, fails: bool) -> None:
        """Take the weights from the device, or bring back what was kept aside."""
        participant = self.participant
        if self.running:  # as ``Controller.change_sleep`` finds
            self.outcomes.append(
                lambda: participant.sleep_done(call.call, "another user has resumed it", touched=False)
            )
            return
        if isinstance(call, CallSleep):
            self.foreign.slept(call.level)
            self.asleep |= {"weights", "kv_cache"}
            self.tainted = self.tainted or call.level > 1
            self._half_asleep = fails
        elif not fails:
            self.asleep -= set(call.tags)
            self._half_asleep = False
        error = "out of memory" if fails else ""
        self.outcomes.append(lambda: participant.sleep_done(call.call, error, 1))

    def _resume(self, call: CallResume, fails: bool) -> None:
        participant = self.participant
        fails = fails or (bool(self.asleep) and call.asked) or bool(self.foreign.discarded)
        if not fails and call.lifts:
            self.foreign.paused = False
        stays = (self.foreign.paused or bool(self.asleep)) and not fails
        if not fails and not stays:
            self.pausing = None
            self.run()
        error = "stuck" if fails else ""
        self.outcomes.append(lambda: participant.pauses.resume_done(call.call, error, paused=stays))

    # The engine's loop

    def step(self, fails: bool = False) -> None:
        """Carry out the next call of the engine's loop."""
        participant, call = self.participant, self.calls.popleft()
        self.log(f"{call}{' fails' if fails else ''}")
        match call:
            case CallPause():
                if fails:
                    self.outcomes.append(lambda: participant.pauses.pause_done(call.call, "no consent"))
                else:
                    self.pausing, self._users_pause = call.call, call.users
            case CallResume():
                self._resume(call, fails)
            case UsersCall():
                self._users_call(call.name)
            case Guard():
                self.foreign.guard(call)
            case CallCancelPause():
                pending = self.pausing is not None and not (self.foreign.paused or self.foreign.discarded)
                if pending:
                    self.pausing, self.running = None, True
                self.outcomes.append(lambda: participant.pauses.cancel_done(call.call, pending))
            case CallSleep() | CallWakeUp():
                self._change_sleep(call, fails)
            case CallCommit():
                require("weights" not in self.asleep, "wrong tokens", "a commit was applied to weights that sleep")
                require(not self.running, "wrong tokens", "a commit was applied on an engine that runs")
                require(not self.served_since_pause, "wrong tokens", "an engine ran between its pause and its commit")
                require(
                    self.holds(call.update),
                    "wrong tokens",
                    f"{call} was applied to {self.voted}, which is not all of it",
                )
                self.tainted = fails or (self.tainted and not call.units.weights)
                self.staged = [""] * len(self.staged)
                if not fails:
                    self._commit(call)
                self.outcomes.append(lambda: participant.commit_done("did not fit" if fails else "", 0.1))
            case CallCommitFetched():
                self._commit_fetched(call, fails)

    def _commit_fetched(self, call: CallCommitFetched, fails: bool) -> None:
        """Make what every worker has read of a peer live."""
        if "weights" in self.asleep:  # as ``Controller.commit_fetched`` finds
            self.outcomes.append(lambda: self.returning.committed("it sleeps", self.clock(), touched=False))
            return
        require(not self.running, "wrong tokens", "fetched weights were applied on an engine that runs")
        whole = all(one is not None and one.fetch == call.fetch and one.complete for one in self.fetched)
        require(whole, "wrong tokens", f"{call} was applied to {self.fetched}, which is not all of it")
        pieces = {piece for one in self.fetched if one is not None for piece in one.pieces}
        self.tainted = fails
        if not fails:
            one = len(pieces) == 1
            self.weights = pieces.pop() if one else f"mixture of {sorted(map(str, pieces))}"
            self.version = call.version if one else self.weights
            # All workers have all adapters: each compares them with what the peer says that it serves.
            self.adapters = dict(self.fetched[0].adapters or {}) if self.fetched[0] is not None else {}
            self.drafted = self.fetched[0].drafted if self.fetched[0] is not None else 0
            self.reloaded, self.foreign.discarded = False, ""
        self.fetched = [None] * len(self.fetched)
        self.outcomes.append(lambda: self.returning.committed("did not fit" if fails else "", self.clock()))

    def _commit(self, call: CallCommit) -> None:
        self.version = call.version
        if call.units.weights:
            self.weights, self.reloaded, self.foreign.discarded = call.version, False, ""
        if call.units.draft:
            self.drafted = _digest_of(call.version)
        for name in call.units.removed:
            self.adapters.pop(name, None)
        self.adapters |= {unit.name: unit.manifest for unit in call.units.adapters}

    @property
    def units(self) -> tuple[object, ...]:
        """What the engine really computes with: the update that brought its weights, and its adapters."""
        return self.weights, *sorted(self.adapters.items())

    @property
    def tells_the_truth(self) -> bool:
        """Whether the adapters and the drafter that it claims to serve are those that it has."""
        claimed = self.participant.draft_version
        if self.drafted != (0 if claimed is None else _digest_of(claimed)):
            return False
        return {name: one.manifest for name, one in self.participant.adapters.items()} == self.adapters

    def start(self) -> None:
        """Start the loop: it takes every call that waits before its first step."""
        while self.calls:
            self.step()
        if self.pausing is not None:
            self.become_idle()

    def _users_call(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):  # it may be refused
            if name == "reload_weights":
                self.vllm.collective_rpc(name)
            elif name == "sleep level 2":
                self.vllm.sleep(2)
            else:
                getattr(self.vllm, name)()

    def run(self) -> None:
        """Generate again."""
        require(not self.tainted, "wrong tokens", "a tainted engine was resumed")
        require(not self.asleep, "wrong tokens", "an engine was resumed that sleeps")
        self.running = self.served_since_pause = True

    def holds(self, update: str) -> bool:
        """Return whether every worker has voted for ``update``."""
        return self.voted == {(rank, update) for rank in range(len(self.orders))}

    def become_idle(self) -> None:
        """Complete the pause that was asked for."""
        call, self.pausing = self.pausing, None
        assert call is not None
        self.running = self.served_since_pause = False
        self.foreign.paused = self.foreign.paused or self._users_pause
        participant = self.participant
        self.outcomes.append(lambda: participant.pauses.pause_done(call, ""))

    def report(self) -> None:
        self.carry_out(self.outcomes.popleft()())

    # The workers

    def work(self, rank: int, fails: bool = False) -> None:
        match order := self.orders[rank].popleft():
            case Begin():
                self.staged[rank] = order.update
                self.voted = {entry for entry in self.voted if entry[0] != rank}
                step = "begin"
            case Bucket():
                step = order.step
            case Prepare():
                step = "prepare"
            case OfferWeights() | EndOffer() | FetchWeights() | Reading() | EndFetch():
                self._work_with_peer(rank, order, fails)
                return
            case _:
                assert isinstance(order, Abort)
                if self.staged[rank] == order.update:
                    self.staged[rank] = ""
                    self.voted.discard((rank, order.update))
                return
        if self.staged[rank] == order.update:
            error, manifest = "out of memory" if fails else "", ""
            if isinstance(order, Prepare) and not fails:
                self.voted.add((rank, order.update))
                manifest = digest.units_manifest("", {one.name: one.manifest for one in order.units.adapters})
            done = WorkerDone(update=order.update, rank=rank, step=step, error=error, manifest=manifest)
            self.reports.append(done)

    def _work_with_peer(
        self, rank: int, order: OfferWeights | EndOffer | FetchWeights | Reading | EndFetch, fails: bool
    ) -> None:
        match order:
            case OfferWeights():
                digest = str(self.weights)
                found = {name: one for name, one in order.adapters.items() if self.adapters.get(name) == one}
                adapters = tuple(HeldAdapter(Adapter(name, "{}", one), ()) for name, one in found.items())
                offer = WorkerOffer(
                    rank=rank,
                    layout=digest,
                    address=self.info.address,
                    held=(),
                    attributes={"draft": self.drafted},
                    adapters=adapters,
                )
                self.offered[order.fetch, rank] = []
                error = "out of memory" if fails else ""
                self.reports.append(
                    WorkerOffered(fetch=order.fetch, rank=rank, offer=None if fails else offer, error=error)
                )
            case EndOffer():
                sent = self.offered.pop((order.fetch, rank), [])
                self.reports.append(WorkerOfferEnded(fetch=order.fetch, rank=rank, manifest=str(sent)))
            case FetchWeights():
                self.fetched[rank] = reading = Reading(order, rank, self.clock())
                self.orders[rank].append(reading)
            case Reading():
                if self.fetched[rank] is not order:
                    return  # given up
                error = "out of memory" if fails else read(order, self.peer_at(order.address), self.clock())
                if error or order.complete:
                    self.reports.append(
                        WeightsFetched(fetch=order.fetch, rank=rank, manifest=str(order.pieces), error=error)
                    )
                else:
                    self.orders[rank].append(order)
            case EndFetch():
                self.fetched[rank] = None

    def send_piece(self, fetch: str, rank: int) -> Version | None:
        """Send a piece of what is live to the worker that fetches; None if there is no such offer, or an update has begun."""
        sent = self.offered.get((fetch, rank))
        if sent is None or self.staged[rank] or "weights" in self.asleep:
            return None
        sent.append(self.weights)
        return self.weights

    def hear_worker(self) -> None:
        match report := self.reports.popleft():
            case WorkerDone():
                effects = self.participant.worker_done(report)
            case WorkerOffered():
                effects = self.offers.worker_offered(report, self.clock())
            case WorkerOfferEnded():
                effects = self.offers.worker_ended(report, self.clock())
            case WeightsFetched():
                effects = self.returning.worker_fetched(report, self.clock())
        self.carry_out(effects)

    # Scheduling

    @property
    def busy(self) -> bool:
        return bool(self.calls or self.outcomes or self.reports or self.pausing is not None or any(self.orders))

    def parts(self) -> list[Callable[[], None]]:
        """Return what can happen next in this process; a real engine would mostly do the first."""
        parts: list[Callable[[], None]] = []
        if self.outcomes:
            parts.append(self.report)
        if self.reports:
            parts.append(self.hear_worker)
        if self.calls:
            parts.append(self.step)
        if self.pausing is not None:
            parts.append(self.become_idle)
        parts += [functools.partial(self.work, rank) for rank, orders in enumerate(self.orders) if orders]
        return parts

    def go_on(self) -> None:
        """Do the first thing that can happen next."""
        if parts := self.parts():
            parts[0]()


def engine_info(rank: int, engines: int, incarnation: int, replicas: int = 1) -> EngineInfo:
    """Return who engine ``rank`` is. Engines belong to ``replicas`` in turn."""
    return EngineInfo(
        replica=f"r{rank % replicas}" if replicas > 1 else "r",
        dp_rank=rank // replicas,
        dp_size=len(range(rank % replicas, engines, replicas)),
        headless=rank >= replicas,
        node=f"n{rank}",
        pid=incarnation,
        incarnation=f"{incarnation:020d}",
        address=f"tcp://engine-{rank}:{incarnation + 1}",
        dtype="float32",
        sleep_mode=True,
    )


def _digest_of(version: Version) -> int:
    return zlib.crc32(str(version).encode())
