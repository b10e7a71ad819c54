"""The directory and an engine as processes of the simulation."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from areal_vllm_ext.control.awake_clock import AwakeClock
from areal_vllm_ext.control.command import Commander
from areal_vllm_ext.control.directory import Directory
from areal_vllm_ext.engine_core.effects import AskPeer, CallCommit, CallCommitFetched
from areal_vllm_ext.engine_core.status import beat_of
from areal_vllm_ext.errors import ArealError
from areal_vllm_ext.protocol import Answer, Begin, DirectoryRequest, EngineInfo, Engines, Register, Registered, timing
from areal_vllm_ext.protocol.server import ReplyTo

from .base import (
    DIRECTORY,
    IDLE_WATCH_SECONDS,
    RECOVERY_SECONDS,
    STEP_SECONDS,
    TICK_SECONDS,
    WATCH_SECONDS,
    Violation,
)
from .client import Asking
from .engine import Engine
from .process import Process, new_caller

if TYPE_CHECKING:
    from .world import World


class DirectoryProcess(Asking):
    """The real directory and its recovery."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "directory")
        self.awake_time = AwakeClock(self.time)
        self.directory = Directory(self.awake_time(), timing.SETTLE_SECONDS)
        self.answers: dict[ReplyTo, Answer] = {}
        self.recovery: asyncio.Task[None] | None = None
        self.replicas: set[str] = set()  # of which it has heard an engine
        world.join(self, DIRECTORY)
        self._watches = 0  # only the last watch that was planned counts
        self.watch()

    @property
    def newest(self) -> int:
        """The highest committed epoch that it has heard of."""
        return self.directory._newest.committed_epoch if self.directory._newest else 0

    def watch(self) -> None:
        """Recover what a client has left, as ``DirectoryServer`` does."""
        now = self.awake_time()
        if (self.recovery is None or self.recovery.done()) and self.directory.recovery_due(now):
            self.world.log(self.name, "recovers")
            self.recovery = self.create_task(self.recover())
        needed = any(beat.needs_recovery for beat in self.directory._heartbeats.values())
        self._watches += 1
        self._idle = not needed
        self.after(WATCH_SECONDS if needed else IDLE_WATCH_SECONDS, functools.partial(self._watch_again, self._watches))

    def _watch_again(self, number: int) -> None:
        if number == self._watches:
            self.watch()

    async def recover(self) -> None:
        try:
            resume = self.world.resume_orphans
            await Commander(self.link(), DIRECTORY, self.name).recover(RECOVERY_SECONDS, resume=resume)
        except ArealError as error:
            self.world.log(self.name, f"cannot recover: {error}")
            await asyncio.sleep(timing.HEARTBEAT_SECONDS)

    def hear(self, caller: ReplyTo, message: Any) -> None:
        if not isinstance(message, DirectoryRequest):  # an answer to a request of its recovery
            super().hear(caller, message)
            return
        if isinstance(message, Register):
            self.replicas.add(message.engine.replica)
        if caller not in self.answers:
            self.answers[caller] = self.directory.handle(message, self.awake_time())
            if self._idle and isinstance(message, Register) and message.needs_recovery:
                self.watch()
        self.world.send(self, caller.peer, caller, self.answers[caller])


