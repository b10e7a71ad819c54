"""``AsyncEngineGroup`` and ``EngineGroup``: every engine of a cluster as one object. One implementation: the asynchronous
one; ``EngineGroup`` runs it on an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from .. import protocol, security
from ..config import Settings, split_address
from ..errors import ArealError, EnginesMissing, EngineUnreachable, PauseFailed, RequestError
from . import recovery
from .connection import Connection
from .update import AsyncUpdate, UpdateResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence

    import torch
    from torch.distributed import ProcessGroup

    from ..protocol import Answer, EngineInfo, EngineRequest, KVPolicy, Message, PauseMode, TensorMeta, Version
    from ..transport import Sink

__all__ = ["AsyncEngineGroup", "EngineGroup", "EngineState", "Update", "UpdateResult"]

T = TypeVar("T")

_LEASE_SECONDS = 10.0
_DISCOVER_SECONDS = 5.0
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class EngineState:
    """What an engine says of itself, for people: see ``protocol.Status`` for the fields behind it.

    Attributes:
        version: the weights that it serves.
        state: ``running``, ``pausing``, ``paused``, ``resuming``, or ``unreachable``.
        phase: where it is in an update: ``idle``, ``receiving``, ``prepared``, ``committing`` or ``tainted``.
        waiting_for_engine: seconds since the engine's loop last came to a call; large where it is stuck.
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

    @classmethod
    def of(cls, engine: EngineInfo, status: protocol.Status | None, error: str = "") -> EngineState:
        return cls(
            name=engine.name,
            replica=engine.replica,
            dp_rank=engine.dp_rank,
            node=engine.node,
            headless=engine.headless,
            version=status.version if status else None,
            state=status.flow if status else "unreachable",
            phase=status.phase if status else "",
            requests=status.requests_running + status.requests_waiting if status else 0,
            waiting_for_engine=status.waiting_for_engine if status else 0.0,
            error=status.error if status else error,
        )


@dataclasses.dataclass(frozen=True)
class Target:
    """An engine under command: the epoch that requests to it carry, and its status when it was taken over."""

    engine: EngineInfo
    epoch: int
    status: protocol.Status


def resume_all(targets: Mapping[str, Target], timeout: float) -> dict[str, EngineRequest]:
    """A resume for every target."""
    return {name: protocol.Resume(epoch=target.epoch, timeout=timeout) for name, target in targets.items()}


