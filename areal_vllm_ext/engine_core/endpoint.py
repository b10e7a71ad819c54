"""An engine's control endpoint: one thread that owns the socket and the participant, and never touches the engine.

``hello`` and ``status`` are answered here, so an engine that is busy, paused or stuck stays visible. What needs the
engine is handed to ``controller.py``, which runs it on the engine's own loop and posts the outcome back.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
import os
import secrets
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Protocol

import msgspec
import zmq

from .. import protocol
from ..control.directory import wrong_protocol
from ..integrity import checkpoint
from ..process.switch_interval import ShortSwitchInterval
from ..protocol import (
    Attach,
    DescribeWeights,
    DigestsTaken,
    DigestWeights,
    EngineInfo,
    Fence,
    GetStatus,
    GetTrace,
    Hello,
    Status,
    WeightDigests,
    Weights,
    WeightsMismatch,
    Welcome,
    WorkerDone,
    WorkerTrace,
    WorkerWeights,
    security,
    timing,
)
from ..protocol.server import ReplyTo, Server, connect
from .effects import CallCancelPause, CallCommit, CallPause, CallResume, Effect, Order, Reply
from .participant import Participant
from .tracing import Tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config import Settings
    from ..protocol import Version, WorkerInfo

logger = logging.getLogger("vllm.areal_vllm_ext")

_TICK_MILLISECONDS = 100
_LAST_WORD_MILLISECONDS = 200


class Engine(Protocol):
    """What the endpoint asks of its engine: calls return at once and report through ``Endpoint.post``."""

    def pause(self, call: int, mode: protocol.PauseMode, clear_cache: bool) -> None: ...
    def resume(self, call: int) -> None: ...
    def cancel_pause(self, call: int) -> None: ...
    def commit(self, update: str, version: Version) -> None: ...
    def oldest_call_seconds(self) -> float: ...
    def request_counts(self) -> tuple[int, int]: ...


@dataclasses.dataclass(frozen=True)
class Identity:
    """What the endpoint tells of its engine, before the workers are known."""

    info: EngineInfo
    model: str
    revision: str | None


@dataclasses.dataclass
class _Digesting:
    """Who asked for digests, until when, and which workers have taken theirs."""

    caller: ReplyTo
    ends: float
    taken: dict[int, WorkerWeights] = dataclasses.field(default_factory=dict)


class Endpoint:
    """Serves one engine. Use: construct, ``start``, later ``stop``."""

    def __init__(
        self,
        identity: Identity,
        host: str,
        directory: str,
        key: security.ClusterKey,
        world_size: int,
        version: Version,
        settings: Settings,
        engine: Engine,
    ) -> None:
        """Bind the socket, so that an address in use is an error here.

        Raises:
            SettingsError: where the address cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._authenticator = security.ZapAuthenticator(self._context, key)
        self._server = Server(
            self._context, host, settings.port, key, protocol.engine_decoder, settings.max_message_mib << 20
        )
        self._key = key
        self._directory_address = directory
        self._identity = identity
        self._engine = engine
        self.info = msgspec.structs.replace(identity.info, address=self._server.address)
        # Whoever has the key may command this engine, but only its own workers may vote: they are told this by its executor.
        self.attach_token = secrets.token_hex(16)
        self._workers: dict[int, tuple[bytes, WorkerInfo]] = {}
        self._world_size = world_size
        self._participant = Participant(version, frozenset(range(world_size)), resume_orphans=settings.resume_orphans)
        self.tracing = Tracing(world_size)
        self._weights: Weights | None = None
        self._digesting: dict[str, _Digesting] = {}
        self._weights_waiting: list[ReplyTo] = []
        self._posted: collections.deque[Callable[[], list[Effect]]] = collections.deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._all_attached = threading.Event()
        self._registered = threading.Event()
        self._directory_complaint = ""
        self._switch_interval = ShortSwitchInterval()
        self._stopping = False
        self._farewell = True
        self._thread = threading.Thread(target=self._run, name="areal-endpoint", daemon=True)

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]:
        return self._context

    @property
    def address(self) -> str:
        return self._server.address

    @property
    def participant(self) -> Participant:
        """For outcomes that are posted from the engine's loop; touched by the endpoint's thread only."""
        return self._participant

    def start(self) -> None:
        self._thread.start()

    def wait_attached(self, timeout: float) -> bool:
        """Wait until every worker has attached; False where one did not."""
        return self._all_attached.wait(timeout)

    def wait_registered(self, timeout: float) -> bool:
        """Wait until the directory has said what the group agreed on; False where it did not."""
        return self._registered.wait(timeout)

    def stop(self, *, farewell: bool = True) -> None:
        """End the thread and close every socket; safe to call twice.

        Args:
            farewell: tell the directory that this engine is gone on purpose; else it is reported as lost for a while.
        """
        self._farewell = farewell
        self._stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        else:
            self._server.socket.close()
        # The threads of the authenticator and the directory close their sockets when the context ends, and only then
        # does ``term`` return: never let an engine's exit hang on that.
        closing = threading.Thread(target=self._context.term, name="areal-close", daemon=True)
        closing.start()
        closing.join(timeout=5)
        if not self._thread.is_alive():
            self._wake_read.close()
            self._wake_write.close()

    def post(self, outcome: Callable[[], list[Effect]]) -> None:
        """Have the endpoint's thread run ``outcome`` and carry out its effects. Callable from any thread."""
        self._posted.append(outcome)
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except OSError:
            pass  # the buffer is full, so the thread wakes anyway; or it has ended

    def _run(self) -> None:
        directory = connect(self._context, self._directory_address, self._key, self.info.incarnation.encode())
        try:
            poller = zmq.Poller()
            poller.register(self._server.socket, zmq.POLLIN)
            poller.register(self._wake_read.fileno(), zmq.POLLIN)
            poller.register(directory, zmq.POLLIN)
            next_beat = 0.0
            while not self._stopping:
                ready = dict(poller.poll(self._milliseconds_to_tick(next_beat)))
                if self._wake_read.fileno() in ready:
                    self._drain_wakes()
                while self._posted:
                    self._carry_out(self._posted.popleft()())
                if directory in ready:
                    self._read_directory(directory)
                for caller, message in self._server.requests():
                    self._handle(caller, message)
                now = monotonic()
                self._carry_out(self._participant.tick(now))
                self._expire_digests(now)
                self._carry_out(self.tracing.tick(now))
                self._adapt_switch_interval()
                if now >= next_beat and self._all_attached.is_set():
                    next_beat = now + timing.HEARTBEAT_SECONDS
                    self._tell(directory, self._participant.beat(self.info))
            if self._farewell:
                directory.linger = _LAST_WORD_MILLISECONDS
                self._tell(directory, protocol.Unregister(engine=self.info))
        except zmq.ContextTerminated:
            pass
        except Exception:
            # Without its endpoint an engine would drift out of the group unseen: better it ends, loudly.
            logger.critical("the control endpoint of this engine failed; ending the engine", exc_info=True)
            os._exit(70)
        finally:
            self._switch_interval.end()
            directory.close()
            self._server.socket.close()

    def _adapt_switch_interval(self) -> None:
        """Shorten the interval during an update or a pause: the trainer waits for this thread then."""
        if self._participant.update is not None or self._participant.generation != "running":
            self._switch_interval.begin()
        else:
            self._switch_interval.end()

    def _milliseconds_to_tick(self, next_beat: float) -> int:
        """How long it may wait for a message: where nothing can run out of time, until the next beat."""
        state = self._participant
        asked = self._digesting or self.tracing.waiting
        if state.update or state.generation != "running" or asked or not self._all_attached.is_set():
            return _TICK_MILLISECONDS
        return math.ceil(min(max(next_beat - monotonic(), 0.0), timing.HEARTBEAT_SECONDS) * 1e3)

    def _read_directory(self, directory: zmq.Socket[bytes]) -> None:
        while directory.poll(0):
            try:
                answer = protocol.answer_decoder.decode(directory.recv_multipart()[-1])
            except protocol.UNREADABLE as error:
                answer = protocol.Error(kind="malformed", message=f"its answer cannot be read: {error}")
            if isinstance(answer, protocol.Registered):
                self._carry_out(self._participant.on_group_epoch(answer.version, answer.committed_epoch))
                self._registered.set()
            if isinstance(answer, protocol.Error) and answer.message != self._directory_complaint:
                self._directory_complaint = answer.message
                logger.error("the directory %s refuses this engine: %s", self._directory_address, answer.message)

    def _drain_wakes(self) -> None:
        try:
            while self._wake_read.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _tell(self, directory: zmq.Socket[bytes], message: protocol.DirectoryRequest) -> None:
        try:
            directory.send_multipart(
                [os.urandom(protocol.REQUEST_ID_BYTES), protocol.encoder.encode(message)], zmq.NOBLOCK
            )
        except zmq.Again:
            pass  # the directory is away; the queue holds beats enough

    def _handle(self, caller: ReplyTo, message: protocol.EngineRequest | protocol.WorkerMessage) -> None:
        match message:
            case Hello():
                if message.protocol != protocol.PROTOCOL_VERSION:
                    self._server.answer(caller, wrong_protocol(message.protocol))
                else:
                    self._server.answer(
                        caller,
                        Welcome(protocol=protocol.PROTOCOL_VERSION, engine=self.info),
                    )
            case GetStatus():
                self._server.answer(caller, self._status())
            case DescribeWeights():
                self._describe(caller)
            case DigestWeights():
                self._digest(caller, message)
            case GetTrace():
                self._carry_out(self.tracing.ask(caller, message, monotonic()))
            case Fence():
                refusal = self._participant.fence(message.epoch)
                self._server.answer(caller, refusal or self._status())
            case Attach():
                self._attach(caller, message)
            case WorkerDone() | WeightsMismatch() | DigestsTaken() | WorkerTrace():
                self._hear(caller, message)
            case _:
                effects = self._participant.handle(caller, message, monotonic())
                self.tracing.asked(caller, message, self._participant)
                self._carry_out(effects)

    def _hear(self, worker: ReplyTo, message: WorkerDone | WeightsMismatch | DigestsTaken | WorkerTrace) -> None:
        known = self._workers.get(message.rank)
        if known is None or known[0] != worker.peer:
            return
        match message:
            case WorkerDone():
                self._carry_out(self._participant.worker_done(message))
            case WeightsMismatch():
                self._participant.weights_mismatch(message)
            case DigestsTaken():
                self._digested(message)
            case WorkerTrace():
                self._carry_out(self.tracing.told(message, monotonic()))

    def _attach(self, caller: ReplyTo, message: Attach) -> None:
        own = secrets.compare_digest(message.token.encode(), self.attach_token.encode())
        if not own or message.worker.rank >= self._world_size:
            problem = f"{self.info.name} was not started with worker {message.worker.rank} on {message.worker.node}"
            self._server.answer(caller, protocol.Error(kind="state", message=problem))
            return
        self._workers[message.worker.rank] = (caller.peer, message.worker)
        workers = tuple(worker for _, (_, worker) in sorted(self._workers.items()))
        self.info = msgspec.structs.replace(self.info, workers=workers)
        self._server.answer(caller, protocol.Ack())
        if len(self._workers) == self._world_size:
            self._all_attached.set()

    def _describe(self, caller: ReplyTo) -> None:
        if self._weights is not None:
            self._server.answer(caller, self._weights)
            return
        self._weights_waiting.append(caller)
        if len(self._weights_waiting) > 1:
            return

        def read() -> None:
            # A checkpoint of many files on a network file system takes seconds to look through: not on this thread.
            try:
                weights = Weights(tensors=tuple(checkpoint.describe(self._identity.model, self._identity.revision)))
            except checkpoint.NotACheckpoint as error:
                weights = Weights(tensors=(), error=str(error))
            except Exception as error:
                weights = Weights(tensors=(), error=f"{type(error).__name__}: {error}")
            self.post(lambda: keep(weights))

        def keep(weights: Weights) -> list[Effect]:
            self._weights = weights
            waiting, self._weights_waiting = self._weights_waiting, []
            return [Reply(one, weights) for one in waiting]

        threading.Thread(target=read, name="areal-describe", daemon=True).start()

    def _digest(self, caller: ReplyTo, message: DigestWeights) -> None:
        if self._participant.update_phase == "committing":
            self._server.answer(caller, protocol.Error(kind="busy", message="the engine is committing an update"))
            return
        self._digesting[message.request] = _Digesting(caller, monotonic() + message.timeout)
        self._carry_out([Order(message)])

    def _digested(self, message: DigestsTaken) -> None:
        if (asked := self._digesting.get(message.request)) is None:
            return
        if message.weights is None:
            del self._digesting[message.request]
            kind: protocol.ErrorKind = "busy" if message.busy else "failed"
            problem = f"worker {message.rank}: {message.error}"
            self._server.answer(asked.caller, protocol.Error(kind=kind, message=problem))
            return
        asked.taken[message.rank] = message.weights
        if len(asked.taken) == self._world_size:
            del self._digesting[message.request]
            workers = tuple(weights for _, weights in sorted(asked.taken.items()))
            self._server.answer(asked.caller, WeightDigests(workers=workers))

    def _expire_digests(self, now: float) -> None:
        for request, asked in list(self._digesting.items()):
            if now >= asked.ends:
                del self._digesting[request]
                missing = sorted(set(range(self._world_size)) - set(asked.taken))
                problem = f"no digests from worker {', '.join(map(str, missing))} in time"
                self._server.answer(asked.caller, protocol.Error(kind="timeout", message=problem))

    def _status(self) -> Status:
        running, waiting = self._engine.request_counts()
        return self._participant.status(self.info, running, waiting, self._engine.oldest_call_seconds())

    def _carry_out(self, effects: list[Effect]) -> None:
        self.tracing.states(self._participant)
        for effect in effects:
            match effect:
                case Reply():
                    self.tracing.answered(effect.caller)
                    self._server.answer(effect.caller, effect.answer)
                case Order():
                    for peer, _ in self._workers.values():
                        self._server.tell(peer, effect.message)
                case CallPause():
                    self._engine.pause(effect.call, effect.mode, effect.clear_cache)
                case CallResume():
                    self._engine.resume(effect.call)
                case CallCancelPause():
                    self._engine.cancel_pause(effect.call)
                case CallCommit():
                    self._engine.commit(effect.update, effect.version)
                case _:
                    raise AssertionError(f"no way to carry out {effect!r}")
