"""Engines without a model: real endpoint, directory and wire, with a simulated engine loop and simulated workers.

``Deployment`` runs any number of engines in this process. ``python harness/simulated_engine.py`` runs them in its own process,
which can be killed or stopped. Each engine needs about 25 file descriptors and 4 threads, so a thousand need several processes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import heapq
import itertools
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

import msgspec
import zmq

from areal_vllm_ext import protocol
from areal_vllm_ext.config import Settings
from areal_vllm_ext.control.directory import new_incarnation
from areal_vllm_ext.control.directory_server import DirectoryServer
from areal_vllm_ext.engine_core.effects import (
    CallCommit,
    CallCommitFetched,
    CallMethod,
    CallPause,
    CallResume,
    CallSleep,
    CallWakeUp,
    Guard,
)
from areal_vllm_ext.engine_core.endpoint import Endpoint
from areal_vllm_ext.errors import NotACheckpoint
from areal_vllm_ext.integrity import checkpoint
from areal_vllm_ext.protocol import (
    Attach,
    Begin,
    Bucket,
    EngineInfo,
    Prepare,
    Version,
    WorkerDone,
    WorkerInfo,
    security,
)
from areal_vllm_ext.protocol.peer_messages import (
    EndOffer,
    FetchWeights,
    HeldAdapter,
    OfferWeights,
    ReadPacked,
    WeightsFetched,
    WorkerOffer,
    WorkerOffered,
    WorkerOfferEnded,
)
from areal_vllm_ext.protocol.server import connect

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST = "127.0.0.1"
NEVER = math.inf


class Later:
    """Runs delayed calls, on one thread for all engines of the process."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="simulated-later", daemon=True)
        self._thread.start()

    def call(self, seconds: float, what: Callable[[], None]) -> None:
        """Call ``what`` after ``seconds``: at once for 0, never for ``NEVER``."""
        if seconds == 0:
            what()
        elif seconds != NEVER:
            with self._changed:
                heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), what))
                self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._stopping:
                if self._due and self._due[0][0] <= time.monotonic():
                    what = heapq.heappop(self._due)[2]
                    self._changed.release()
                    try:
                        what()
                    finally:
                        self._changed.acquire()
                else:
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)