class AsyncEngineGroup:
    """Every engine that the directories know. All calls have deadlines, in seconds.

    Calls of one group run one after the other; other groups and the command line are kept out by a lease meanwhile.
    """

    def __init__(self, addresses: tuple[str, ...], key_file: str | None, max_message_bytes: int) -> None:
        self._addresses = addresses
        self._max_message_bytes = max_message_bytes
        self._key_file = key_file
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        self._sink: tuple[tuple[object, ...], Sink] | None = None
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{id(self):x}"

    @classmethod
    def connect(cls, *addresses: str, key_file: str | os.PathLike[str] | None = None) -> AsyncEngineGroup:
        """A group of all engines that the directories at ``addresses`` (``tcp://host:port``) know, now or later.

        Nothing is sent yet: connecting before the engines are up works. ``key_file`` defaults to AREAL_VLLM_KEY_FILE.

        Raises:
            SettingsError: for a bad address or key file, or an address off loopback without a key.
        """
        settings = Settings.load()
        given = addresses or ((settings.directory,) if settings.directory else ("tcp://127.0.0.1:29700",))
        key = os.fspath(key_file) if key_file else settings.key_file
        for address in given:
            security.key_for(split_address(address)[0], key)
        return cls(tuple(dict.fromkeys(given)), key, settings.max_message_mib << 20)

    # Discovery

    async def engines(self, timeout: float = _DISCOVER_SECONDS) -> list[EngineInfo]:
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
                found = await self._discover(min(left, _DISCOVER_SECONDS))
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

    async def status(self, timeout: float = _DISCOVER_SECONDS) -> list[EngineState]:
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

    async def pause(self, mode: PauseMode = "keep", *, kv: KVPolicy = "keep", deadline: float = 60.0) -> None:
        """Pause generation on every engine, all at once; returns when every engine is idle.

        Args:
            mode: ``keep`` freezes requests, ``wait`` lets them finish, ``abort`` ends them.
            kv: ``recompute`` drops cached keys and values, and frozen requests recompute theirs.
            deadline: seconds; when they are over the pause is taken back everywhere.

        Raises:
            PauseFailed: naming the engines that did not pause; the others run again.
        """
        ends = time.monotonic() + deadline
        async with self.command(deadline) as targets:
            failed = await self._ask_all(
                targets,
                {
                    name: protocol.Pause(epoch=target.epoch, mode=mode, kv=kv, timeout=deadline)
                    for name, target in targets.items()
                },
                ends,
            )
            if failed:
                await self._ask_all(targets, resume_all(targets, 1.0), time.monotonic() + 0.8)
                raise PauseFailed(f"pause was taken back after {deadline:.1f} s: {join(failed)}")

    async def resume(self, *, deadline: float = 60.0) -> None:
        """Let every engine generate again; does nothing on those that do.

        Raises:
            PauseFailed: naming the engines that did not resume.
        """
        ends = time.monotonic() + deadline
        async with self.command(deadline) as targets:
            if failed := await self._ask_all(targets, resume_all(targets, deadline), ends):
                raise PauseFailed(f"not every engine resumed: {join(failed)}")

    # Update

    def update(
        self,
        version: Version,
        *,
        deadline: float = 300.0,
        transport: str = "auto",
        mode: PauseMode = "keep",
        kv: KVPolicy = "recompute",
        bucket_mib: int = 256,
        on_phase: Callable[[str], None] | None = None,
    ) -> AsyncUpdate:
        """Move every engine to new weights, or none. Use: ``async with group.update(v) as update: await update.send(model)``.

        Args:
            version: names the new weights; any integer or string.
            deadline: seconds for all of it. Over it, every engine keeps its old weights.
            transport: ``broadcast`` (NCCL between GPUs, else gloo), ``ipc`` (CUDA, same host), ``shared_memory`` (same
                host), or ``auto``: ``ipc`` where a worker runs on the trainer's own GPU, else ``broadcast``.
                ``update.send("/path")`` goes by disk.
            mode: how engines pause for the switch, see ``pause``.
            kv: ``recompute`` drops keys and values of the old weights; ``keep`` reuses them, knowingly.
            bucket_mib: size of the pieces in which the weights travel.
            on_phase: called with the name of each phase (``begin``, ``prepare``, ``pause``, ``commit``, ``resume``,
                ``abort``) before its requests go out, on the event loop's thread.
        """
        return AsyncUpdate(
            self,
            version,
            deadline=deadline,
            transport=transport,
            mode=mode,
            kv=kv,
            bucket_bytes=bucket_mib << 20,
            on_phase=on_phase,
        )

    async def close(self) -> None:
        """Close the connections. Engines go on."""
        self.drop_sink()
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
        if self._connection is None:
            self._connection = Connection(lambda host: security.key_for(host, self._key_file), self._max_message_bytes)
        answer = await self._connection.request(address, message, timeout)
        if isinstance(answer, protocol.Error):
            raise RequestError(answer.kind, answer.message)
        return answer

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

    @contextlib.asynccontextmanager
    async def command(self, deadline: float) -> AsyncIterator[dict[str, Target]]:
        """Hold the lease; yields every engine by name, fenced, and free of what an earlier client left behind.

        Raises:
            EnginesMissing: an engine is lost or was never there. EngineUnreachable: one does not answer.
            RequestError: another client holds the lease.
        """
        ends = time.monotonic() + deadline
        async with self._lock:
            found = await self._discover(min(deadline, _DISCOVER_SECONDS))
            if problem := describe_missing([answer for _, answer in found], None):
                raise EnginesMissing(problem)
            async with contextlib.AsyncExitStack() as leases:
                engines: dict[str, EngineInfo] = {}
                epochs: dict[str, int] = {}
                # In one order for everybody: two clients of the same directories never wait for each other in a ring.
                for directory, answer in sorted(found, key=lambda entry: entry[0]):
                    epoch = await leases.enter_async_context(self._lease(directory, ends))
                    engines.update({engine.name: engine for engine in answer.alive})
                    epochs.update({engine.name: epoch for engine in answer.alive})
                yield await self._take_over(engines, epochs, ends)

    async def _take_over(
        self, engines: dict[str, EngineInfo], epochs: dict[str, int], ends: float
    ) -> dict[str, Target]:
        """Fence every engine, and settle an update that its client left behind."""

        async def fence(name: str, engine: EngineInfo) -> Target:
            left = min(max(ends - time.monotonic(), 0.1), _DISCOVER_SECONDS)
            try:
                status = await self.request(engine.address, protocol.Fence(epoch=epochs[name]), left)
            except EngineUnreachable as error:
                raise EngineUnreachable(f"{name}: {error}") from None
            assert isinstance(status, protocol.Status)
            return Target(engine, epochs[name], status)

        while True:
            fenced = await asyncio.gather(*(fence(name, engine) for name, engine in engines.items()))
            targets = dict(zip(engines, fenced, strict=True))
            statuses = {name: target.status for name, target in targets.items()}
            plan = recovery.plan(statuses, epochs, max(ends - time.monotonic(), 0.1))
            if not (plan.settle or plan.resume or plan.wait) or time.monotonic() > ends:
                return targets
            for requests in (plan.settle, plan.resume if not plan.wait else {}):
                if failed := await self._ask_all(targets, requests, ends):
                    raise PauseFailed(f"an earlier update cannot be settled: {join(failed)}")
            await asyncio.sleep(_POLL_SECONDS / 20)

    @contextlib.asynccontextmanager
    async def _lease(self, directory: str, ends: float) -> AsyncIterator[int]:
        acquire = protocol.AcquireLease(holder=self.holder, seconds=_LEASE_SECONDS)
        while True:
            left = max(ends - time.monotonic(), 0.1)
            try:
                answer = await self.request(directory, acquire, min(left, _DISCOVER_SECONDS))
                break
            except RequestError as error:
                if error.kind != "held" or left <= _POLL_SECONDS:
                    raise
            await asyncio.sleep(_POLL_SECONDS / 4)
        assert isinstance(answer, protocol.Lease)
        epoch = answer.epoch

        async def renew() -> None:
            while True:
                await asyncio.sleep(_LEASE_SECONDS / 4)
                with contextlib.suppress(EngineUnreachable, RequestError):
                    await self.request(
                        directory, protocol.RenewLease(epoch=epoch, seconds=_LEASE_SECONDS), _LEASE_SECONDS / 4
                    )

        renewal = asyncio.create_task(renew())
        try:
            yield epoch
        finally:
            renewal.cancel()
            with contextlib.suppress(EngineUnreachable, RequestError):
                await self.request(directory, protocol.ReleaseLease(epoch=epoch), 0.5)

    async def _discover(self, timeout: float) -> list[tuple[str, protocol.Engines]]:
        async def ask(directory: str) -> tuple[str, protocol.Engines]:
            try:
                answer = await self.request(directory, protocol.Discover(), timeout)
            except EngineUnreachable as error:
                raise EngineUnreachable(f"the directory {error}; is the head node's engine up?") from None
            assert isinstance(answer, protocol.Engines)
            return directory, answer

        found = list(await asyncio.gather(*(ask(directory) for directory in self._addresses)))
        if self._connection:
            known = {engine.address for _, answer in found for engine in answer.alive}
            self._connection.keep_only(known.union(self._addresses))
        return found

    async def _hello(self, engine: EngineInfo, timeout: float) -> None:
        try:
            await self.request(engine.address, protocol.Hello(), timeout)
        except EngineUnreachable as error:
            raise EngineUnreachable(f"{engine.name} is registered, but {error}") from None

    async def _ask_all(
        self, targets: Mapping[str, Target], requests: Mapping[str, EngineRequest], ends: float
    ) -> dict[str, str]:
        """Ask engines all at once; returns the problem of each that failed."""

        async def ask(name: str, request: EngineRequest) -> tuple[str, str]:
            try:
                await self.request(targets[name].engine.address, request, max(ends - time.monotonic(), 0.05))
            except (EngineUnreachable, RequestError) as error:
                return name, str(error)
            return name, ""

        answers = await asyncio.gather(*(ask(name, request) for name, request in requests.items()))
        return {name: problem for name, problem in answers if problem}