class EngineProcess(Process):
    """An engine with time: its steps take a while, and it sends heartbeats.

    Attributes:
        failing: how many of the next calls or workers' steps will fail.
        full: whether no worker has memory for another update.
        stuck: what does not return: ``calls`` of the engine's loop, its ``pause``, ``workers``.
        slowness: the longest time that a step takes, in seconds.
    """

    def __init__(self, world: World, info: EngineInfo, rank: int) -> None:
        super().__init__(world, f"engine-{rank}.{info.pid}", world.clock())
        self.rank = rank
        self.failing = 0
        self.full = False
        self.stuck: frozenset[str] = frozenset()
        self.slowness = STEP_SECONDS
        self.engine = Engine(
            info=info, log=functools.partial(world.log, self.name), resume_orphans=world.resume_orphans, joined=False
        )
        self._stepping = self._ticking = self._started = False
        self._answered = b""
        self._asked: dict[bytes, int] = {}  # numbers of requests to peers
        self.engine.clock, self.engine.peer_at = self.time, self._peer_at
        self._noted = (-1, "")  # the committed epoch and update that the world has noted
        world.join(self, info.address)
        self.after(world.dice.uniform(0, timing.HEARTBEAT_SECONDS), self.beat)

    @property
    def joined(self) -> bool:
        """Whether the directory has answered. Before that the engine's loop does not run."""
        return self.engine.participant.joined

    @property
    def serves(self) -> bool:
        """Whether clients get answers. The steps of a loop that is stuck come later."""
        return self._started and self.alive and not self.asleep and self.engine.running and "calls" not in self.stuck

    def hear(self, caller: ReplyTo, message: Any) -> None:
        if caller.peer == self.name.encode():
            # ZeroMQ keeps the order of answers on a connection, so an older answer never comes after a newer one.
            if isinstance(message, Registered) and caller.request_id > self._answered:
                self._answered = caller.request_id
                self.registered(message)
            elif isinstance(message, Engines):
                self.engine.carry_out(self.engine.returning.engines(message, self.time()))
                self.flush()
            elif (number := self._asked.get(caller.request_id)) is not None:
                self.engine.carry_out(self.engine.returning.answered(number, message, self.time()))
                self.flush()
            return
        self.world.received(self, caller, message)
        self.engine.receive(caller, message, self.time())
        self.flush()

    def sleep(self) -> None:
        super().sleep()
        self.world.account_for(self.rank)

    def wake(self) -> None:
        super().wake()
        self.world.check(self.rank)

    def tick(self) -> None:
        self._ticking = False
        participant, now = self.engine.participant, self.time()
        self.engine.carry_out(participant.tick(now))
        self.engine.carry_out(self.engine.returning.tick(now))
        self.engine.carry_out(self.engine.offers.tick(now))
        if participant.update and participant.update_phase == "receiving" and now > participant.update.ends:
            raise Violation("leftover", f"{self.name} receives an update whose time is over")
        self.flush()

    def registered(self, message: Registered) -> None:
        """Handle the directory's answer to a heartbeat."""
        engine, joined, stale = self.engine, self.joined, self.engine.participant.stale
        settled = message.settled
        engine.carry_out(engine.participant.on_group_epoch(message.version, message.committed_epoch, settled=settled))
        if not joined or (stale and not engine.participant.stale):
            self.world.joins(message.committed_epoch)
        if not joined:
            self._start_loop()
        self.flush()

    def _start_loop(self) -> None:
        if self.joined and not self._started and "calls" not in self.stuck:
            self._started = True
            self.engine.start()
            self.world.check(self.rank)

    def beat(self) -> None:
        beat = beat_of(self.engine.participant, self.engine.info)
        self.world.send(self, DIRECTORY, new_caller(self), beat)
        self.after(timing.HEARTBEAT_SECONDS, self.beat)

    def flush(self) -> None:
        """Send the answers, and let the next step come a moment later."""
        engine, participant = self.engine, self.engine.participant
        if self._noted != (committed := (participant.committed_epoch, participant.last_update)):
            self._noted = committed
            self.world.committed(self.rank)
        if engine.replies:
            for caller, answer in engine.replies:
                self.world.send(self, caller.peer, caller, answer)
            engine.replies.clear()
        for ask in engine.asks:
            caller = new_caller(self)
            if isinstance(ask, AskPeer):
                self._asked[caller.request_id] = ask.number
            self.world.send(self, ask.address if isinstance(ask, AskPeer) else DIRECTORY, caller, ask.message)
        engine.asks.clear()
        if (participant.tainted or participant.stale) and participant.generation == "running":
            engine.carry_out(participant.tick(self.time()))  # as the endpoint does after each message
        # An engine that runs and has no update has nothing that could be over its time.
        waits = participant.update or participant.generation != "running" or participant.tainted or participant.stale
        waits = waits or engine.offers.waiting
        if waits and not self._ticking:
            self._ticking = True
            self.after(TICK_SECONDS, self.tick)
        if not self._stepping and engine.busy:
            self._stepping = True
            self.after(self.world.dice.uniform(0.0001, self.slowness), self.step)

    def _peer_at(self, address: str) -> Engine | None:
        """Return the engine at an address, if bytes pass between its workers and this engine's."""
        if not self.world.reaches(self, address):
            return None
        return next(
            (one.engine for one in self.world.engines if one.engine.info.address == address and not one.asleep), None
        )

    def unstick(self) -> None:
        """End ``stuck``, ``full`` and ``slowness``."""
        self.stuck, self.full, self.slowness = frozenset(), False, STEP_SECONDS
        self._start_loop()
        self.world.check(self.rank)
        self.flush()

    def get_stuck(self, what: frozenset[str]) -> None:
        """Let ``what`` not return until ``unstick``."""
        self.stuck = what
        self.world.account_for(self.rank)

    def _parts(self) -> list[Callable[[], None]]:
        """Return what can happen next, without what is stuck."""
        engine, parts = self.engine, self.engine.parts()
        if self._started and not self.stuck:
            return parts
        if "calls" in self.stuck or not self._started:
            parts = [part for part in parts if part != engine.step]
        if "pause" in self.stuck:
            parts = [part for part in parts if part != engine.become_idle]
        if "workers" in self.stuck:
            parts = [part for part in parts if not isinstance(part, functools.partial)]
        return parts

    def step(self) -> None:
        """Do one or some of the things that can happen next."""
        self._stepping = False
        parts = self._parts()
        while parts:
            self._do(parts)
            if self.world.dice.random() >= 0.5 or not (parts := self._parts()):
                self.flush()
                break

    def _do(self, parts: list[Callable[[], None]]) -> None:
        engine = self.engine
        part = self.world.dice.choice(parts)
        if part == engine.step:
            call = engine.calls[0]
            fails = self._fails()
            if isinstance(call, CallCommit):
                self.world.switching(self.rank, call)
            if isinstance(call, CallCommitFetched) and not fails:
                self.world.coverage.fetched += 1
            engine.step(fails)
            self.world.check(self.rank)
        elif isinstance(part, functools.partial):
            part(fails=self._fails() or (self.full and isinstance(engine.orders[part.args[0]][0], Begin)))
        else:
            part()
            if part in (engine.become_idle, engine.report):
                self.world.check(self.rank)

    def _fails(self) -> bool:
        self.failing -= 1
        return self.failing >= 0