class SimulatedEngine:
    """Implements ``endpoint.Engine`` without a model.

    Attributes:
        seconds: how long a call (``pause``, ``resume``, ``cancel``, ``commit``) or a worker's step (``begin``, ``bucket``,
            ``prepare``) takes; 0 without an entry.
        errors: by call or step that fails, its error message.
        calls: the calls of the endpoint, in order.
        root: of the prefix cache.
        orders: the orders to the first worker, in order.
        worker_ranks: of the workers that answer a call of a user's method.
        method: what a worker answers to such a call, in msgpack, or an exception's type and message; its arguments.
        asleep: what is not on the device; discarded: the weights are gone.
        commits: every committed version, with whether the engine was paused.
        manifest: the digest that the workers vote with; if empty, the digest of what was announced to them.
        live: digests of the weights that the workers serve.
        busy: how many requests for digests the workers refuse because of a commit.
        staged: called with the update's id at commit; a test with real receivers loads the tensors there.
        fetched: the same for weights that were fetched from a peer.
    """

    def __init__(self, later: Later, shape: Shape) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.errors: dict[str, str] = {}
        self.calls: list[str] = []
        self.root = ""
        self.orders: list[protocol.WorkerOrder] = []
        self.commits: list[tuple[Version, bool]] = []
        self.manifest = ""
        self.live: dict[str, int] = {}
        self.busy = 0
        self.running = True
        self.asleep: set[str] = set()
        self.discarded = False
        self.version, self.model = shape.version, shape.model
        self.requests = 0
        self.staged: Callable[[str], None] = lambda _update: None
        self.fetched: Callable[[CallCommitFetched], None] = lambda _effect: None
        self.guarded = Guard()
        self.worker_ranks: Sequence[int] = (0,)
        self.method: Callable[[int, CallMethod], tuple[bytes, str, str]] = lambda _rank, effect: (
            effect.arguments,
            "",
            "",
        )
        self.endpoint: Endpoint
        self._later = later
        self._pausing: int | None = None

    @property
    def name(self) -> str:
        return self.endpoint.info.name

    def pause(self, effect: CallPause) -> None:
        call = effect.call
        self.calls.append(f"pause {effect.mode}{' clear' if effect.clear_cache else ''}")
        self.root = effect.root or self.root
        self._pausing = call

        def done() -> None:
            if self._pausing == call:
                self._pausing = None
                error = self.errors.get("pause", "")
                self.running = bool(error)
                self.endpoint.post(functools.partial(self.endpoint.participant.pauses.pause_done, call, error))

        self._later.call(self.seconds["pause"], done)

    def resume(self, effect: CallResume) -> None:
        call = effect.call
        self.calls.append("resume")

        def done() -> None:
            error = self.errors.get("resume", "")
            if not error:
                assert not self.asleep
                self._pausing, self.running = None, True
            self.endpoint.post(functools.partial(self.endpoint.participant.pauses.resume_done, call, error))

        self._later.call(self.seconds["resume"], done)

    def cancel_pause(self, call: int) -> None:
        self.calls.append("cancel")

        def done() -> None:
            pending, self._pausing = self._pausing is not None, None
            self.running = self.running or pending
            self.endpoint.post(functools.partial(self.endpoint.participant.pauses.cancel_done, call, pending))

        self._later.call(self.seconds["cancel"], done)

    def commit(self, effect: CallCommit) -> None:
        version = effect.version
        self.calls.append(f"commit {version}")

        def done() -> None:
            error = self.errors.get("commit", "")
            if not error:
                try:
                    assert "weights" not in self.asleep, "an illegal memory access"
                    self.staged(effect.update)
                    self.version, self.discarded = version, self.discarded and not effect.units.weights
                    self.commits.append((version, not self.running))
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"
            self.endpoint.post(lambda: self.endpoint.participant.commit_done(error, self.seconds["commit"]))

        self._later.call(self.seconds["commit"], done)

    def commit_fetched(self, effect: CallCommitFetched) -> None:
        self.calls.append(f"commit fetched {effect.version}")

        def done() -> None:
            error = self.errors.get("commit fetched", "")
            if not error:
                try:
                    assert not self.running
                    self.fetched(effect)
                    self.version = effect.version
                except Exception as problem:
                    error = f"{type(problem).__name__}: {problem}"
            self.endpoint.post(lambda: self.endpoint.peering.returning.committed(error, time.monotonic()))

        self._later.call(self.seconds["commit"], done)

    def read_packed(self, order: ReadPacked) -> None:
        self.calls.append(f"read {order.layer}")

    def change_sleep(self, effect: CallSleep | CallWakeUp) -> None:
        tags = effect.tags if isinstance(effect, CallWakeUp) else ("weights", "kv_cache")
        kind = f"sleep {effect.level}" if isinstance(effect, CallSleep) else f"wake up {' '.join(tags)}"
        self.calls.append(kind)

        def done() -> None:
            error = self.errors.get(kind.split(maxsplit=1)[0], "")
            if isinstance(effect, CallSleep):
                assert not self.running
                self.asleep |= set(tags)
                self.discarded = effect.level > 1
            elif not error:
                self.asleep -= set(tags)
            free = 100 - 50 * ("weights" not in self.asleep) - 30 * ("kv_cache" not in self.asleep)
            self.endpoint.post(lambda: self.endpoint.participant.sleep_done(effect.call, error, free))

        self._later.call(self.seconds[kind.split(maxsplit=1)[0]], done)

    def call_method(self, effect: CallMethod) -> None:
        self.calls.append(f"call {effect.method}")

        def done() -> None:
            answers = [protocol.CallAnswer(rank, *self.method(rank, effect)) for rank in self.worker_ranks]
            error = self.errors.get("call", "")
            self.endpoint.post(lambda: self.endpoint.call_done(effect, tuple(answers), error))

        self._later.call(self.seconds["call"], done)

    def oldest_call_seconds(self) -> float:
        return 0.0

    def is_paused(self) -> bool:
        return not self.running

    def guard(self, guard: Guard) -> None:
        self.guarded = guard

    def request_counts(self) -> tuple[int, int]:
        return self.requests, 0


