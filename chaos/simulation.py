"""A cluster in memory: the real participant, coordinator, recovery, directory and trainer's client, and around them
simulated processes, clocks and network. No sockets, no threads, no waiting: an hour of a thousand engines is a loop over
a heap of events.

``Engine`` is one engine without time: queues that somebody moves on (hypothesis in ``tests/unit/test_transaction_machine.py``,
time in ``World``). ``World`` holds the processes, each with a clock of its own that may run fast or slow, that can be
killed, or put to sleep and woken. Trainers are the real ``AsyncEngineGroup`` on an event loop whose time is simulated.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal
from unittest import mock

from areal_vllm_ext.client import group as client_group
from areal_vllm_ext.client import sending as client_sending
from areal_vllm_ext.client import update as client_update
from areal_vllm_ext.client.group import AsyncEngineGroup
from areal_vllm_ext.client.sending import Sending
from areal_vllm_ext.control.directory import BEAT_SECONDS, SETTLE_SECONDS, Directory
from areal_vllm_ext.engine_core.participant import (
    CallCancelPause,
    CallCommit,
    CallLoad,
    CallPause,
    CallResume,
    Effect,
    Order,
    Participant,
    Reply,
)
from areal_vllm_ext.errors import ArealError, EngineUnreachable
from areal_vllm_ext.protocol import (
    Abort,
    Answer,
    Begin,
    Bucket,
    DirectoryRequest,
    Disk,
    EngineInfo,
    EngineRequest,
    Fence,
    GetStatus,
    Message,
    Prepare,
    Register,
    Registered,
    Sender,
    Status,
    Version,
    WorkerDone,
)
from areal_vllm_ext.protocol.wire import Caller

FIRST_VERSION = "v0"
DIRECTORY = "tcp://directory:29700"
TICK_SECONDS = 0.1
LOOK_SECONDS = 0.2
RECOVERY_SECONDS = 10.0
GONE_SECONDS = 5.0
REPEAT_SECONDS = 1.0
BUCKETS = 2

Kind = Literal["mixed versions", "hang", "wrong tokens", "leftover", "overrun", "rule", "untrue outcome"]
EngineCall = CallPause | CallResume | CallCancelPause | CallCommit | CallLoad
IDS = itertools.count()


class Violation(AssertionError):
    """A promise was broken."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind: Kind = kind


def require(condition: object, kind: Kind, message: str) -> None:
    if not condition:
        raise Violation(kind, message)


def nothing(_: str) -> None:
    pass


