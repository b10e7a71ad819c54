"""``Commander``: take the lease, fence every engine, and resolve what an earlier client left behind.

A client does this before each command; the directory does the same once a client is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import time
from typing import TYPE_CHECKING

from .. import protocol
from ..errors import ArealError, EnginesMissing, EngineUnreachable, PauseFailed, RequestError, join
from ..protocol import timing
from . import recovery
from .command_lock import CommandLock
from .membership import describe_missing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

    from ..protocol import Answer, EngineInfo, EngineRequest, Message
    from .link import Link

# Why an engine is not resumed.
BEHIND = "its weights are older than those of the other engines: send an update"
DISCOVER_SECONDS = 5.0
POLL_SECONDS = 0.2
# A lease is renewed eight times in its time, so that a directory that restarts hears of it before it grants another.
_LEASE_SECONDS = 10.0
_RENEWALS = 8
# Clean-up after a command's deadline takes less than this time.
_GRACE_SECONDS = 2.0
# A client that waits for the lease asks for it at this interval.
_ASK_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Target:
    """An engine under command.

    Attributes:
        epoch: what requests to the engine carry.
        status: what the engine said when it was fenced.
        behind: whether other engines have committed a later update. The engine may not know that yet.
    """

    engine: EngineInfo
    epoch: int
    status: protocol.Status
    behind: bool = False

    @property
    def resumes(self) -> bool:
        """Whether the engine runs after an update: yes, unless a user has paused it."""
        return self.status.generation == "running" or bool(self.status.paused_for)


def resume_all(targets: Mapping[str, Target]) -> dict[str, EngineRequest]:
    """Return a resume request for every target that has the group's weights."""
    return {name: protocol.Resume(epoch=target.epoch) for name, target in targets.items() if not target.behind}


