"""``AsyncEngineGroup``: every engine of a cluster as one object. ``blocking.py`` has its form without ``await``."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import time
import uuid
from typing import TYPE_CHECKING

import msgspec

from .. import protocol
from ..config import Settings, split_address
from ..control import recovery
from ..control.connection import Connection
from ..errors import ArealError, EnginesMissing, EngineUnreachable, PauseFailed, RequestError, join
from ..integrity.checkpoint import contents
from ..integrity.verify import Difference, Verification, compare
from ..protocol import BEAT_SECONDS, security
from .update import AsyncUpdate, UpdateOptions, UpdateResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    import torch

    from ..control.connection import Heard, Round
    from ..integrity.digest import Contents
    from ..protocol import (
        Answer,
        EngineInfo,
        EngineRequest,
        KVPolicy,
        Message,
        PauseMode,
        StagingKind,
        TensorMeta,
        Version,
    )
    from ..transport.base import Sink

__all__ = ["AsyncEngineGroup", "Difference", "EngineState", "UpdateResult", "Verification"]

_LEASE_SECONDS = 10.0
PAUSE_LEASE_SECONDS = 30.0
DISCOVER_SECONDS = 5.0
_POLL_SECONDS = 0.2
# For what is still said after a deadline: less than a second in all.
_GRACE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class EngineState:
    """What an engine says of itself, for people: see ``protocol.Status`` for the fields behind it.

    Attributes:
        version: the weights that it serves.
        state: ``running``, ``pausing``, ``paused``, ``resuming``, or ``unreachable``.
        phase: where it is in an update: ``idle``, ``receiving``, ``prepared``, ``committing`` or ``tainted``.
        waiting_for_engine: seconds since the engine's loop last came to a call; large where it is stuck.
        weights: digest of the update that it serves, equal on engines that serve the same; empty before the first.
        unproven: why those weights could not be compared with a fresh load; empty where they were.
    """

    name: str
    replica: str
    dp_rank: int
    node: str
    headless: bool
    version: Version | None
    state: str
    phase: str
    requests: int
    waiting_for_engine: float
    error: str
    weights: str = ""
    unproven: str = ""

    @classmethod
    def of(cls, engine: EngineInfo, status: protocol.Status | None, error: str = "") -> EngineState:
        return cls(
            name=engine.name,
            replica=engine.replica,
            dp_rank=engine.dp_rank,
            node=engine.node,
            headless=engine.headless,
            version=status.version if status else None,
            state=status.generation if status else "unreachable",
            phase=status.update_phase if status else "",
            requests=status.requests_running + status.requests_waiting if status else 0,
            waiting_for_engine=status.waiting_for_engine if status else 0.0,
            error=status.error if status else error,
            weights=status.weights if status else "",
            unproven=status.unproven if status else "",
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """An engine under command: the epoch that requests to it carry, and its status when it was taken over."""

    engine: EngineInfo
    epoch: int
    status: protocol.Status

    @property
    def resumes(self) -> bool:
        """Whether it is to run after an update: unless a user has paused it."""
        return self.status.generation == "running" or bool(self.status.paused_for)


@dataclasses.dataclass(frozen=True)
class Member:
    """An engine that is to be commanded: its epoch, and whose lease that is."""

    engine: EngineInfo
    epoch: int
    directory: str


def resume_all(targets: Mapping[str, Target]) -> dict[str, EngineRequest]:
    """A resume for every target."""
    return {name: protocol.Resume(epoch=target.epoch) for name, target in targets.items()}


class AsyncEngineGroup:
    """Every engine that the directories know. All calls have deadlines, in seconds.

    Calls of one group run one after the other; other groups and the command line are kept out by a lease meanwhile.
    """

    def __init__(
        self, addresses: tuple[str, ...], key_for: Callable[[str], security.ClusterKey], max_message_bytes: int
    ) -> None:
        self._addresses = addresses
        self._max_message_bytes = max_message_bytes
        self._key_for = key_for
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        # Engines that were lost in an update of this group: it goes on without them, until they are back.
        self._dropped: set[tuple[str, int]] = set()
        self._keeping_paused: asyncio.Task[None] | None = None
        self._sink: tuple[tuple[object, ...], Sink] | None = None
        # What the last update brought, if it came from here: the next one leaves out what is still the same.
        self.sent: Contents = {}
        self.sent_manifest = ""
        # An engine's checkpoint, the bytes of its tensors, and of the largest, by the engine's incarnation.
        self.described: dict[str, tuple[tuple[TensorMeta, ...], int, int]] = {}
        # Whether a worker on another GPU of this host could not open the trainer's memory.
        self.apart = False
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"

    @classmethod
    def connect(
        cls,
        *addresses: str,
        key_file: str | os.PathLike[str] | None = None,
        key: security.ClusterKey | None = None,
    ) -> AsyncEngineGroup:
        """A group of all engines that the directories at ``addresses`` (``tcp://host:port``) know, now or later.

        Nothing is sent yet: connecting before the engines are up works. ``key_file`` defaults to AREAL_VLLM_KEY_FILE; ``key``
        is for whoever has no file.

        Raises:
            SettingsError: for a bad address or key file, or an address off loopback without a key.
        """
        settings = Settings.load()
        given = addresses or ((settings.directory,) if settings.directory else ("tcp://127.0.0.1:29700",))
        file = os.fspath(key_file) if key_file else settings.key_file

        def key_for(host: str) -> security.ClusterKey:
            return key or security.key_for(host, file)

        for address in given:
            key_for(split_address(address)[0])
        return cls(tuple(dict.fromkeys(given)), key_for, settings.max_message_mib << 20)

    # Discovery

    async def engines(self, timeout: float = DISCOVER_SECONDS) -> list[EngineInfo]:
        """The engines that are alive, by replica and DP rank.

        Raises:
            EngineUnreachable: where a directory does not answer.
        """
        return [engine for _, answer in await self._discover(timeout) for engine in answer.alive]

    async def wait_ready(self, engines: int | None = None, timeout: float = 600.0) -> list[EngineInfo]:
        """Wait until ``engines`` engines (default: all ranks of every replica that was seen) answer.

        Raises:
            EnginesMissing: time is up; the message says which are missing, by node and DP rank.
        """
        ends = time.monotonic() + timeout
        problem = ""
        while (left := ends - time.monotonic()) > 0:
            try:
                found = await self._discover(min(left, DISCOVER_SECONDS))
                alive = [engine for _, answer in found for engine in answer.alive]
                problem = describe_missing([answer for _, answer in found], engines)
                if not problem:
                    await asyncio.gather(*(self._hello(engine, left) for engine in alive))
                    return alive
            except (EngineUnreachable, RequestError) as error:
                problem = str(error)
                if isinstance(error, RequestError) and error.kind == "protocol":
                    break
            await asyncio.sleep(min(_POLL_SECONDS, max(ends - time.monotonic(), 0)))
        raise EnginesMissing(f"not ready after {timeout:.0f} s: {problem}")

    async def status(self, timeout: float = DISCOVER_SECONDS) -> list[EngineState]:
        """The state of every engine, also of those that were lost; an engine that does not answer is ``unreachable``."""
        found = await self._discover(timeout)

        async def ask(engine: EngineInfo) -> EngineState:
            try:
                answer = await self.request(engine.address, protocol.GetStatus(), timeout)
            except (EngineUnreachable, RequestError) as error:
                return EngineState.of(engine, None, str(error))
            assert isinstance(answer, protocol.Status)
            return EngineState.of(answer.engine, answer)

        states = list(await asyncio.gather(*(ask(engine) for _, answer in found for engine in answer.alive)))
        lost = [
            EngineState.of(engine, None, f"not heard for {seconds:.0f} s")
            for _, answer in found
            for engine, seconds in answer.lost
        ]
        return sorted(states + lost, key=lambda state: (state.replica, state.dp_rank))

    # Pause and resume

    async def pause(
        self,
        mode: PauseMode = "keep",
        *,
        kv: KVPolicy = "keep",
        deadline: float = 60.0,
        lease: float | None = PAUSE_LEASE_SECONDS,
    ) -> None:
        """Pause generation on every engine, all at once; returns when every engine is idle.

        Args:
            mode: ``keep`` freezes requests, ``wait`` lets them finish, ``abort`` ends them.
            kv: ``recompute`` drops cached keys and values, and frozen requests recompute theirs.
            deadline: seconds; when they are over the pause is taken back everywhere.
            lease: seconds after which engines run again by themselves when this group is closed or its process is gone (or
                stay paused, where they are set so). None: they stay paused until somebody resumes them.

        Raises:
            PauseFailed: naming the engines that did not pause; the others run again.
        """
        ends = time.monotonic() + deadline
        async with self.command(deadline) as targets:
            self._keep_paused([target.engine.address for target in targets.values()], lease)
            pause = protocol.Pause(epoch=0, mode=mode, kv=kv, timeout=deadline, holder=self.holder, lease=lease or 0.0)
            requests = {name: msgspec.structs.replace(pause, epoch=target.epoch) for name, target in targets.items()}
            try:
                failed = await self._ask_all(targets, requests, ends)
            except asyncio.CancelledError:
                await self._take_pause_back(targets)
                raise
            if failed:
                await self._take_pause_back(targets)
                raise PauseFailed(f"pause was taken back after {deadline:.1f} s: {join(failed)}")

    async def _take_pause_back(self, targets: Mapping[str, Target]) -> None:
        self._keep_paused([], None)
        await self._ask_all(targets, resume_all(targets), time.monotonic() + _GRACE_SECONDS)

    def _keep_paused(self, addresses: list[str], lease: float | None) -> None:
        """Say every now and then that whoever paused these engines is alive; ends what was said so far."""
        if self._keeping_paused:
            self._keeping_paused.cancel()
            self._keeping_paused = None
        if not lease:
            return
        message = protocol.KeepPaused(holder=self.holder, lease=lease)

        async def keep_saying() -> None:
            while True:
                await asyncio.sleep(lease / 4)
                await self.request_all({address: (address, message) for address in addresses}, lease / 4)

        self._keeping_paused = asyncio.create_task(keep_saying())

    async def resume(self, *, deadline: float = 60.0) -> None:
        """Let every engine generate again; does nothing on those that do.

        Raises:
            PauseFailed: naming the engines that did not resume.
        """
        ends = time.monotonic() + deadline
        async with self.command(deadline) as targets:
            self._keep_paused([], None)
            if failed := await self._ask_all(targets, resume_all(targets), ends):
                raise PauseFailed(f"not every engine resumed: {join(failed)}")

    # Update

    def update(  # noqa: PLR0913 - all but one by name
        self,
        version: Version,
        *,
        deadline: float = 300.0,
        transport: str = "auto",
        mode: PauseMode = "keep",
        kv: KVPolicy = "recompute",
        bucket_mib: int | None = None,
        staging: StagingKind = "auto",
        keep_buffers: bool = False,
        drop_lost: bool = False,
        on_phase: Callable[[str], None] | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> AsyncUpdate:
        """Move every engine to new weights, or none. Use: ``async with group.update(v) as update: await update.send(model)``.

        Args:
            version: names the new weights; any integer or string.
            deadline: seconds for all of it. Over it, every engine keeps its old weights.
            transport: ``broadcast`` (NCCL between GPUs, else gloo), ``ipc`` (CUDA, same host), ``shared_memory`` (same
                host), or ``auto``: ``ipc`` where a worker runs on the trainer's own GPU, or the only one on another that it
                sees and that can read its memory, else ``broadcast``.
                ``update.send("/path")`` goes by disk.
            mode: how engines pause for the switch, see ``pause``.
            kv: ``recompute`` drops keys and values of the old weights; ``keep`` reuses them, knowingly.
            bucket_mib: size of the pieces in which the weights travel; default: by NCCL a quarter, 128 at least and 1024
                at most, otherwise 256 from GPUs, 32 from host memory.
            staging: where workers keep the new weights until the switch: on their ``device``, in ``host`` memory, or
                (``auto``) on the device if there is room, else in host memory. It costs one copy of what each worker
                receives, or of its part where it needs a part; where there is no room the update is refused, with the
                numbers.
            keep_buffers: whether workers keep that memory for the next update, which is faster then, and the trainer its
                buckets; else it is given back once the update is over.
            drop_lost: go on without engines that are lost already, instead of EnginesMissing. One that comes back is stale:
                it serves nothing until an update reaches it.
            on_phase: called with the name of each phase (``begin``, ``prepare``, ``pause``, ``commit``, ``resume``,
                ``abort``) before its requests go out, on the event loop's thread.
            trace: where to write what trainer, engines and workers did when, also of an update that failed: JSON for
                https://ui.perfetto.dev. What of it cannot be had is logged, and no error.
        """
        options = UpdateOptions(
            deadline=deadline,
            transport=transport,
            staging=staging,
            keep_buffers=keep_buffers,
            mode=mode,
            kv=kv,
            bucket_bytes=None if bucket_mib is None else bucket_mib << 20,
            drop_lost=drop_lost,
            on_phase=on_phase,
            trace=trace,
        )
        return AsyncUpdate(self, version, options)

    async def verify(
        self, checkpoint: str | os.PathLike[str] | None = None, *, deadline: float = 300.0
    ) -> Verification:
        """Compare what the engines serve, while they generate.

        Every live parameter and buffer with those of the other engines, and with what it was after the engine's last
        commit; and what was applied with ``checkpoint``. Weights that a CPU backend keeps packed cannot be read beside a
        running engine: they are compared with a fresh load at the first update only.

        Args:
            checkpoint: a Hugging Face checkpoint directory that this process can read.
            deadline: seconds for all of it.

        Raises:
            NotACheckpoint: ``checkpoint`` is none.
            EngineUnreachable: an engine did not answer in time. RequestError: it could not tell.
        """
        ends = time.monotonic() + deadline
        expected = await asyncio.to_thread(contents, checkpoint) if checkpoint is not None else None
        async with self.command(max(ends - time.monotonic(), 0.1)) as targets:
            answers = await asyncio.gather(
                *(self._digests(name, target, expected is not None, ends) for name, target in targets.items())
            )
            statuses = {name: target.status for name, target in targets.items()}
            return await asyncio.to_thread(compare, dict(zip(targets, answers, strict=True)), statuses, expected)

    async def _digests(self, name: str, target: Target, with_contents: bool, ends: float) -> protocol.WeightDigests:
        while True:
            left = max(ends - time.monotonic(), 0.1)
            ask = protocol.DigestWeights(request=uuid.uuid4().hex, timeout=left, contents=with_contents)
            try:
                answer = await self.request(target.engine.address, ask, left + 0.2)
            except EngineUnreachable as error:
                raise EngineUnreachable(f"{name}: {error}") from None
            except RequestError as error:
                if error.kind != "busy" or left <= _POLL_SECONDS:
                    raise RequestError(error.kind, f"{name}: {error}") from None
            else:
                assert isinstance(answer, protocol.WeightDigests)
                return answer
            await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        """Close the connections. Engines go on."""
        self.drop_sink()
        self._keep_paused([], None)
        if self._connection:
            await self._connection.close()
            self._connection = None

    async def __aenter__(self) -> AsyncEngineGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # For this package's own use

    async def request(self, address: str, message: Message, timeout: float) -> Answer:
        """One request.

        Raises:
            EngineUnreachable: no answer. RequestError: it was refused.
        """
        outcome = (await self.request_all({"": (address, message)}, timeout))[""]
        if isinstance(outcome, ArealError):
            raise outcome
        return outcome

    async def request_all(
        self, requests: Mapping[str, tuple[str, Message]], timeout: float, *, until_error: bool = False
    ) -> dict[str, Answer | EngineUnreachable | RequestError]:
        """Requests to addresses, by any name, all at once; of each the answer, or the error that ``request`` would raise.

        ``until_error``: only those up to the first error.
        """
        outcomes: dict[str, Answer | EngineUnreachable | RequestError] = {}
        all_heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def heard(name: str, outcome: Answer | EngineUnreachable) -> None:
            error = isinstance(outcome, (protocol.Error, EngineUnreachable))
            outcomes[name] = (
                RequestError(outcome.kind, outcome.message) if isinstance(outcome, protocol.Error) else outcome
            )
            enough = len(outcomes) == len(requests) or (until_error and error)
            if enough and not all_heard.done():
                all_heard.set_result(None)

        if requests:
            asked = self.ask(requests, timeout, heard)
            try:
                await all_heard
            finally:
                asked.cancel()
        return outcomes

    def ask(self, requests: Mapping[str, tuple[str, Message]], timeout: float, heard: Heard) -> Round:
        """See ``Connection.ask``."""
        if self._connection is None:
            self._connection = Connection(self._key_for, self._max_message_bytes)
        return self._connection.ask(requests, timeout, heard)

    def sink(
        self,
        kind: str,
        engines: dict[str, EngineInfo],
        device: torch.device,
        bucket_bytes: int,
        expected: Sequence[TensorMeta],
        timeout: float,
    ) -> Sink:
        """The sending end to ``engines``: the one of the last update where nothing has changed since."""
        key = (kind, device, bucket_bytes, *(engine.incarnation for engine in engines.values()))
        if self._sink is None or self._sink[0] != key:
            self.drop_sink()
            made: Sink
            if kind in ("shared_memory", "ipc"):
                from ..transport import buckets
                from ..transport.ipc import CudaIpcSink
                from ..transport.shared_memory import SharedMemorySink

                dtype = next(iter(engines.values())).dtype
                largest = max((buckets.tensor_bytes(tensor, dtype) for tensor in expected), default=0)
                slot_bytes = max(buckets.aligned(bucket_bytes), largest)
                if kind == "ipc":
                    made = CudaIpcSink(len(engines), device, bucket_bytes, slot_bytes)
                else:
                    made = SharedMemorySink(len(engines), bucket_bytes, slot_bytes)
            else:
                from ..transport.broadcast import BroadcastSink

                backend = "nccl" if device.type == "cuda" else "gloo"
                members = [[worker.rank for worker in engine.workers] for engine in engines.values()]
                made = BroadcastSink(backend, members, self._data_host(engines), device, bucket_bytes, timeout)
            self._sink = (key, made)
        return self._sink[1]

    @property
    def has_sink(self) -> bool:
        """Whether there is a sending end of an earlier update."""
        return self._sink is not None

    def drop_sink(self) -> None:
        """Close the sending end: after a failure, the next update makes a new one."""
        if self._sink is not None:
            self._sink[1].close()
            self._sink = None

    def _data_host(self, engines: dict[str, EngineInfo]) -> str:
        """The address of this machine that workers reach: the one from which the first far engine is reached."""
        hosts = [split_address(engine.address)[0] for engine in engines.values()]
        far = [host for host in hosts if not security.is_loopback(host)]
        own = [security.own_address_toward(host) for host in far or hosts[:1]]
        return own[-1]

    async def recover(self, deadline: float, *, resume: bool) -> None:
        """Settle, among the engines that are there, what a client left behind; see ``client/recovery.py``.

        Args:
            deadline: seconds.
            resume: whether engines that were left paused run again.
        """
        async with self.command(deadline, without_lost=True, resume=resume):
            pass

    def drop(self, lost: Iterable[EngineInfo], kept: Iterable[EngineInfo]) -> None:
        """Go on without the engines that were lost in an update; those in ``kept`` belong to the group (again)."""
        self._dropped.difference_update((engine.replica, engine.dp_rank) for engine in kept)
        self._dropped.update((engine.replica, engine.dp_rank) for engine in lost)

    @contextlib.asynccontextmanager
    async def command(
        self, deadline: float, *, without_lost: bool = False, resume: bool = True
    ) -> AsyncIterator[dict[str, Target]]:
        """Hold the lease; yields every engine by name, fenced, and free of what an earlier client left behind.

        Args:
            deadline: seconds.
            without_lost: go on without engines that are lost.
            resume: whether engines that an earlier client left paused run again.

        Raises:
            EnginesMissing: an engine is lost or was never there. EngineUnreachable: one does not answer.
            RequestError: another client holds the lease.
            PauseFailed: what an earlier client left behind cannot be settled.
        """
        ends = time.monotonic() + deadline
        waited = False
        async with self._lock:
            while True:
                if waited:
                    await self._present(ends, without_lost)
                async with contextlib.AsyncExitStack() as stack:
                    # In one order for everybody: two clients of the same directories never wait for each other in a ring.
                    leases = {
                        directory: await stack.enter_async_context(self._lease(directory, ends))
                        for directory in sorted(self._addresses)
                    }
                    answers = [found for _, found in leases.values()]
                    self._forget_others(answers)
                    missing = describe_missing(answers, None, self._dropped)
                    if missing and not without_lost:
                        if not waited or (any(answer.joining for answer in answers) and time.monotonic() < ends):
                            waited = True  # without the lease: nobody joins while it is held
                            continue
                        raise EnginesMissing(missing)
                    members = {
                        engine.name: Member(engine, epoch, directory)
                        for directory, (epoch, found) in leases.items()
                        for engine in found.alive
                    }
                    all_here = not describe_missing(answers, None)
                    yield await self._take_over(members, ends, all_here=all_here, resume=resume)
                    return

    async def _present(self, ends: float, without_lost: bool) -> None:
        """Wait until engines that have just started have joined, which they do when no client is at work; and for the next
        beat of one that is lost: it may have slept, or been cut off, until now.

        Raises:
            EnginesMissing: not everybody is there. EngineUnreachable: a directory does not answer.
        """
        next_beat = time.monotonic() + 1.5 * BEAT_SECONDS
        while True:
            found = await self._discover(min(max(ends - time.monotonic(), 0.1), DISCOVER_SECONDS))
            answers = [answer for _, answer in found]
            missing = "" if without_lost else describe_missing(answers, None, self._dropped)
            if not missing:
                return
            joining = any(answer.joining for answer in answers)
            if time.monotonic() + _POLL_SECONDS > (ends if joining else min(ends, next_beat)):
                raise EnginesMissing(missing)
            await asyncio.sleep(_POLL_SECONDS)

    async def _take_over(
        self, members: dict[str, Member], ends: float, *, all_here: bool, resume: bool
    ) -> dict[str, Target]:
        """Fence every engine, and settle an update that its client left behind."""

        fences = {name: (member.engine.address, protocol.Fence(epoch=member.epoch)) for name, member in members.items()}
        while True:
            left = min(max(ends - time.monotonic(), 0.1), DISCOVER_SECONDS)
            outcomes = await self.request_all(fences, left)
            targets: dict[str, Target] = {}
            for name, member in members.items():
                match outcomes[name]:
                    case protocol.Status() as status:
                        targets[name] = Target(member.engine, member.epoch, status)
                    case EngineUnreachable() as error:
                        if (member.engine.replica, member.engine.dp_rank) not in self._dropped:
                            raise EngineUnreachable(f"{name}: {error}")
                    case RequestError() as error:
                        raise error
            plan = recovery.plan(
                {name: target.status for name, target in targets.items()},
                {name: target.epoch for name, target in targets.items()},
                directories={name: member.directory for name, member in members.items()},
                all_here=all_here and len(targets) == len(members),
            )
            resumes = plan.resume if resume else {}
            if not (plan.settle or resumes or plan.wait):
                return targets
            for requests in (plan.settle, plan.agree, resumes if not plan.wait else {}):
                if failed := await self._ask_all(targets, requests, ends):
                    raise PauseFailed(f"an earlier update cannot be settled: {join(failed)}")
            if time.monotonic() > ends:
                raise PauseFailed("an earlier update could not be settled in time; its engines stay as they are")
            await asyncio.sleep(_POLL_SECONDS / 20)

    @contextlib.asynccontextmanager
    async def _lease(self, directory: str, ends: float) -> AsyncIterator[tuple[int, protocol.Engines]]:
        """Hold the lease of ``directory``; yields its epoch, and who is there, with it."""
        acquire = protocol.AcquireLease(holder=self.holder, seconds=_LEASE_SECONDS)
        while True:
            left = max(ends - time.monotonic(), 0.1)
            try:
                answer = await self._ask_directory(directory, acquire, min(left, DISCOVER_SECONDS))
                break
            except RequestError as error:
                if error.kind != "held" or left <= _POLL_SECONDS:
                    raise
            await asyncio.sleep(_POLL_SECONDS / 4)
        assert isinstance(answer, protocol.Lease)
        epoch, found = answer.epoch, answer.engines or protocol.Engines(alive=())

        async def renew() -> None:
            while True:
                await asyncio.sleep(_LEASE_SECONDS / 4)
                with contextlib.suppress(EngineUnreachable, RequestError):
                    await self.request(
                        directory, protocol.RenewLease(epoch=epoch, seconds=_LEASE_SECONDS), _LEASE_SECONDS / 4
                    )

        renewal = asyncio.create_task(renew())
        try:
            yield epoch, found
        finally:
            renewal.cancel()
            with contextlib.suppress(EngineUnreachable, RequestError):
                in_time = time.monotonic() < ends
                await self.request(directory, protocol.ReleaseLease(epoch=epoch), 0.5 if in_time else 0.1)

    async def _ask_directory(self, directory: str, message: Message, timeout: float) -> Answer:
        try:
            return await self.request(directory, message, timeout)
        except EngineUnreachable as error:
            raise EngineUnreachable(f"the directory {error}; is the head node's engine up?") from None

    async def _discover(self, timeout: float) -> list[tuple[str, protocol.Engines]]:
        async def ask(directory: str) -> tuple[str, protocol.Engines]:
            answer = await self._ask_directory(directory, protocol.Discover(), timeout)
            assert isinstance(answer, protocol.Engines)
            return directory, answer

        found = list(await asyncio.gather(*(ask(directory) for directory in self._addresses)))
        self._forget_others([answer for _, answer in found])
        return found

    def _forget_others(self, answers: Iterable[protocol.Engines]) -> None:
        """Close the connections to engines that are not in ``answers`` any more."""
        if self._connection:
            known = {engine.address for answer in answers for engine in answer.alive}
            self._connection.keep_only(known.union(self._addresses))

    async def _hello(self, engine: EngineInfo, timeout: float) -> None:
        try:
            await self.request(engine.address, protocol.Hello(), timeout)
        except EngineUnreachable as error:
            raise EngineUnreachable(f"{engine.name} is registered, but {error}") from None

    async def _ask_all(
        self, targets: Mapping[str, Target], requests: Mapping[str, EngineRequest], ends: float
    ) -> dict[str, str]:
        """Ask engines all at once; returns the problem of each that failed."""

        addressed = {name: (targets[name].engine.address, request) for name, request in requests.items()}
        outcomes = await self.request_all(addressed, max(ends - time.monotonic(), 0.05))
        return {name: str(outcome) for name, outcome in outcomes.items() if isinstance(outcome, ArealError)}


def describe_missing(
    answers: list[protocol.Engines], engines: int | None, dropped: AbstractSet[tuple[str, int]] = frozenset()
) -> str:
    """Which engines are not there, by node and DP rank, those that were ``dropped`` apart; empty where all are."""
    alive = [engine for answer in answers for engine in answer.alive]
    lost = [
        (engine, seconds)
        for answer in answers
        for engine, seconds in answer.lost
        if (engine.replica, engine.dp_rank) not in dropped
    ]
    problems = [f"{engine.name} was not heard for {seconds:.0f} s" for engine, seconds in lost]
    problems += [
        f"{engine.name} shares its name with another engine: set AREAL_VLLM_REPLICA, another for each replica"
        for answer in answers
        for engine in answer.displaced
    ]
    joining = [engine for answer in answers for engine in answer.joining]
    problems += [f"{engine.name} has just started, and joins when no client is at work" for engine in joining]
    gone = {(engine.replica, engine.dp_rank) for engine, _ in lost} | dropped
    gone |= {(engine.replica, engine.dp_rank) for engine in joining}
    for replica in sorted({engine.replica for engine in alive}):
        ranks = [engine for engine in alive if engine.replica == replica]
        present = {engine.dp_rank for engine in ranks}
        for rank in range(ranks[0].dp_size):
            if rank not in present and (replica, rank) not in gone:
                seen = ", ".join(f"{engine.dp_rank} on {engine.node}" for engine in ranks)
                problems.append(
                    f"DP rank {rank} of replica {replica} never registered (there are: {seen}); is its node up, was it "
                    "started with --worker-extension-cls, and has it the same key file?"
                )
    if not problems and engines is not None and len(alive) < engines:
        problems.append(f"{len(alive)} of {engines} engines registered: {', '.join(e.name for e in alive) or 'none'}")
    if not problems and not alive:
        problems.append("no engine has registered with the directory")
    return "; ".join(problems)