class Workers:
    """The simulated workers of all engines of this process, on one thread; they receive no bytes."""

    def __init__(self, key: security.ClusterKey, later: Later) -> None:
        self._key, self._later = key, later
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._workers: dict[zmq.Socket[bytes], tuple[SimulatedEngine, int]] = {}
        # By worker and update, the tensors that were announced, with their digests.
        self._manifests: dict[tuple[zmq.Socket[bytes], str], dict[str, tuple[protocol.TensorMeta, int]]] = {}
        self._work: collections.deque[Callable[[], None]] = collections.deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read.fileno(), zmq.POLLIN)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="simulated-workers", daemon=True)
        self._thread.start()

    def attach(self, engine: SimulatedEngine, rank: int) -> None:
        self._do(lambda: self._attach(engine, rank))

    def detach(self, engine: SimulatedEngine) -> None:
        self._do(lambda: self._detach(engine))

    def say(self, engine: SimulatedEngine, message: protocol.WorkerMessage) -> None:
        """Let the worker with the message's rank send it now."""

        def send() -> None:
            for worker, (owner, rank) in self._workers.items():
                if owner is engine and isinstance(message, WorkerDone) and rank == message.rank:
                    self._send(worker, message)

        self._do(send)

    def stop(self) -> None:
        def close() -> None:
            self._stopping = True
            for worker in self._workers:
                worker.close()

        self._do(close)
        self._thread.join()
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()

    def _do(self, what: Callable[[], None]) -> None:
        self._work.append(what)
        with contextlib.suppress(BlockingIOError):  # the buffer is full, so the thread will wake anyway
            self._wake_write.send(b"\0")

    def _attach(self, engine: SimulatedEngine, rank: int) -> None:
        worker = connect(self._context, engine.endpoint.address, self._key, os.urandom(16))
        self._workers[worker] = (engine, rank)
        self._poller.register(worker, zmq.POLLIN)
        info = WorkerInfo(rank=rank, node=HOST, pid=os.getpid(), device="cpu", device_id="cpu")
        self._send(worker, Attach(worker=info, token=engine.endpoint.attach_token))
        self._send(worker, protocol.WeightsTaken(rank=rank, weights=_of_files(engine.model)))

    def _detach(self, engine: SimulatedEngine) -> None:
        for worker in [worker for worker, (owner, _) in self._workers.items() if owner is engine]:
            del self._workers[worker]
            self._poller.unregister(worker)
            worker.close()

    def _send(self, worker: zmq.Socket[bytes], message: protocol.WorkerMessage) -> None:
        if not worker.closed:
            worker.send_multipart([os.urandom(protocol.REQUEST_ID_BYTES), protocol.encoder.encode(message)])

    def _run(self) -> None:
        while not self._stopping:
            ready = dict(self._poller.poll())
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
            while self._work:
                self._work.popleft()()
            for worker, (engine, rank) in list(self._workers.items()):
                while not worker.closed and worker in ready and worker.get(zmq.EVENTS) & zmq.POLLIN:
                    self._handle(worker, engine, rank, protocol.worker_decoder.decode(worker.recv_multipart()[-1]))

    def _digest(
        self, worker: zmq.Socket[bytes], engine: SimulatedEngine, rank: int, message: protocol.DigestWeights
    ) -> None:
        weights, error, busy = None, engine.errors.get("digest", ""), engine.busy > 0
        if busy:
            engine.busy -= 1
        elif not error:
            weights = protocol.WorkerWeights(rank=rank, layout=f"rank {rank}", manifest="", live=dict(engine.live))
        taken = protocol.DigestsTaken(request=message.request, rank=rank, weights=weights, error=error, busy=busy)
        self._later.call(engine.seconds["digest"], lambda: self._do(lambda: self._send(worker, taken)))

    def _with_peer(
        self, engine: SimulatedEngine, rank: int, message: OfferWeights | FetchWeights | EndOffer
    ) -> protocol.WorkerMessage:
        """Return what a worker says that offers its weights, or fetches a peer's, in no time."""
        error = engine.errors.get(type(message).__name__, "")
        match message:
            case OfferWeights():
                adapters = tuple(
                    HeldAdapter(protocol.Adapter(name, "{}", one), ()) for name, one in message.adapters.items()
                )
                offer = WorkerOffer(rank=rank, layout=f"rank {rank}", address="", held=(), adapters=adapters)
                return WorkerOffered(fetch=message.fetch, rank=rank, offer=None if error else offer, error=error)
            case FetchWeights():
                return WeightsFetched(fetch=message.fetch, rank=rank, manifest="all", error=error)
            case EndOffer():
                return WorkerOfferEnded(fetch=message.fetch, rank=rank, manifest="all", error=error)

    def _handle(
        self,
        worker: zmq.Socket[bytes],
        engine: SimulatedEngine,
        rank: int,
        message: protocol.WorkerOrder | protocol.Answer,
    ) -> None:
        match message:
            case Begin():
                step = "begin"
            case Bucket():
                known = self._manifests.setdefault((worker, message.update), {})
                told = zip((segment.tensor for segment in message.segments), message.digests, strict=True)
                known.update({meta.name: (meta, value) for meta, value in told})
                step = message.step
            case Prepare():
                step = "prepare"
            case protocol.DigestWeights():
                self._digest(worker, engine, rank, message)
                return
            case protocol.Abort():
                engine.orders.append(message)
                return
            case OfferWeights() | FetchWeights() | EndOffer():
                report = self._with_peer(engine, rank, message)
                self._later.call(engine.seconds["fetch"], lambda: self._do(lambda: self._send(worker, report)))
                return
            case protocol.GetTrace():
                told = protocol.WorkerTrace(update=message.update, rank=rank, now=time.monotonic(), spans=())
                self._later.call(engine.seconds["trace"], lambda: self._do(lambda: self._send(worker, told)))
                return
            case _:
                return
        if rank == 0:
            engine.orders.append(message)
        kind = step.split()[0]
        done = WorkerDone(update=message.update, rank=rank, step=step, error=engine.errors.get(kind, ""))
        if step == "prepare":
            entries = self._manifests.pop((worker, message.update), {}).values()
            manifest = engine.manifest or _manifest(entries)
            done = msgspec.structs.replace(done, manifest=manifest)
        self._later.call(engine.seconds[kind], lambda: self._do(lambda: self._send(worker, done)))