def _compared(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Return the targets, with ``behind`` where an engine does not know yet that it is stale."""
    newest = max((target.status.committed_epoch for target in targets.values()), default=0)
    return {
        name: dataclasses.replace(target, behind=target.status.committed_epoch < newest)
        if target.status.update_phase not in ("tainted", "stale")
        else target
        for name, target in targets.items()
    }


class Commander:
    """Commands the engines of one directory. Commands of one commander run one after the other."""

    def __init__(self, link: Link, directory: str, holder: str = "") -> None:
        """
        Args:
            link: the connection for all requests.
            directory: its address.
            holder: the name under which leases are taken (default: host, process and object).
        """
        self.link = link
        self.directory = directory
        self.holder = holder or f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"
        self._lock = CommandLock()
        # Renews the lease of the running command, and the time until which no other client can have taken it.
        self._renew: Callable[[float], Awaitable[None]] | None = None
        self._give_back: Callable[[], Awaitable[None]] | None = None
        self._certain_until = 0.0
        self._renewed = 0.0
        # Engines that were lost in an update of this group, and when. The group goes on without them until they are back.
        self._dropped: dict[tuple[str, int], float] = {}

    async def discover(self, timeout: float) -> protocol.Engines:
        """Ask the directory which engines there are.

        Raises:
            EngineUnreachable: the directory does not answer.
        """
        answer = await self._ask_directory(protocol.Discover(), timeout)
        assert isinstance(answer, protocol.Engines)
        self._disconnect_others(answer)
        return answer

    async def engines(self, timeout: float) -> dict[str, EngineInfo]:
        """Return every engine by name, for a request that needs no lease.

        Raises:
            EnginesMissing: an engine is lost or was never there.
            EngineUnreachable: the directory does not answer.
        """
        found = await self.discover(min(timeout, DISCOVER_SECONDS))
        if missing := describe_missing(found, dropped=self._silent_since_dropped(found)):
            raise EnginesMissing(missing)
        return {engine.name: engine for engine in found.alive}

    async def ask_all(
        self, targets: Mapping[str, Target], requests: Mapping[str, EngineRequest], ends: float
    ) -> dict[str, str]:
        """Send requests to targets, all at once; returns the problem of each that failed."""
        addressed = {name: (targets[name].engine.address, request) for name, request in requests.items()}
        outcomes = await self.link.request_all(addressed, max(ends - time.monotonic(), 0.05))
        return {name: str(outcome) for name, outcome in outcomes.items() if isinstance(outcome, ArealError)}

    def drop(self, lost: Iterable[EngineInfo]) -> None:
        """Go on without the engines that were lost in an update."""
        now = time.monotonic()
        self._dropped.update({(engine.replica, engine.dp_rank): now for engine in lost})

    def _silent_since_dropped(self, found: protocol.Engines) -> set[tuple[str, int]]:
        """Return the engines that the group goes on without.

        An engine that the directory has heard since may have been resumed by another client or the directory. If it is lost
        again, it may serve.
        """
        now = time.monotonic()
        heard = {(engine.replica, engine.dp_rank): now - seconds for engine, seconds in found.lost}
        return {key for key, dropped in self._dropped.items() if heard.get(key, dropped) <= dropped}

    async def forget(self, replica: str, dp_rank: int | None, timeout: float) -> None:
        """Give up lost engines for good, so that commands go on without them.

        Raises:
            EngineUnreachable: the directory does not answer.
            RequestError: an engine is alive, or the directory does not know the replica.
        """
        await self._ask_directory(protocol.Forget(replica=replica, dp_rank=dp_rank), timeout)

    async def holds_lease(self, timeout: float) -> bool:
        """Return False if another client has taken the lease of the running command.

        This asks the directory only after a process that was stopped has missed renewals. A directory that does not answer
        has not given the lease to another client either, as far as this process can know.
        """
        if self._renew is None or time.monotonic() < self._certain_until:
            return True
        try:
            await self._renew(timeout)
        except EngineUnreachable:
            return True
        except RequestError:
            return False
        return True

    async def close(self) -> None:
        """Give back the lease of a command that has not ended. Its epoch is lower than the next client's, which recovers."""
        if self._give_back is not None:
            await self._give_back()

    @property
    def lease_age(self) -> float:
        """Seconds since this client took its lease or renewed it."""
        return time.monotonic() - self._renewed

    async def recover(self, timeout: float, *, resume: bool) -> None:
        """Resolve what a client left behind, among the engines that are there; see ``recovery.py``.

        Args:
            timeout: seconds.
            resume: whether engines that were left paused run again.
        """
        async with self.command("recovery", timeout, without_lost=True, resume=resume):
            pass

    @contextlib.asynccontextmanager
    async def command(
        self, what: str, timeout: float, *, without_lost: bool = False, resume: bool = True
    ) -> AsyncIterator[dict[str, Target]]:
        """Hold the lease; yields every engine by name, fenced, and free of what an earlier client left behind.

        Args:
            what: names the command, for messages.
            timeout: seconds.
            without_lost: go on without engines that are lost.
            resume: whether engines that an earlier client left paused run again.

        Raises:
            EnginesMissing: an engine is lost or was never there.
            EngineUnreachable: an engine does not answer.
            RequestError: ``held``: another client holds the lease. ``busy``: see ``CommandLock``.
            PauseFailed: what an earlier client left behind cannot be resolved.
        """
        ends = time.monotonic() + timeout
        self.link.enter_loop()
        waited = False
        async with self._lock.held(what, ends):
            while True:
                if waited:
                    await self._await_engines(ends, without_lost)
                async with self._lease(ends) as (epoch, found):
                    self._disconnect_others(found)
                    missing = describe_missing(found, dropped=self._silent_since_dropped(found))
                    # After a restart of the directory, engines that are joining again may be serving.
                    if missing and (found.joining or not without_lost):
                        if not waited or (found.joining and time.monotonic() < ends):
                            waited = True  # without the lease, because no engine joins while a client holds it
                            continue
                        raise EnginesMissing(missing)
                    engines = {engine.name: engine for engine in found.alive}
                    # A forgotten engine may have committed what the others abort, so it counts as away.
                    all_here = not found.forgotten and not describe_missing(found)
                    targets = await self._take_over(engines, epoch, ends, all_here=all_here, resume=resume)
                    for target in targets.values():
                        self._dropped.pop((target.engine.replica, target.engine.dp_rank), None)
                    yield targets
                    return

    async def _await_engines(self, ends: float, without_lost: bool) -> None:
        """Wait until engines that have just started have joined, and for the next heartbeat of lost engines.

        An engine joins while no client holds the lease. A lost engine may have slept or been cut off until now.

        Raises:
            EnginesMissing: an engine is still missing.
            EngineUnreachable: the directory does not answer.
        """
        next_beat = time.monotonic() + 1.5 * timing.HEARTBEAT_SECONDS
        while True:
            found = await self.discover(min(max(ends - time.monotonic(), 0.1), DISCOVER_SECONDS))
            missing = describe_missing(found, dropped=self._silent_since_dropped(found))
            if not missing or (without_lost and not found.joining):
                return
            if time.monotonic() + POLL_SECONDS > (ends if found.joining else min(ends, next_beat)):
                raise EnginesMissing(missing)
            await asyncio.sleep(POLL_SECONDS)

    async def _take_over(
        self, engines: Mapping[str, EngineInfo], epoch: int, ends: float, *, all_here: bool, resume: bool
    ) -> dict[str, Target]:
        """Fence every engine, and resolve an update that its client left behind."""
        fences = {name: (engine.address, protocol.Fence(epoch=epoch)) for name, engine in engines.items()}
        while True:
            left = min(max(ends - time.monotonic(), 0.1), DISCOVER_SECONDS)
            outcomes = await self.link.request_all(fences, left)
            targets: dict[str, Target] = {}
            for name, engine in engines.items():
                match outcomes[name]:
                    case protocol.Status() as status:
                        targets[name] = Target(engine, epoch, status)
                    case EngineUnreachable() as error:
                        if not await self._is_lost(engine, ends):
                            raise EngineUnreachable(f"{name}: {error}")
                    case RequestError() as error:
                        raise error
            plan = recovery.plan(
                {name: target.status for name, target in targets.items()},
                epoch,
                all_here=all_here and len(targets) == len(engines),
            )
            resumes = plan.resume if resume else {}
            if not (plan.resolve or resumes or plan.wait):
                return _compared(targets)
            for requests in (plan.resolve, plan.adopt, resumes if not plan.wait else {}):
                if failed := await self.ask_all(targets, requests, ends):
                    raise PauseFailed(f"an earlier update cannot be resolved: {join(failed)}")
            if time.monotonic() > ends:
                raise PauseFailed("an earlier update could not be resolved in time; its engines stay as they are")
            await asyncio.sleep(POLL_SECONDS / 20)

    async def _is_lost(self, engine: EngineInfo, ends: float) -> bool:
        """Return whether an engine that does not answer here was dropped, and the directory does not hear it either.

        Otherwise the directory may have resumed it meanwhile, so an update must not go on without it.
        """
        key = (engine.replica, engine.dp_rank)
        if key not in self._dropped:
            return False
        found = await self.discover(min(max(ends - time.monotonic(), 0.1), DISCOVER_SECONDS))
        alive = any(one.incarnation == engine.incarnation for one in found.alive)
        return not alive and key in self._silent_since_dropped(found)

    @contextlib.asynccontextmanager
    async def _lease(self, ends: float) -> AsyncIterator[tuple[int, protocol.Engines]]:
        """Hold the directory's lease; yields its epoch, and the engines that the directory named with it."""
        try:
            lease = await self._acquire(ends)
        except BaseException:
            # The directory may still grant the lease to a request that is on its way.
            with contextlib.suppress(EngineUnreachable, RequestError):
                await self.link.request(self.directory, protocol.LeaveQueue(holder=self.holder), 0.1)
            raise

        async def renew(timeout: float) -> None:
            now, seconds = time.monotonic(), _lease_seconds(ends)
            message = protocol.RenewLease(epoch=lease.epoch, holder=self.holder, seconds=seconds)
            await self.link.request(self.directory, message, timeout)
            self._certain_until, self._renewed = now + seconds / 2, now

        async def keep_renewing() -> None:
            # Only until the command's time is over: a block that never ends must not shut out other clients.
            while _lease_seconds(ends) > 0:
                await asyncio.sleep(_LEASE_SECONDS / _RENEWALS)
                with contextlib.suppress(EngineUnreachable, RequestError):
                    await renew(_LEASE_SECONDS / 4)

        async def give_back() -> None:
            self._give_back = None
            renewal.cancel()
            with contextlib.suppress(EngineUnreachable, RequestError):
                in_time = time.monotonic() < ends
                await self.link.request(
                    self.directory, protocol.ReleaseLease(epoch=lease.epoch), 0.5 if in_time else 0.1
                )

        self._renew, self._give_back = renew, give_back
        renewal = asyncio.create_task(keep_renewing())
        try:
            yield lease.epoch, lease.engines or protocol.Engines(alive=())
        finally:
            if self._give_back is give_back:
                await give_back()

    async def _acquire(self, ends: float) -> protocol.Lease:
        """Ask for the lease until the directory grants it.

        A client that waits for another client also waits for a directory that restarts meanwhile.

        Raises:
            EngineUnreachable: the directory does not answer.
            RequestError: ``held``, naming the client that holds the lease.
        """
        started = time.monotonic()
        held: RequestError | None = None
        answered = started
        while True:
            now, seconds = time.monotonic(), _lease_seconds(ends)
            left = max(ends - now, 0.1)
            acquire = protocol.AcquireLease(holder=self.holder, seconds=seconds, waited=now - started)
            try:
                answer = await self._ask_directory(acquire, min(left, DISCOVER_SECONDS))
            except RequestError as error:
                if error.kind != "held":
                    raise
                held, answered = error, time.monotonic()
            except EngineUnreachable:
                # A directory that has answered may restart meanwhile. A short last wait proves nothing about it.
                silent = time.monotonic() - answered > DISCOVER_SECONDS
                if held is None or (silent and ends - time.monotonic() <= POLL_SECONDS):
                    raise
            else:
                assert isinstance(answer, protocol.Lease)
                self._certain_until, self._renewed = now + seconds / 2, now
                return answer
            if ends - time.monotonic() <= POLL_SECONDS:
                waited = time.monotonic() - started
                raise RequestError(
                    "held", f"the lease was not free within {waited:.1f} s: {held}; wait for it, or raise the timeout"
                )
            await asyncio.sleep(_ASK_SECONDS)

    async def _ask_directory(self, message: Message, timeout: float) -> Answer:
        try:
            return await self.link.request(self.directory, message, timeout)
        except EngineUnreachable as error:
            raise EngineUnreachable(f"the directory {error}; is the head node's engine up?") from None
        except RequestError as error:
            if error.kind != "malformed":
                raise
            raise RequestError(
                error.kind,
                f"{self.directory} is no directory of this version, but perhaps an engine's own address: {error}",
            ) from None

    def _disconnect_others(self, found: protocol.Engines) -> None:
        """Close the connections to engines that are not alive any more."""
        self.link.keep_only({engine.address for engine in found.alive} | {self.directory})


def _lease_seconds(ends: float) -> float:
    """Return for how long a lease is asked for: not much longer than until the command's deadline."""
    return max(min(_LEASE_SECONDS, ends + _GRACE_SECONDS - time.monotonic()), 0.0)