class Engine:
    """One engine: the real participant; its loop and workers are queues that somebody else moves on.

    Attributes:
        version: the weights that it really holds; ``participant.version`` is what it says.
        running: whether it generates.
        replies: answers that are not on the wire yet.
    """

    def __init__(
        self,
        version: Version = FIRST_VERSION,
        info: EngineInfo | None = None,
        workers: int = 2,
        log: Callable[[str], None] = nothing,
    ) -> None:
        self.info = info or engine_info(0, 1, 0)
        self.version: Version = version
        self.running = True
        self.participant = Participant(version, frozenset(range(workers)))
        self.highest_epoch = 0
        self.calls: collections.deque[EngineCall] = collections.deque()
        self.outcomes: collections.deque[Callable[[], list[Effect]]] = collections.deque()
        self.pausing: int | None = None
        self.orders: list[collections.deque[object]] = [collections.deque() for _ in range(workers)]
        self.words: collections.deque[WorkerDone] = collections.deque()
        self.staged: list[str] = [""] * workers
        self.whole: set[tuple[int, str]] = set()  # what the workers voted for
        self.answers: dict[Caller, Answer | None] = {}
        self.tainted = False
        self.loading: CallLoad | None = None  # without staging: it holds parts of two versions
        self.replies: list[tuple[Caller, Answer]] = []
        self.log = log

    # The endpoint

    def receive(self, caller: Caller, message: EngineRequest, now: float) -> None:
        """As ``wire.Server`` and ``Endpoint`` do: a repeated request gets the first answer again."""
        if caller in self.answers:
            if (answer := self.answers[caller]) is not None:
                self.replies.append((caller, answer))
            return
        self.answers[caller] = None
        if isinstance(message, GetStatus):
            self.carry_out([Reply(caller, self.status())])
            return
        before = self.state
        if isinstance(message, Fence):
            refusal = self.participant.fence(message.epoch)
            self.carry_out([Reply(caller, refusal or self.status())])
        else:
            self.carry_out(self.participant.handle(caller, message, now))
        if message.epoch < self.highest_epoch and self.state != before:
            raise Violation("rule", f"{message} of a lower epoch than {self.highest_epoch} changed {before}")
        self.highest_epoch = max(self.highest_epoch, message.epoch)

    def status(self) -> Status:
        return self.participant.status(self.info)

    @property
    def state(self) -> tuple[object, ...]:
        p = self.participant
        return (p.version, p.phase, p.flow, p.epoch, p.update and p.update.begin.update, p.last_update, len(self.calls))

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply():
                    require(self.answers.get(effect.caller) is None, "rule", "a request was answered twice")
                    self.answers[effect.caller] = effect.answer
                    self.replies.append((effect.caller, effect.answer))
                case Order():
                    for orders in self.orders:
                        orders.append(effect.message)
                case _:
                    self.calls.append(effect)

    # The engine's loop

    def step(self, fails: bool = False) -> None:
        """Carry out the next call."""
        participant, call = self.participant, self.calls.popleft()
        self.log(f"{call}{' fails' if fails else ''}")
        match call:
            case CallPause():
                if fails:
                    self.outcomes.append(lambda: participant.pause_done(call.call, "no consent"))
                else:
                    self.pausing = call.call
            case CallResume():
                if not fails:
                    require(not self.tainted, "wrong tokens", "a tainted engine was resumed")
                    self.pausing, self.running = None, True
                self.outcomes.append(lambda: participant.resume_done(call.call, "stuck" if fails else ""))
            case CallCancelPause():
                pending, self.pausing = self.pausing is not None, None
                self.running = self.running or pending
                self.outcomes.append(lambda: participant.cancel_done(call.call, pending))
            case CallCommit():
                require(not self.running, "wrong tokens", "a commit was applied on an engine that runs")
                require(
                    self.holds(call.update),
                    "wrong tokens",
                    f"{call} was applied to {self.whole}, which is not all of it",
                )
                self.tainted = fails
                if not fails:
                    self.version = call.version
                self.outcomes.append(lambda: participant.commit_done("did not fit" if fails else "", 0.1))
            case CallLoad():
                require(not self.running, "wrong tokens", "an engine that runs was loaded in place")
                self.tainted, self.loading = True, call
                if fails:
                    self.end_load()

    def end_load(self) -> None:
        """Without staging: the last byte is loaded, or the update was given up."""
        call, self.loading = self.loading, None
        assert call is not None
        participant, error = self.participant, "" if self.holds(call.update) else "given up"
        if not error:
            self.tainted, self.version = False, call.version
        self.outcomes.append(lambda: participant.load_done(call.update, error))

    def holds(self, update: str) -> bool:
        """Whether every worker has all of ``update``."""
        return self.whole == {(rank, update) for rank in range(len(self.orders))}

    def become_idle(self) -> None:
        """The pause that was asked for completes."""
        call, self.pausing = self.pausing, None
        assert call is not None
        self.running = False
        participant = self.participant
        self.outcomes.append(lambda: participant.pause_done(call, ""))

    def report(self) -> None:
        self.carry_out(self.outcomes.popleft()())

    # The workers

    def work(self, rank: int, fails: bool = False) -> None:
        match order := self.orders[rank].popleft():
            case Begin():
                self.staged[rank] = order.update
                self.whole = {entry for entry in self.whole if entry[0] != rank}
                step = "begin"
            case Bucket():
                step = order.step
            case Prepare():
                step = "prepare"
            case _:
                assert isinstance(order, Abort)
                if self.staged[rank] == order.update:
                    self.staged[rank] = ""
                    self.whole.discard((rank, order.update))
                return
        if self.staged[rank] == order.update:
            error = "out of memory" if fails else ""
            if step == "prepare" and not fails:
                self.whole.add((rank, order.update))
            self.words.append(WorkerDone(update=order.update, rank=rank, step=step, error=error))

    def hear_worker(self) -> None:
        self.carry_out(self.participant.worker_done(self.words.popleft()))

    # Going on

    @property
    def busy(self) -> bool:
        waiting = self.calls or self.outcomes or self.words or self.pausing is not None or any(self.orders)
        return bool(waiting or self.load_ends)

    @property
    def load_ends(self) -> bool:
        """Whether a load in place has all its bytes, or will never have them."""
        if self.loading is None:
            return False
        update = self.loading.update
        return self.holds(update) or any(staged != update for staged in self.staged)

    def parts(self) -> list[Callable[[], None]]:
        """The parts of this process that have something to do, in the order in which they would if all were quick."""
        parts: list[Callable[[], None]] = []
        if self.outcomes:
            parts.append(self.report)
        if self.words:
            parts.append(self.hear_worker)
        if self.calls:
            parts.append(self.step)
        if self.pausing is not None:
            parts.append(self.become_idle)
        if self.load_ends:
            parts.append(self.end_load)
        parts += [functools.partial(self.work, rank) for rank, orders in enumerate(self.orders) if orders]
        return parts

    def go_on(self) -> None:
        """One step of whatever waits in this process."""
        if parts := self.parts():
            parts[0]()


