"""The real client on a simulated connection: trainers, and whoever else commands engines."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

from areal_vllm_ext.client import group as client_group
from areal_vllm_ext.client import sending as client_sending
from areal_vllm_ext.client import update as client_update
from areal_vllm_ext.client.group import AsyncEngineGroup
from areal_vllm_ext.client.sending import Sending
from areal_vllm_ext.control import command as control_command
from areal_vllm_ext.control.link import Link
from areal_vllm_ext.errors import ArealError, EngineUnreachable
from areal_vllm_ext.protocol import Answer, Bucket, Disk, Message, Sender
from areal_vllm_ext.protocol.server import ReplyTo

from .base import BUCKETS, DIRECTORY, GONE_SECONDS, REPEAT_SECONDS, nothing
from .process import Process, new_caller

if TYPE_CHECKING:
    from .world import World


class Asked:
    """As ``connection.Round``."""

    def __init__(self, process: Asking) -> None:
        self.callers: list[ReplyTo] = []
        self._process = process

    def cancel(self) -> None:
        for caller in self.callers:
            self._process.pending.pop(caller, None)


class Asking(Process):
    """A process with the client's connection, which is simulated: a trainer, or whoever else commands engines."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, world.clock())
        self.pending: dict[ReplyTo, Callable[[Answer], None]] = {}
        self.gone_since: dict[str, float] = {}

    def group(self) -> AsyncEngineGroup:
        """The real client, on this process's loop."""
        return AsyncEngineGroup(self.link(), DIRECTORY, self.name)

    def link(self) -> Link:
        """The real requests, over the simulated connection."""
        link = Link(None, 16 << 20)
        link._connection = self  # type: ignore[assignment]
        return link

    def hear(self, caller: ReplyTo, message: Any) -> None:
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

    def _settle(self, caller: ReplyTo, heard: Callable[[Any], None], outcome: Answer | EngineUnreachable) -> None:
        del self.pending[caller]
        heard(outcome)

    def _say(self, caller: ReplyTo, address: str, message: Message, timeout: float, ends: float) -> None:
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

    def command(self, *steps: str, deadline: float, done: Callable[[object], None] = nothing) -> None:
        """Start a user's own ``pause`` and ``resume``, one after the other; ``done`` hears None or the error of each."""

        async def run() -> None:
            for step in steps:
                try:
                    await (self.engines.pause if step == "pause" else self.engines.resume)(deadline=deadline)
                except ArealError as error:
                    done(error)
                else:
                    done(None)

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
                sending = Sending(update.link, loop, update.engines, call.version, update.ends)
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
        mock.patch.object(control_command, "time", SimulatedTime),
        mock.patch.object(client_update, "time", SimulatedTime),
        mock.patch.object(client_sending, "time", SimulatedTime),
    ):
        yield