def join(problems: dict[str, str]) -> str:
    """Problems of several engines, as one line."""
    return "; ".join(f"{name}: {problem}" for name, problem in sorted(problems.items()))


def describe_missing(answers: list[protocol.Engines], engines: int | None) -> str:
    """Which engines are not there, by node and DP rank; empty where all are."""
    alive = [engine for answer in answers for engine in answer.alive]
    lost = [(engine, seconds) for answer in answers for engine, seconds in answer.lost]
    problems = [f"{engine.name} was not heard for {seconds:.0f} s" for engine, seconds in lost]
    problems += [
        f"{engine.name} shares its name with another engine: set AREAL_VLLM_REPLICA, another for each replica"
        for answer in answers
        for engine in answer.usurped
    ]
    gone = {(engine.replica, engine.dp_rank) for engine, _ in lost}
    for replica in sorted({engine.replica for engine in alive}):
        ranks = [engine for engine in alive if engine.replica == replica]
        for rank in range(ranks[0].dp_size):
            if rank not in {engine.dp_rank for engine in ranks} and (replica, rank) not in gone:
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


class Update:
    """The blocking form of ``AsyncUpdate``."""

    def __init__(self, group: EngineGroup, update: AsyncUpdate) -> None:
        self._group = group
        self._update = update

    @property
    def result(self) -> UpdateResult:
        """What it took; set when the block has been left."""
        return self._update.result

    def send(self, weights: Any, *, dtype: str | None = None) -> None:
        """See ``AsyncUpdate.send``. The tensors are handled in the caller's thread, on its current device and stream."""
        self._update.send_blocking(weights, dtype=dtype)

    def __enter__(self) -> Update:
        self._group.run(self._update.__aenter__())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._group.run(self._update.__aexit__(kind, error, trace))