def _manifest(entries: Collection[tuple[protocol.TensorMeta, int]]) -> str:
    """Return the digest of what was announced, if anything was."""
    if not entries:
        return ""
    from areal_vllm_ext.integrity.digest import manifest  # imports torch, which most tests' engines do not need

    return manifest(entries)


@functools.cache
def _of_files(model: str) -> protocol.Weights:
    """What a model takes of which nothing but the files is known."""
    try:
        return protocol.Weights(tensors=tuple(checkpoint.describe(model)))
    except NotACheckpoint as error:
        return protocol.Weights(tensors=(), error=str(error))


@dataclasses.dataclass(frozen=True)
class Shape:
    """The properties of a deployment."""

    replica: str = "simulated"
    dp_size: int | None = None  # default: the number of engines
    workers: int = 1
    version: Version = 0
    model: str = ""
    dtype: str = "float32"
    sleep_mode: bool = True
    settings: Settings = dataclasses.field(default_factory=Settings)


class Deployment:
    """Engines ``ranks`` of one replica, their workers, and a directory unless ``directory`` names one."""

    def __init__(
        self,
        key: security.ClusterKey,
        engines: int = 2,
        *,
        shape: Shape | None = None,
        ranks: Sequence[int] | None = None,
        directory: str | None = None,
        directory_port: int = 0,
        simulate_workers: bool = True,
    ) -> None:
        self.key = key
        self.shape = shape or Shape()
        self._size = self.shape.dp_size or engines
        self._simulate_workers = simulate_workers
        self._directory_context: zmq.Context[zmq.Socket[bytes]] | None = None
        self.clock_skew = 0.0
        self.directory = directory or self.start_directory(directory_port)
        self.later = Later()
        self.workers = Workers(key, self.later)
        self.engines: dict[int, SimulatedEngine] = {}
        for rank in ranks if ranks is not None else range(engines):
            self.start_engine(rank)

    def start_directory(self, port: int = 0) -> str:
        """Start the directory, whose clock is ``clock_skew`` ahead; returns its address."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        security.ZapAuthenticator(context, self.key)
        self._directory_context = context
        server = DirectoryServer(
            context,
            HOST,
            port,
            self.key,
            clock=lambda: time.monotonic() + self.clock_skew,
            resume_orphans=self.shape.settings.trainer_lost == "resume",
        )
        return server.address

    def stop_directory(self) -> None:
        if self._directory_context:
            self._directory_context.term()
            self._directory_context = None

    def start_engine(self, rank: int) -> SimulatedEngine:
        """Start an engine, or the next incarnation of a stopped one."""
        engine = SimulatedEngine(self.later, self.shape)
        engine.worker_ranks = range(self.shape.workers)
        info = EngineInfo(
            replica=self.shape.replica,
            dp_rank=rank,
            dp_size=self._size,
            headless=rank > 0,
            node=f"node{rank}",
            pid=os.getpid(),
            incarnation=new_incarnation(time.time()),
            address="",
            dtype=self.shape.dtype,
            sleep_mode=self.shape.sleep_mode,
        )
        engine.endpoint = Endpoint(
            info=info,
            host=HOST,
            directory=self.directory,
            key=self.key,
            workers=frozenset(range(self.shape.workers)),
            version=self.shape.version,
            settings=self.shape.settings,
            engine=engine,
        )
        engine.endpoint.start()
        if self._simulate_workers:
            for worker in range(self.shape.workers):
                self.workers.attach(engine, worker)
        self.engines[rank] = engine
        return engine

    def stop_engine(self, rank: int) -> None:
        """Stop an engine as a crash does, without a farewell."""
        engine = self.engines.pop(rank)
        self.workers.detach(engine)
        engine.endpoint.stop(farewell=False)

    def wait_attached(self, timeout: float = 10.0) -> None:
        for engine in self.engines.values():
            assert engine.endpoint.wait_attached(timeout), f"{engine.name} has no worker"

    def stop(self) -> None:
        for rank in list(self.engines):
            self.stop_engine(rank)
        self.workers.stop()
        self.later.stop()
        self.stop_directory()


@contextlib.contextmanager
def deployed(key: security.ClusterKey, engines: int = 2, **options: object) -> Iterator[Deployment]:
    """Run a deployment inside this context."""
    deployment = Deployment(key, engines, **options)  # type: ignore[arg-type]
    try:
        yield deployment
    finally:
        deployment.stop()


def main() -> None:
    """Run engines until standard input is closed; the first line of output is the directory's address."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--key-file", required=True)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--first-rank", type=int, default=0)
    parser.add_argument("--dp-size", type=int, help="engines of the whole replica (default: those of this process)")
    parser.add_argument("--pause-seconds", type=float, default=0.0, help="how long an engine takes to pause")
    parser.add_argument("--directory", help="tcp://host:port of a directory (default: one of its own)")
    arguments = parser.parse_args()
    deployment = Deployment(
        security.read_key(arguments.key_file),
        arguments.engines,
        shape=Shape(dp_size=arguments.dp_size or arguments.engines),
        ranks=range(arguments.first_rank, arguments.first_rank + arguments.engines),
        directory=arguments.directory,
    )
    for engine in deployment.engines.values():
        engine.seconds["pause"] = arguments.pause_seconds
    deployment.wait_attached(60)
    print(deployment.directory, flush=True)
    sys.stdin.read()
    deployment.stop()


if __name__ == "__main__":
    main()
