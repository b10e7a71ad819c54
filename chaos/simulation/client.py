"""The real client on a simulated connection."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from unittest import mock

from areal_vllm_ext.client import context as client_context
from areal_vllm_ext.client import driver as client_driver
from areal_vllm_ext.client import group as client_group
from areal_vllm_ext.client import sleeping as client_sleeping
from areal_vllm_ext.client import transaction as client_transaction
from areal_vllm_ext.client.group import AsyncEngineGroup
from areal_vllm_ext.client.lora import SentAdapter
from areal_vllm_ext.client.sending import Sending, SendReport
from areal_vllm_ext.client.state import UpdateResult
from areal_vllm_ext.control import command as control_command
from areal_vllm_ext.control.link import Link
from areal_vllm_ext.errors import ArealError, EngineUnreachable, UpdateInDoubt, WeightsTainted
from areal_vllm_ext.protocol import Adapter, Answer, Bucket, Disk, Message, Sender
from areal_vllm_ext.protocol.server import ReplyTo
from chaos.history import Write

from .base import BUCKETS, DIRECTORY, GONE_SECONDS, REPEAT_SECONDS, nothing
from .process import Process, new_caller

# Of seven updates, one each brings an adapter beside weights, brings only an adapter, removes it, and brings a drafter. The
# name of the version decides, so that dice fall as without these.
WITH_ADAPTER, ADAPTER_ONLY, WITHOUT_ADAPTER, WITH_DRAFTER = range(4)

if TYPE_CHECKING:
    from typing import Unpack

    from areal_vllm_ext.client.options import UpdateOptions
    from areal_vllm_ext.protocol import PauseMode

    from .world import World

ASK_SECONDS = 0.25


class SimulatedLink(Link):
    """The real link on a simulated connection, which needs no closing."""

    def __del__(self) -> None:
        pass


class Asked:
    """Stands for ``connection.RequestBatch``."""

    def __init__(self, process: Asking) -> None:
        self.callers: list[ReplyTo] = []
        self._process = process

    def cancel(self) -> None:
        for caller in self.callers:
            self._process.pending.pop(caller, None)


class Asking(Process):
    """A process that commands engines: the real client on a simulated connection."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, world.clock())
        self.pending: dict[ReplyTo, Callable[[Answer], None]] = {}
        self.gone_since: dict[str, float] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Stands for the loop of a connection."""
        return self

    def group(self) -> AsyncEngineGroup:
        """Return the real client, on this process's loop."""
        return AsyncEngineGroup(self.link(), DIRECTORY, self.name)

    def link(self) -> Link:
        """Return the real link, over the simulated connection."""
        link = SimulatedLink(None, 16 << 20)
        link._connection = self  # type: ignore[assignment]
        return link

    def hear(self, caller: ReplyTo, message: Any) -> None:
        if settle := self.pending.get(caller):
            settle(message)

    # The methods of ``Connection`` that the link calls

    def ask(
        self,
        requests: Mapping[str, tuple[str, Message]],
        timeout: float,
        heard: Callable[[str, Answer | EngineUnreachable], None],
    ) -> Asked:
        """Send each request every second under one id, as ``Connection.ask`` does, until it is answered or times out."""
        asked = Asked(self)
        said: list[tuple[ReplyTo, str, Message]] = []
        for name, (address, message) in requests.items():
            caller = new_caller(self)
            said.append((caller, address, message))
            self.pending[caller] = functools.partial(self._settle, caller, functools.partial(heard, name))
        asked.callers = [caller for caller, _, _ in said]
        self._say(said, timeout, self.time() + timeout)
        return asked

    def _settle(self, caller: ReplyTo, heard: Callable[[Any], None], outcome: Answer | EngineUnreachable) -> None:
        del self.pending[caller]
        heard(outcome)

    def _say(self, requests: list[tuple[ReplyTo, str, Message]], timeout: float, ends: float) -> None:
        """Send what is not answered yet, and again a second later."""
        now, again = self.time(), []
        left = ends - now
        for request in requests:
            caller, address, message = request
            if (settle := self.pending.get(caller)) is None:
                continue
            if not self.alive:
                settle(EngineUnreachable("this process is dead"))
                continue
            if self.world.reaches(self, address):
                self.gone_since.pop(address, None)
            elif now - self.gone_since.setdefault(address, now) > GONE_SECONDS:
                settle(EngineUnreachable(f"{address} is not connected"))
                continue
            if left <= 1e-9:
                settle(EngineUnreachable(f"{address} did not answer within {timeout:.1f} s"))
                continue
            self.world.send(self, address, caller, message)
            again.append(request)
        if again:
            self.after(min(left, REPEAT_SECONDS), functools.partial(self._say, again, timeout, ends))

    def keep_only(self, addresses: set[str]) -> None:
        pass


@dataclasses.dataclass
class Call:
    """A trainer's update.

    Attributes:
        outcome: None while the update runs; then its result or its error.
        seconds: how long the update took by the trainer's clock.
        ended: the true time of the end.
    """

    version: str
    timeout: float
    started: float
    outcome: object = None
    seconds: float = 0.0
    ended: float = math.inf

    def write(self) -> Write:
        """Return the update as a write of the history."""
        if isinstance(self.outcome, UpdateResult):
            return Write(self.version, self.started, self.ended, "committed")
        unclear = (UpdateInDoubt, WeightsTainted, asyncio.CancelledError)
        unknown = self.outcome is None or isinstance(self.outcome, unclear)
        return Write(self.version, self.started, self.ended, "unknown" if unknown else "aborted")