def engine_info(rank: int, engines: int, incarnation: int) -> EngineInfo:
    return EngineInfo(
        replica="r",
        dp_rank=rank,
        dp_size=engines,
        headless=rank > 0,
        node=f"n{rank}",
        pid=incarnation,
        incarnation=f"{incarnation:020d}",
        address=f"tcp://engine-{rank}:{incarnation + 1}",
        model="",
        dtype="float32",
        device="cpu",
        vllm_version="",
        package_version="",
    )


# Processes, clocks and the network


@dataclasses.dataclass(frozen=True)
class Clock:
    """What a process reads where the world's time is ``t``: ``offset + rate * t``."""

    offset: float = 0.0
    rate: float = 1.0


class Process(asyncio.AbstractEventLoop):
    """A process, and the event loop of what is asynchronous in it. Its time is its clock's."""

    def __init__(self, world: World, name: str, clock: Clock) -> None:
        self.world = world
        self.name = name
        self.clock = clock
        self.alive = True
        self.asleep = self.slept = False
        self.waiting: list[tuple[int, Any]] = []
        self._ready: collections.deque[asyncio.Handle] = collections.deque()

    def hear(self, caller: Caller, message: Any) -> None:
        """A message has come."""
        raise NotImplementedError

    def kill(self) -> None:
        """As SIGKILL does: nothing that it does from here on reaches anybody."""
        self.alive = False
        for task in asyncio.all_tasks(self):
            task.cancel()
        self.run(lambda: None)

    def sleep(self) -> None:
        """As SIGSTOP does: messages and timers wait."""
        self.asleep = self.slept = True

    def wake(self) -> None:
        """As SIGCONT does."""
        self.asleep = False
        for order, callback in self.waiting:
            self.world.at(self.world.now, self, callback, order)
        self.waiting.clear()

    def after(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call ``callback`` when this process's clock has gone ``seconds`` further."""
        self.world.at(self.world.now + seconds / self.clock.rate, self, callback)

    def run(self, callback: Callable[[], object]) -> None:
        """Run one event, and all that becomes ready by it."""
        asyncio._set_running_loop(self)
        try:
            callback()
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)

    # What asyncio asks of a loop

    def time(self) -> float:
        return self.clock.offset + self.clock.rate * self.world.now

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(self.time() + delay, callback, args, self, context)
        self.world.at(self.world.now + max(delay, 0.0) / self.clock.rate, self, timer)
        return timer

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_later(when - self.time(), callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        # An exception that nobody retrieved: that of a task which a killed process left behind, say.
        pass


class Network:
    """What becomes of each message. Shares are of all messages, 0 to 1."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.lost = self.late = self.doubled = self.bursts = 0.0
        self.cut: set[str] = set()  # processes that the others do not reach
        self.held: list[tuple[Process, Callable[[], None]]] = []

    def delays(self, now: float) -> list[float]:
        """After how many seconds the message arrives; once for each copy."""
        dice = self.dice
        if self.lost and dice.random() < self.lost:
            return []
        copies = 2 if self.doubled and dice.random() < self.doubled else 1
        delays = []
        for _ in range(copies):
            delay = dice.uniform(0.0002, 0.002)
            if self.late and dice.random() < self.late:
                delay += dice.expovariate(0.5)
            if self.bursts and dice.random() < self.bursts:
                delay += 0.5 - now % 0.5  # all that was sent in half a second comes at its end, in any order
            delays.append(delay)
        return delays


class World:
    """Engines, a directory and trainers, and what happens to them.

    Attributes:
        now: the true time, in seconds.
        switched: the engines that ever switched to a version.
    """

    def __init__(self, engines: int, seed: int, trace: bool = False) -> None:
        self.dice = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self.lines: list[str] | None = [] if trace else None
        self._heap: list[tuple[float, int, Process, Any]] = []
        self._order = itertools.count()
        self._listening: dict[str, Process] = {}
        self._processes: dict[bytes, Process] = {}
        self.network = Network(self.dice)
        self.switched: dict[Version, set[int]] = collections.defaultdict(set)
        self._begun: set[str] = set()
        self._serving: collections.Counter[Version] = collections.Counter()
        self._counted: dict[int, Version] = {}
        self._incarnations = itertools.count(1)
        self.drift = 0.0
        self.engines: list[EngineProcess] = []
        self.start_directory()
        for rank in range(engines):
            self.engines.append(self._new_engine(rank, engines))
            self._count(rank)
        self.trainers: list[Trainer] = []

    # Processes

    def clock(self) -> Clock:
        return Clock(self.dice.uniform(0, 1e6), 1 + self.dice.uniform(-self.drift, self.drift))

    def join(self, process: Process, address: str = "") -> None:
        self._processes[process.name.encode()] = process
        if address:
            self._listening[address] = process

    def start_directory(self) -> None:
        self.directory = DirectoryProcess(self)

    def _new_engine(self, rank: int, engines: int) -> EngineProcess:
        return EngineProcess(self, engine_info(rank, engines, next(self._incarnations)), rank)

    def crash_engine(self, rank: int) -> None:
        self.engines[rank].kill()
        self._count(rank)
        self.log(self.engines[rank].name, "crashes")

    def restart_engine(self, rank: int) -> None:
        """It comes back with the weights that it was started with, and without a memory."""
        if not self.engines[rank].alive:
            self.engines[rank] = self._new_engine(rank, len(self.engines))
            self.log(self.engines[rank].name, "is back")

    def trainer(self) -> Trainer:
        self.trainers.append(Trainer(self, f"trainer-{len(self.trainers) + 1}"))
        return self.trainers[-1]

    # Events

    def at(self, when: float, process: Process, callback: Any, order: int | None = None) -> None:
        """Call ``callback`` in ``process`` at the true time ``when``. What falls on one moment is in ``order``."""
        heapq.heappush(self._heap, (when, next(self._order) if order is None else order, process, callback))

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Let everything take its course until the time ``until``, or until ``done``."""
        heap = self._heap
        while heap and heap[0][0] <= until and not done():
            when, order, process, callback = heapq.heappop(heap)
            if not process.alive:
                continue
            if process.asleep:
                process.waiting.append((order, callback))
                continue
            self.now = max(self.now, when)
            if isinstance(callback, asyncio.TimerHandle):
                if callback.cancelled():
                    continue
                callback = callback._run
            self.events += 1
            process.run(callback)
        if not done():
            self.now = max(self.now, until)

    def log(self, who: str, what: object) -> None:
        if self.lines is not None:
            self.lines.append(f"{self.now:8.4f} {who:10s} {what}")

    # Messages

    def send(self, source: Process, target: str | bytes, caller: Caller, message: Message) -> None:
        """From ``source`` to an address, or back to the process that asked."""
        receiver = self._listening.get(target) if isinstance(target, str) else self._processes.get(target)
        if not source.alive or receiver is None:
            return

        def arrive() -> None:
            if self.lines is not None:
                self.log(receiver.name, f"<- {source.name} {brief(message)}")
            receiver.hear(caller, message)

        if (source.name in self.network.cut) != (receiver.name in self.network.cut):
            # The kernel sends again what was under way when a link was cut, once it is joined; or the connection ends.
            if self.dice.random() < 0.5:
                self.network.held.append((receiver, arrive))
            return
        for delay in self.network.delays(self.now):
            self.at(self.now + delay, receiver, arrive)

    def reaches(self, source: Process, address: str) -> bool:
        """Whether a connection from ``source`` to ``address`` would stand."""
        receiver = self._listening.get(address)
        cut = self.network.cut
        return receiver is not None and receiver.alive and (source.name in cut) == (receiver.name in cut)

    def join_links(self) -> None:
        """Every cut link is whole again."""
        self.network.cut.clear()
        for receiver, arrive in self.network.held:
            self.at(self.now + self.dice.uniform(0, 0.5), receiver, arrive)
        self.network.held.clear()

    # What must hold at any time

    def check(self, rank: int) -> None:
        """No two engines that serve are on different versions, whoever died or slept or was late. ``rank`` has changed."""
        self._count(rank)
        require(len(self._serving) <= 1, "mixed versions", f"engines serve {sorted(map(str, self._serving))}")
        engine = self.engines[rank].engine
        require(not (engine.tainted and engine.running), "wrong tokens", f"engine {rank} serves tainted weights")

    def _count(self, rank: int) -> None:
        """Keep count of the versions that engines serve."""
        if before := self._counted.pop(rank, None):
            self._serving[before] -= 1
            if not self._serving[before]:
                del self._serving[before]
        process = self.engines[rank]
        if process.alive and process.engine.running:
            self._counted[rank] = process.engine.version
            self._serving[process.engine.version] += 1

    def switching(self, rank: int, call: CallCommit) -> None:
        """An engine is about to switch: is every other paused with the same update prepared, where it is the first?"""
        if call.update in self._begun:
            return
        self._begun.add(call.update)
        for other, process in enumerate(self.engines):
            p = process.engine.participant
            ready = p.update is not None and p.update.begin.update == call.update and p.flow == "paused"
            require(
                (ready and p.phase in ("prepared", "committing")) or not (process.alive and process.joined),
                "rule",
                f"engine {rank} commits while engine {other} is {p.phase}, {p.flow}",
            )


class Asked:
    """As ``connection.Round``."""

    def __init__(self, process: Asking) -> None:
        self.callers: list[Caller] = []
        self._process = process

    def cancel(self) -> None:
        for caller in self.callers:
            self._process.pending.pop(caller, None)


class Asking(Process):
    """A process with the client's connection, which is simulated: a trainer, or whoever else commands engines."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, world.clock())
        self.pending: dict[Caller, Callable[[Answer], None]] = {}
        self.gone_since: dict[str, float] = {}

    def group(self) -> AsyncEngineGroup:
        """The real client, on this process's loop."""
        group = AsyncEngineGroup((DIRECTORY,), None, 16 << 20)
        group.holder = self.name
        group._connection = self  # type: ignore[assignment]
        return group

    def hear(self, caller: Caller, message: Any) -> None:
        if settle := self.pending.get(caller):
            settle(message)

    # What the group asks of its connection

    def ask(
        self,
        requests: Mapping[str, tuple[str, Message]],
        timeout: float,
        heard: Callable[[str, Answer | EngineUnreachable], None],
    ) -> Asked:
        """As ``Connection.ask``: says each again every second under one id, until its time is over."""
        asked = Asked(self)
        for name, (address, message) in requests.items():
            caller = new_caller(self)
            asked.callers.append(caller)
            self.pending[caller] = functools.partial(self._settle, caller, functools.partial(heard, name))
            self._say(caller, address, message, timeout, self.time() + timeout)
        return asked

    def _settle(self, caller: Caller, heard: Callable[[Any], None], outcome: Answer | EngineUnreachable) -> None:
        del self.pending[caller]
        heard(outcome)

    def _say(self, caller: Caller, address: str, message: Message, timeout: float, ends: float) -> None:
        if (settle := self.pending.get(caller)) is None:
            return
        left = ends - self.time()
        if not self.alive:
            settle(EngineUnreachable("this process is dead"))
            return
        if self.world.reaches(self, address):
            self.gone_since.pop(address, None)
        elif self.time() - self.gone_since.setdefault(address, self.time()) > GONE_SECONDS:
            settle(EngineUnreachable(f"{address} is not connected"))
            return
        if left <= 1e-9:
            settle(EngineUnreachable(f"{address} did not answer within {timeout:.1f} s"))
            return
        self.world.send(self, address, caller, message)
        self.after(min(left, REPEAT_SECONDS), lambda: self._say(caller, address, message, timeout, ends))

    def keep_only(self, addresses: set[str]) -> None:
        pass


class DirectoryProcess(Asking):
    """The real directory."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "directory")
        self.directory = Directory(self.time(), SETTLE_SECONDS)
        self.answers: dict[Caller, Answer] = {}
        self.recovery: asyncio.Task[None] | None = None
        world.join(self, DIRECTORY)
        self.after(LOOK_SECONDS, self.look)

    def look(self) -> None:
        """As ``DirectoryServer``: settle what a client has left."""
        if (self.recovery is None or self.recovery.done()) and self.directory.recovery_due(self.time()):
            self.world.log(self.name, "recovers")
            self.recovery = self.create_task(self.recover())
        self.after(LOOK_SECONDS, self.look)

    async def recover(self) -> None:
        try:
            await self.group().recover(deadline=RECOVERY_SECONDS, resume=True)
        except ArealError as error:
            self.world.log(self.name, f"cannot recover: {error}")
            await asyncio.sleep(BEAT_SECONDS)

    def hear(self, caller: Caller, message: Any) -> None:
        if not isinstance(message, DirectoryRequest):  # an answer to what it asks, as a client, of engines or of itself
            super().hear(caller, message)
            return
        if caller not in self.answers:
            self.answers[caller] = self.directory.handle(message, self.time())
        self.world.send(self, caller.peer, caller, self.answers[caller])


class EngineProcess(Process):
    """An engine, its time, and its beats.

    Attributes:
        failing: calls or workers' steps that will fail.
    """

    def __init__(self, world: World, info: EngineInfo, rank: int) -> None:
        super().__init__(world, f"engine-{rank}.{info.pid}", world.clock())
        self.rank = rank
        self.failing = 0
        self.engine = Engine(info=info, log=functools.partial(world.log, self.name))
        # It serves once it has heard from the directory what the group has agreed on.
        self.engine.running = self.joined = False
        self._stepping = False
        world.join(self, info.address)
        self.after(world.dice.uniform(0, TICK_SECONDS), self.tick)
        self.after(world.dice.uniform(0, BEAT_SECONDS), self.beat)

    def hear(self, caller: Caller, message: Any) -> None:
        if caller.peer == self.name.encode():
            if isinstance(message, Registered):
                self.registered(message)
            return
        self.engine.receive(caller, message, self.time())
        self.flush()

    def tick(self) -> None:
        participant, now = self.engine.participant, self.time()
        if effects := participant.tick(now):
            self.engine.carry_out(effects)
            self.flush()
        if participant.update and participant.phase == "receiving" and now > participant.update.ends:
            raise Violation("leftover", f"{self.name} receives an update whose time is over")
        self.after(TICK_SECONDS, self.tick)

    def registered(self, message: Registered) -> None:
        """The directory has answered a beat."""
        engine = self.engine
        engine.carry_out(engine.participant.group_at(message.version, message.agreed))
        if not self.joined:
            self.joined = True
            engine.running = engine.participant.flow == "running"
            self.world.check(self.rank)
        self.flush()

    def beat(self) -> None:
        beat = self.engine.participant.beat(self.engine.info)
        self.world.send(self, DIRECTORY, new_caller(self), beat)
        self.after(BEAT_SECONDS, self.beat)

    def flush(self) -> None:
        """Answers go out, and what waits goes on a moment later."""
        engine = self.engine
        self.world.switched[engine.participant.version].add(self.rank)
        for caller, answer in engine.replies:
            self.world.send(self, caller.peer, caller, answer)
        engine.replies.clear()
        if not self._stepping and engine.busy:
            self._stepping = True
            self.after(self.world.dice.uniform(0.0001, 0.003), self.step)

    def step(self) -> None:
        self._stepping = False
        engine = self.engine
        part = self.world.dice.choice(engine.parts())
        if part == engine.step:
            call = engine.calls[0]
            fails = self._fails()
            if isinstance(call, CallCommit):
                self.world.switching(self.rank, call)
            engine.step(fails)
            self.world.check(self.rank)
        elif isinstance(part, functools.partial):
            part(fails=self._fails())
        else:
            part()
            if part == engine.become_idle:
                self.world.check(self.rank)
        self.flush()

    def _fails(self) -> bool:
        self.failing -= 1
        return self.failing >= 0


@dataclasses.dataclass
class Call:
    """A trainer's update.

    Attributes:
        outcome: None while it is under way; then the result, or the error.
        slept: seconds for which the process could do nothing.
    """

    version: str
    deadline: float
    started: float
    outcome: object = None
    seconds: float = 0.0


class Trainer(Asking):
    """A trainer."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.calls: list[Call] = []
        self.engines = self.group()
        world.join(self)

    # What it does

    def update(self, version: str, deadline: float, on_phase: Callable[[str], None] = nothing) -> Call:
        """Start an update. ``on_phase`` hears the group's phases, and ``receiving`` in the middle of the bytes."""
        call = Call(version, deadline, started=self.world.now)
        self.calls.append(call)
        self.run(lambda: self.create_task(self._update(call, on_phase)))
        return call

    def resume(self, pauses_first: bool, deadline: float) -> None:
        """Start a user's own resume, or a pause and a resume."""

        async def run() -> None:
            for work in (self.engines.pause, self.engines.resume) if pauses_first else (self.engines.resume,):
                with contextlib.suppress(ArealError):
                    await work(deadline=deadline)

        self.run(lambda: self.create_task(run()))

    async def _update(self, call: Call, on_phase: Callable[[str], None]) -> None:
        def announce(phase: str) -> None:
            self.world.log(self.name, f"phase {phase}")
            on_phase(phase)

        started = self.time()
        try:
            options = {"deadline": call.deadline, "on_phase": announce}
            async with self.engines.update(call.version, **options) as update:
                # What ``send`` does on its thread.
                await update._begin({name: {0: Sender(transfer=Disk(path="/"))} for name in update.engines})
                loop = asyncio.get_running_loop()
                sending = Sending(self.engines, loop, update.engines, call.version, update.ends)
                for index in range(BUCKETS):
                    await sending.announce(
                        Bucket(epoch=0, update=update._coordinator.update, index=index, nbytes=0, segments=())
                    )
                    if not index:
                        announce("receiving")
                update.sent_by(0, BUCKETS, 0, [])
            outcome: object = update.result
        except Exception as error:
            outcome = error
        if self.alive:
            call.outcome, call.seconds = outcome, self.time() - started
            self.world.log(self.name, f"update to {call.version} ends after {call.seconds:.3f} s: {outcome!r}")


def new_caller(process: Process) -> Caller:
    return Caller(process.name.encode(), next(IDS).to_bytes(16, "big"))


def brief(message: Message) -> str:
    """A message, for the trace."""
    if isinstance(message, Status):
        return f"Status({message.version}, {message.phase}, {message.flow} {message.paused_for}, {message.update})"
    if isinstance(message, Register):
        return f"Register({message.engine.dp_rank}, epoch={message.epoch})"
    fields = {name: value for name in message.__struct_fields__ if (value := getattr(message, name)) not in ("", 0, ())}
    return f"{type(message).__name__}({', '.join(f'{name}={value}' for name, value in fields.items())})"[:160]


class SimulatedTime:
    """Stands for the module ``time`` in the client's code: the time of the process that runs."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()


@contextlib.contextmanager
def simulated_time() -> Iterator[None]:
    """The client reads its process's clock meanwhile."""
    with (
        mock.patch.object(client_group, "time", SimulatedTime),
        mock.patch.object(client_update, "time", SimulatedTime),
        mock.patch.object(client_sending, "time", SimulatedTime),
    ):
        yield
