"""A session of vLLM's own weight transfer on all engines at once, over the authenticated control plane.

One task holds the group's lease from start to finish, pauses the engines, and carries out one step after the other. The
order of vLLM is kept: ready, pause, start, update (any number), finish, resume.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ... import protocol
from ...client import calls
from ...client.options import PAUSE_LEASE_SECONDS
from ...errors import ArealError, PauseFailed, UpdateAborted, WeightsTainted, join
from ...protocol import transfer_steps

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...control.command import Commander, Target
    from ...protocol import EngineInfo, Version

WHAT = "vLLM's weight transfer"
_ABANDON_SECONDS = 5.0


class Session:
    """Made for one update. ``start``, ``update`` and ``finish`` run on the group's event loop."""

    def __init__(self, commander: Commander, timeout: float) -> None:
        """
        Args:
            commander: of the group.
            timeout: seconds from start to finish; after them the lease is free, and what has begun is tainted.
        """
        self._commander = commander
        self._ends = time.monotonic() + timeout
        self._timeout = timeout
        self._targets: dict[str, Target] = {}
        self._ran: dict[str, Target] = {}
        self._over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[Any] | None = None

    async def start(self) -> None:
        """Take the lease, pause every engine, and have every worker make its model ready.

        Raises:
            UpdateAborted, RequestError, EnginesMissing, PauseFailed: nothing was touched.
            WeightsTainted: a worker failed after another had begun.
        """
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(ready))
        await ready
        try:
            await self._ask(transfer_steps.START, [])
        except BaseException:
            await self.abandon()
            raise

    async def update(self, by_engine: Mapping[str, Any] | Any, *, each: bool = False) -> None:
        """Have every worker receive and load one piece. ``each``: the arguments differ by engine.

        Raises:
            WeightsTainted: a worker failed.
        """
        try:
            await self._ask(transfer_steps.UPDATE, by_engine if each else [by_engine], each=each)
        except BaseException:
            await self.abandon()
            raise

    async def finish(self, version: Version) -> None:
        """Make the models whole, and let the engines run again that ran before.

        Raises:
            WeightsTainted: a worker failed.
            PauseFailed: the new weights are live, and an engine did not resume.
        """
        try:
            await self._ask(transfer_steps.FINISH, [version])
        except BaseException:
            await self.abandon()
            raise
        failed = await self._commander.ask_all(self._ran, _resumes(self._ran), time.monotonic() + 5.0)
        await self._leave()
        if failed:
            raise PauseFailed(f"the new weights are live, but not every engine resumed: {join(failed)}")

    async def abandon(self) -> None:
        """Give the session up. Engines that have begun stay tainted and paused."""
        if self._task is None or self._over.is_set():
            return
        with contextlib.suppress(ArealError):
            engines = {name: target.engine for name, target in self._targets.items()}
            epochs = {name: target.epoch for name, target in self._targets.items()}
            ends = time.monotonic() + _ABANDON_SECONDS
            nothing = msgspec.msgpack.encode([])
            await calls.ask(self._commander, transfer_steps.ABANDON, nothing, engines, epochs, ends)
        await self._leave()

    async def _leave(self) -> None:
        self._over.set()
        assert self._task is not None
        with contextlib.suppress(ArealError):
            await self._task

    async def _hold(self, ready: asyncio.Future[None]) -> None:
        """Hold the lease and the pause until the session is over or its time is."""
        try:
            async with self._commander.command(WHAT, self._timeout) as targets:
                self._targets = targets
                self._ran = {name: target for name, target in targets.items() if target.resumes}
                await self._check_ready()
                await self._pause()
                ready.set_result(None)
                while not self._over.is_set() and time.monotonic() < self._ends:
                    self._keep_paused()
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._over.wait(), min(PAUSE_LEASE_SECONDS / 4, self._left()))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _check_ready(self) -> None:
        engines = {name: target.engine for name, target in self._targets.items()}
        epochs = {name: target.epoch for name, target in self._targets.items()}
        nothing = msgspec.msgpack.encode([])
        answers = await calls.ask(self._commander, transfer_steps.READY, nothing, engines, epochs, self._ends)
        if answers.errors:
            raise UpdateAborted(f"{WHAT} was not begun: {'; '.join(map(str, answers.errors))}")

    async def _pause(self) -> None:
        pauses: dict[str, protocol.EngineRequest] = {
            name: protocol.Pause(
                epoch=target.epoch,
                mode="keep",
                kv="recompute",
                timeout=self._left(),
                holder=self._commander.holder,
                lease=PAUSE_LEASE_SECONDS if name in self._ran else 0.0,
            )
            for name, target in self._targets.items()
        }
        if failed := await self._commander.ask_all(self._targets, pauses, self._ends):
            await self._commander.ask_all(self._ran, _resumes(self._ran), time.monotonic() + 1.0)
            raise PauseFailed(f"{WHAT} was not begun, and the engines run: {join(failed)}")

    def _keep_paused(self) -> None:
        message = protocol.KeepPaused(holder=self._commander.holder, lease=PAUSE_LEASE_SECONDS)
        renewals = {name: (target.engine.address, message) for name, target in self._ran.items()}
        self._renewal = asyncio.create_task(self._commander.link.request_all(renewals, PAUSE_LEASE_SECONDS / 4))

    def _left(self) -> float:
        return max(self._ends - time.monotonic(), 0.05)

    async def _ask(self, step: str, arguments: Any, *, each: bool = False) -> None:
        if self._task is None or self._task.done():
            raise WeightsTainted(
                f"{WHAT} was not finished within {self._timeout:.0f} s, and the engines serve nothing: send again, with a "
                "longer timeout="
            )
        engines = {name: target.engine for name, target in self._targets.items()}
        epochs = {name: target.epoch for name, target in self._targets.items()}
        encode = msgspec.msgpack.encode
        encoded = {name: encode([one]) for name, one in arguments.items()} if each else encode(arguments)
        try:
            found = await calls.ask(self._commander, step, encoded, engines, epochs, self._ends)
            problem = "; ".join(map(str, found.errors))
        except calls.CallFailed as error:
            problem = str(error)
        if problem:
            raise WeightsTainted(
                f"{WHAT} failed at {transfer_steps.name_of(step)}: {problem}; the engines that had begun are tainted and serve "
                "nothing until an update succeeds: send again"
            )


def worker_offsets(engines: Mapping[str, EngineInfo]) -> tuple[dict[str, int], int]:
    """Return where the workers of each engine's replica begin in a count of all workers, and how many there are.

    vLLM counts the workers of one replica. With several replicas all would begin at 0, and take each other's ranks.
    """
    sizes: dict[str, int] = {}
    for engine in engines.values():
        sizes[engine.replica] = sizes.get(engine.replica, 0) + len(engine.workers)
    begins, total = dict[str, int](), 0
    for replica in sorted(sizes):
        begins[replica] = total
        total += sizes[replica]
    return {name: begins[engine.replica] for name, engine in engines.items()}, total


def _resumes(targets: Mapping[str, Target]) -> dict[str, protocol.EngineRequest]:
    return {name: protocol.Resume(epoch=target.epoch) for name, target in targets.items()}