class EngineGroup:
    """The blocking form of ``AsyncEngineGroup``, with the same methods."""

    def __init__(self, group: AsyncEngineGroup, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        self._group = group
        self._loop = loop
        self._thread = thread

    @classmethod
    def connect(cls, *addresses: str, key_file: str | os.PathLike[str] | None = None) -> EngineGroup:
        """See ``AsyncEngineGroup.connect``."""
        group = AsyncEngineGroup.connect(*addresses, key_file=key_file)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="areal-engine-group", daemon=True)
        thread.start()
        return cls(group, loop, thread)

    def engines(self, timeout: float = _DISCOVER_SECONDS) -> list[EngineInfo]:
        """See ``AsyncEngineGroup.engines``."""
        return self.run(self._group.engines(timeout))

    def wait_ready(self, engines: int | None = None, timeout: float = 600.0) -> list[EngineInfo]:
        """See ``AsyncEngineGroup.wait_ready``."""
        return self.run(self._group.wait_ready(engines, timeout))

    def status(self, timeout: float = _DISCOVER_SECONDS) -> list[EngineState]:
        """See ``AsyncEngineGroup.status``."""
        return self.run(self._group.status(timeout))

    def pause(self, mode: PauseMode = "keep", *, kv: KVPolicy = "keep", deadline: float = 60.0) -> None:
        """See ``AsyncEngineGroup.pause``."""
        self.run(self._group.pause(mode, kv=kv, deadline=deadline))

    def resume(self, *, deadline: float = 60.0) -> None:
        """See ``AsyncEngineGroup.resume``."""
        self.run(self._group.resume(deadline=deadline))

    def update(self, version: Version, *, process_group: ProcessGroup | None = None, **options: Any) -> Update:
        """See ``AsyncEngineGroup.update``. Use: ``with group.update(version) as update: update.send(model)``.

        ``process_group``: the ranks of a sharded trainer (FSDP, TP), which all do this with the same arguments. Their
        ``DTensor`` weights are gathered, rank 0 commands and sends, and every rank gets the result, or the error of any.
        """
        update = self._group.update(version, **options)
        if process_group is None:
            return Update(self, update)
        from .joint import JointUpdate

        return JointUpdate(self, update, process_group, str(version))

    def close(self) -> None:
        """Close the connections and end the thread. Engines go on."""
        if self._thread.is_alive():
            self.run(self._group.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the group's loop and wait for it; an interrupt (Ctrl-C) cancels it and waits for its clean-up."""
        if not self._thread.is_alive():
            work.close()
            raise ArealError("this group is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def __enter__(self) -> EngineGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
