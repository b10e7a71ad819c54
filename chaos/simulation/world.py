"""Engines, a directory and trainers, and what happens to them."""

from __future__ import annotations

import asyncio
import collections
import functools
import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from areal_vllm_ext.engine_core.participant import CallCommit
from areal_vllm_ext.protocol import (
    Abort,
    Commit,
    DirectoryRequest,
    EngineRequest,
    Message,
    Resume,
    Version,
)
from areal_vllm_ext.protocol.server import ReplyTo

from .account import Account, Served
from .base import IDS, Violation, brief, nothing, require
from .client import Trainer
from .coverage import Coverage
from .engine import engine_info
from .network import Network
from .process import Clock, Process
from .servers import DirectoryProcess, EngineProcess

OnSend = Callable[[Process, Process, ReplyTo, Message, bool], None]


class World:
    """Engines, a directory and trainers, and what happens to them.

    Attributes:
        now: the true time, in seconds.
        switched: by version, the engines that ever committed it.
        replicas: how many replicas the engines belong to.
        resume_orphans: whether recovery resumes engines that a client has left paused.
        not_promised: what happened in which ``docs/transactions.md`` promises no single version; empty if nothing did.
        on_send: called with every message that is sent, and whether it will arrive.
        sent: the latest requests with their senders, for ``replay``; None where nothing is replayed.
    """

    def __init__(
        self,
        engines: int,
        dice: random.Random,
        trace: bool = False,
        coverage: Coverage | None = None,
        *,
        replicas: int = 1,
        resume_orphans: bool = True,
    ) -> None:
        self.dice = dice
        self.replicas, self.resume_orphans = replicas, resume_orphans
        self.now = 0.0
        self.events = 0
        self.lines: list[str] | None = [] if trace else None
        self.on_send: OnSend = nothing
        self.sent: collections.deque[tuple[Process, bytes, Message]] | None = None
        self._heap: list[tuple[float, int, Process, Any]] = []
        self._order = itertools.count()
        self._listening: dict[str, Process] = {}
        self._processes: dict[bytes, Process] = {}
        self.network = Network(self.dice)
        self.switched: dict[Version, set[int]] = collections.defaultdict(set)
        self.not_promised = ""
        self.coverage = coverage or Coverage()
        self._epochs: dict[Version, int] = {}
        self._begun: set[str] = set()
        # When the network last lost what a process has sent to the directory.
        self._unheard: dict[str, float] = {}
        self.account = Account()
        self._incarnations = itertools.count(1)
        self.drift = 0.0
        self.engines: list[EngineProcess] = []
        self.start_directory()
        for rank in range(engines):
            self.engines.append(self._new_engine(rank, engines))
            self.account_for(rank)
        self.trainers: list[Trainer] = []

    # Processes

    def clock(self) -> Clock:
        return Clock(self.dice.uniform(0, 1e6), 1 + self.dice.uniform(-self.drift, self.drift))

    def join(self, process: Process, address: str = "") -> None:
        self._processes[process.name.encode()] = process
        if address:
            self._listening[address] = process

    def start_directory(self) -> None:
        """Start the directory, unless it is there."""
        if not hasattr(self, "directory") or not self.directory.alive:
            self.directory = DirectoryProcess(self)

    def crash_directory(self) -> None:
        self.directory.kill()
        self.remember()

    def _new_engine(self, rank: int, engines: int) -> EngineProcess:
        info = engine_info(rank, engines, next(self._incarnations), self.replicas)
        return EngineProcess(self, info, rank)

    def crash_engine(self, rank: int) -> None:
        self.engines[rank].kill()
        self.account_for(rank)
        self.remember()
        self.log(self.engines[rank].name, "crashes")

    def restart_engine(self, rank: int) -> None:
        """Start a dead engine again, with its first weights and without a memory."""
        if not self.engines[rank].alive:
            self.engines[rank] = self._new_engine(rank, len(self.engines))
            self.log(self.engines[rank].name, "is back")

    def trainer(self, name: str = "") -> Trainer:
        self.trainers.append(Trainer(self, name or f"trainer-{len(self.trainers) + 1}"))
        return self.trainers[-1]

    # Events

    def at(self, when: float, process: Process, callback: Any, order: int | None = None) -> None:
        """Call ``callback`` in ``process`` at the true time ``when``; ``order`` decides between simultaneous events."""
        heapq.heappush(self._heap, (when, next(self._order) if order is None else order, process, callback))

    def run(self, until: float, done: Callable[[], bool] | None = None) -> None:
        """Play events up to the time ``until``, or until ``done``."""
        heap, heappop, set_loop = self._heap, heapq.heappop, asyncio._set_running_loop
        timer_class, current = asyncio.TimerHandle, None
        try:
            while heap and heap[0][0] <= until and not (done and done()):
                when, order, process, callback = heappop(heap)
                if not process.alive:
                    continue
                if process.asleep:
                    process.waiting.append((order, callback))
                    continue
                self.now = max(self.now, when)
                if callback.__class__ is timer_class:
                    if callback.cancelled():
                        continue
                    callback = callback._run
                self.events += 1
                # ``process.run(callback)``, without leaving the loop after each event
                if process is not current:
                    set_loop(process)
                    current = process
                callback()
                ready = process.ready
                while ready:
                    handle = ready.popleft()
                    if not handle.cancelled():
                        handle._run()
        finally:
            set_loop(None)
        if not (done and done()):
            self.now = max(self.now, until)

    def log(self, who: str, what: object) -> None:
        if self.lines is not None:
            self.lines.append(f"{self.now:8.4f} {who:10s} {what}")

    # Messages

    def send(self, source: Process, target: str | bytes, caller: ReplyTo, message: Message) -> None:
        """Send a message to an address, or back to the process that asked."""
        receiver = self._listening.get(target) if isinstance(target, str) else self._processes.get(target)
        if not source.alive or receiver is None:
            return
        arrive: Callable[[], None] = functools.partial(receiver.hear, caller, message)
        if self.lines is not None:
            arrive = functools.partial(self._arrive, source, receiver, caller, message)
        if not self.network.passes(source, receiver):
            self.on_send(source, receiver, caller, message, False)
            # When a link is joined again, either the kernel delivers what was in flight, or the connection has ended.
            if self.dice.random() < 0.5:
                self.network.held.append((receiver, arrive))
            return
        if self.sent is not None and isinstance(message, EngineRequest | DirectoryRequest):
            self.sent.append((receiver, caller.peer, message))
        delays = self.network.delays(self.now)
        if not delays and receiver is self.directory:
            self._unheard[source.name] = self.now
        self.on_send(source, receiver, caller, message, bool(delays) and receiver.alive)
        for delay in delays:
            heapq.heappush(self._heap, (self.now + delay, next(self._order), receiver, arrive))

    def replay(self, seconds: float) -> None:
        """Deliver a copy of some earlier request after ``seconds``, when the receiver has forgotten that it answered it."""
        if self.sent:
            receiver, peer, message = self.dice.choice(self.sent)
            caller = ReplyTo(peer, next(IDS).to_bytes(16, "big"))
            self.at(self.now + seconds, receiver, functools.partial(self._replayed, receiver, caller, message))

    def _replayed(self, receiver: Process, caller: ReplyTo, message: Message) -> None:
        if self.lines is not None:
            self.log(receiver.name, f"<- again: {brief(message)}")
        receiver.hear(caller, message)

    def _arrive(self, source: Process, receiver: Process, caller: ReplyTo, message: Message) -> None:
        self.log(receiver.name, f"<- {source.name} {brief(message)}")
        receiver.hear(caller, message)

    def reaches(self, source: Process, address: str) -> bool:
        """Return whether a connection from ``source`` to ``address`` would stand."""
        receiver = self._listening.get(address)
        passes = self.network.passes
        return bool(receiver and receiver.alive and passes(source, receiver) and passes(receiver, source))

    def cut_off(self, places: set[str]) -> None:
        """Cut some places off from the others. What an earlier cut had separated can be on one side then."""
        if self.network.cut:
            self.network.joined = self.now
        self.network.cut |= places

    def join_links(self) -> None:
        """End every cut."""
        self.network.joined = self.now
        self.network.cut.clear()
        self.network.blocked.clear()
        for receiver, arrive in self.network.held:
            self.at(self.now + self.dice.uniform(0, 0.5), receiver, arrive)
        self.network.held.clear()

    # Invariants

    def check(self, rank: int) -> None:
        """Check that all serving engines have one version, after ``rank`` has changed."""
        self.account_for(rank)
        versions = self.account.versions
        require(len(versions) <= 1, "mixed versions", f"engines serve {sorted(map(str, versions))}")
        engine = self.engines[rank].engine
        require(not (engine.tainted and engine.running), "wrong tokens", f"engine {rank} serves tainted weights")

    def account_for(self, rank: int) -> None:
        """Note what engine ``rank`` serves now."""
        process = self.engines[rank]
        participant, served = process.engine.participant, None
        if process.serves:
            engine = process.engine
            proven = engine.version if engine.tells_the_truth else None
            served = Served(process.name, participant.version, proven, engine.units)
            self.account.newest = max(self.account.newest, participant.committed_epoch)
        self.account.serves(rank, served, self.now)

    def committed(self, rank: int) -> None:
        """Note the version that engine ``rank`` has committed, and its epoch."""
        participant = self.engines[rank].engine.participant
        self._epochs[participant.version] = participant.committed_epoch
        self.switched[participant.version].add(rank)

    def returned(self, version: Version) -> None:
        """Note that an update has returned as committed: from now on no engine may serve older weights."""
        self.account.newest = max(self.account.newest, self._epochs.get(version, 0))
        self.remember()

    def remember(self) -> None:
        """Note what living processes remember of committed epochs."""
        epochs = [one.engine.participant.committed_epoch for one in self.engines if one.alive]
        if self.directory.alive:
            epochs.append(self.directory.newest)
        self.account.remembered(max(epochs, default=0), self.now)

    def received(self, engine: EngineProcess, caller: ReplyTo, message: Any) -> None:
        """Note a request that has come to an engine.

        A network that is cut in two can have two commanders, each on its side: the documentation does not promise one
        version then. So a violation does not count after an engine has obeyed a client that another engine has been fenced
        from, if that client could not reach the directory. The same holds after a client has decided without an engine
        that it could not reach, or that was frozen.
        """
        self.coverage.message(engine.engine.participant, message)
        source = self._processes.get(caller.peer)
        if isinstance(message, Abort) and source is not None:
            self._aborts(source, engine, message)
        if self.not_promised or source is None or not isinstance(message, Abort | Commit | Resume):
            return
        passes, directory = self.network.passes, self.directory
        living = [one for one in self.engines if one.alive and one is not engine]
        if any(one.engine.participant.epoch > message.epoch for one in living):
            obeyed = message.epoch >= engine.engine.participant.epoch
            there = directory.alive and not directory.asleep
            if obeyed and not (there and passes(source, directory) and passes(directory, source)):
                self.not_promised = "a network was cut in two"
        else:  # it decides without an engine that is, or just was, out of its reach
            recent = self.now - 2.0
            behind = [one for one in living if one.engine.participant.epoch < message.epoch]
            if any(one.asleep or one.woke > recent for one in behind):
                self.not_promised = "an engine was frozen while others decided"
            if any(self.network.joined > recent or not (passes(source, one) and passes(one, source)) for one in behind):
                self.not_promised = "a network was cut in two"

    def _aborts(self, source: Process, engine: EngineProcess, message: Abort) -> None:
        """Check that a client that aborts an update has not fenced an engine that commits or has committed it."""
        p, passes = engine.engine.participant, self.network.passes
        if p.update is None or p.update.begin.update != message.update or message.epoch < p.epoch:
            return
        for one in self.engines:
            other = one.engine.participant
            commits = (
                other.update_phase == "committing" and other.update and other.update.begin.update == message.update
            )
            committed = (commits or other.last_update == message.update) and other.epoch == message.epoch
            if committed and one.alive and not one.asleep and passes(source, one) and passes(one, source):
                raise Violation("rule", f"{source.name} aborts on {engine.name} what {one.name} has committed")

    def begins(self, targets: set[str], *, drop_lost: bool) -> None:
        """Note that an update begins without engines that are alive, if the documentation says that they may go on serving.

        Args:
            targets: the addresses of the engines that are in the update.
            drop_lost: whether it goes on without lost engines.
        """
        without = [one for one in self.engines if one.alive and one.joined and one.engine.info.address not in targets]
        if without and drop_lost:
            self.not_promised = self.not_promised or "drop_lost, and the lost engine was alive"
        elif any(one.engine.info.replica not in self.directory.replicas for one in without):
            self.not_promised = self.not_promised or "a restarted directory did not hear of a replica"

    def joins(self, epoch: int) -> None:
        """Note that an engine joins, or is no longer stale, at the group's committed epoch as far as the directory knows it.

        A directory that has restarted knows what it hears. The documentation does not promise one version if every engine
        that knows a newer epoch is out of its reach, or its heartbeats are lost.
        """
        for process in self.engines:
            if process.alive and process.engine.participant.committed_epoch > epoch:
                network, recently = self.network, self.now - 2.0
                reached = network.passes(process, self.directory) and network.passes(self.directory, process)
                unheard = self._unheard.get(process.name, 0.0)
                reached = reached and max(network.joined, process.woke, unheard) < recently
                if process.asleep or not reached:
                    self.not_promised = self.not_promised or "a restarted directory did not hear of the newest version"

    def check_history(self) -> None:
        """Check that all engines together have behaved like one register of weights."""
        writes = [call.write() for trainer in self.trainers for call in trainer.calls]
        found = self.account.problems(writes, self.now)
        require(not found, "history", "; ".join(found[:3]))

    def switching(self, rank: int, call: CallCommit) -> None:
        """Check, when the first engine of an update commits, that its engines are ready and others are paused."""
        if call.update in self._begun:
            return
        self._begun.add(call.update)
        for other, process in enumerate(self.engines):
            p = process.engine.participant
            if call.update in process.engine.begun:
                ready = p.update is not None and p.update.begin.update == call.update and p.generation == "paused"
                ready = ready and p.update_phase in ("prepared", "committing")
            else:  # this incarnation is not in the update
                ready = not process.engine.running
            require(
                ready or not (process.alive and process.joined),
                "rule",
                f"engine {rank} commits while engine {other} is {p.update_phase}, {p.generation}",
            )