class Trainer(Asking):
    """A trainer."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.calls: list[Call] = []
        self.engines = self.group()
        self._updating: asyncio.Task[None] | None = None
        world.join(self)

    def update(
        self,
        version: str,
        timeout: float,
        on_phase: Callable[[str], None] = nothing,
        seconds: float = 0.0,
        **options: Unpack[UpdateOptions],
    ) -> Call:
        """Start an update; ``on_phase`` is called with each phase, and with ``receiving`` between two buckets.

        Args:
            version: of the weights.
            timeout: of the update.
            on_phase: see above.
            seconds: how long the second bucket takes to fill.
            options: of the update.
        """
        call = Call(version, timeout, started=self.world.now)
        self.calls.append(call)

        def start() -> None:
            self._updating = self.create_task(self._update(call, on_phase, seconds, options))

        self.run(start)
        return call

    def interrupt(self) -> None:
        """Cancel the update that runs, as a user does with the task."""
        if self.alive and not self.asleep and (task := self._updating):
            self.run(task.cancel)

    def forget(self, replica: str, dp_rank: int) -> None:
        """Give up an engine for good."""

        async def run() -> None:
            with contextlib.suppress(ArealError):
                await self.engines.forget(replica, dp_rank)

        self.run(lambda: self.create_task(run()))

    def look(self) -> None:
        """Ask for the status of every engine."""

        async def run() -> None:
            with contextlib.suppress(ArealError):
                await self.engines.status()

        self.run(lambda: self.create_task(run()))

    def command(
        self,
        *steps: str,
        timeout: float,
        done: Callable[[object], None] = nothing,
        resumes: int = 1,
        mode: PauseMode = "keep",
        lease: float | None = 30.0,
    ) -> None:
        """Start the commands of a user, in turn; ``done`` is called after each, with None or its error.

        A resume or a waking that fails is tried again, ``resumes`` times in all.
        """

        async def run() -> None:
            for step in steps:
                for _ in range(resumes if step in ("resume", "wake up") else 1):
                    try:
                        if step == "pause":
                            await self.engines.pause(mode, timeout=timeout, lease=lease)
                        elif step == "resume":
                            await self.engines.resume(timeout=timeout)
                        elif step == "wake up":
                            await self.engines.wake_up(timeout=timeout)
                        elif step == "wake weights":
                            await self.engines.wake_up(["weights"], timeout=timeout)
                        else:
                            await self.engines.sleep(2 if step == "sleep 2" else 1, mode=mode, timeout=timeout)
                    except ArealError as error:
                        done(error)
                        await asyncio.sleep(2.0)
                    else:
                        done(None)
                        break

        self.run(lambda: self.create_task(run()))

    async def _update(
        self, call: Call, on_phase: Callable[[str], None], seconds: float, options: UpdateOptions
    ) -> None:
        def announce(phase: str) -> None:
            self.world.log(self.name, f"phase {phase}")
            on_phase(phase)

        started = self.time()
        try:
            options["on_phase"] = announce
            async with self.engines.update(call.version, timeout=call.timeout, **options) as update:
                # The steps of ``send``, which would take a thread.
                transaction = update.transaction
                driver, delivery, changes = transaction.driver, transaction.delivery, transaction.adapters
                kind = zlib.crc32(f"units of {call.version}".encode()) % 7
                if kind in (WITH_ADAPTER, ADAPTER_ONLY):
                    changes.add("a", SentAdapter(Adapter("a", "{}", str(call.version)), {}, []))
                elif kind == WITHOUT_ADAPTER:
                    changes.remove("a")
                elif kind == WITH_DRAFTER:
                    transaction.draft.outcome = "sent"
                targets = {engine.address for engine, _ in delivery.engines.values()}
                self.world.begins(targets, drop_lost=options.get("drop_lost", False))
                senders = {name: {0: Sender(transfer=Disk(path="/"))} for name in delivery.engines}
                await driver.begin(senders, delivery.stagings())
                sending = Sending(transaction.context, delivery.engines)
                for index in range(BUCKETS):
                    await sending.announce(
                        Bucket(epoch=0, update=driver.coordinator.update, index=index, nbytes=0, segments=())
                    )
                    if not index:
                        announce("receiving")
                        await asyncio.sleep(min(seconds, max(transaction.context.left, 0.0)))
                if kind == ADAPTER_ONLY:
                    delivery.buckets[0] = BUCKETS
                else:
                    delivery.record(0, SendReport(BUCKETS, 0, [], 0))
                if zlib.crc32(str(call.version).encode()) % 5 == 0:  # some are held after the votes
                    await update.prepare()
                    announce("prepared")
                    await asyncio.sleep(min(seconds, max(transaction.context.left, 0.0)))
            outcome: object = update.result
        except (Exception, asyncio.CancelledError) as error:
            outcome = error
        if self.alive:
            call.outcome, call.seconds, call.ended = outcome, self.time() - started, self.world.now
            if isinstance(outcome, UpdateResult):
                self.world.returned(call.version)
            self.world.log(self.name, f"update to {call.version} ends after {call.seconds:.3f} s: {outcome!r}")


class SimulatedTime:
    """Stands for the module ``time`` in the client's code: reads the clock of the process that runs."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()


@contextlib.contextmanager
def simulated_time() -> Iterator[None]:
    """Let the client read its process's clock inside this context."""
    with (
        mock.patch.object(client_group, "time", SimulatedTime),
        mock.patch.object(control_command, "time", SimulatedTime),
        mock.patch.object(client_context, "time", SimulatedTime),
        mock.patch.object(client_driver, "time", SimulatedTime),
        mock.patch.object(client_transaction, "time", SimulatedTime),
        mock.patch.object(client_sleeping, "time", SimulatedTime),
        # Fewer events: how often a client asks for a lease that is held changes nothing else.
        mock.patch.object(control_command, "_ASK_SECONDS", ASK_SECONDS),
    ):
        yield
