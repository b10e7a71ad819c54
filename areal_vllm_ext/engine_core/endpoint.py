"""An engine's control endpoint: one thread that owns the socket and the participant, and never touches the engine.

The thread answers ``Hello`` and ``GetStatus`` itself, so an engine that is busy, paused or stuck stays visible. What needs
the engine goes to ``controller.py``, which runs it on the engine's own loop and posts the outcome back.
"""

from __future__ import annotations

import collections
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
from ..process.switch_interval import ShortSwitchInterval
from ..protocol import (
    Attach,
    Call,
    DescribeWeights,
    DigestsTaken,
    DigestWeights,
    EngineInfo,
    Fence,
    GetStatus,
    GetTrace,
    Hello,
    Status,
    WeightsMismatch,
    WeightsTaken,
    Welcome,
    WorkerDone,
    WorkerTrace,
    security,
    timing,
)
from ..protocol.peer_messages import (
    EndOffer,
    OfferWeights,
    ReadPacked,
    WeightsFetched,
    WorkerOffered,
    WorkerOfferEnded,
)
from ..protocol.server import IO_THREADS, ReplyTo, Server, connect
from .effects import (
    CallCancelPause,
    CallCommit,
    CallMethod,
    CallPause,
    CallResume,
    CallSleep,
    CallWakeUp,
    Effect,
    Guard,
    Order,
    Reply,
)
from .native_transfer import NativeTransfer
from .participant import Participant
from .peering import PeerCalls, Peering, PeerLink
from .queries import WeightQueries
from .status import beat_of, guard_of, status_of
from .tracing import Tracing
from .user_calls import UserCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config import Settings
    from ..protocol import Version, WorkerInfo

logger = logging.getLogger("vllm.areal_vllm_ext")

_Report = WorkerDone | WeightsMismatch | DigestsTaken | WeightsTaken | WorkerTrace | protocol.messages.PeerReport

_TICK_MILLISECONDS = 100
_UNREGISTER_MILLISECONDS = 200


class Engine(PeerCalls, Protocol):
    """What the endpoint asks of its engine. Calls return at once and report through ``Endpoint.post``."""

    def pause(self, effect: CallPause) -> None: ...
    def resume(self, effect: CallResume) -> None: ...
    def cancel_pause(self, call: int) -> None: ...
    def commit(self, effect: CallCommit) -> None: ...
    def change_sleep(self, effect: CallSleep | CallWakeUp) -> None: ...
    def call_method(self, effect: CallMethod) -> None: ...
    def oldest_call_seconds(self) -> float: ...
    def request_counts(self) -> tuple[int, int]: ...
    def is_paused(self) -> bool: ...
    def guard(self, guard: Guard) -> None: ...


class Endpoint:
    """Serves one engine. Use: construct, ``start``, later ``stop``."""

    def __init__(
        self,
        info: EngineInfo,
        host: str,
        directory: str,
        key: security.ClusterKey,
        workers: frozenset[int],
        version: Version,
        settings: Settings,
        engine: Engine,
    ) -> None:
        """Bind the socket, so that an address in use is an error here. ``info``: without the workers.

        Raises:
            SettingsError: if the address cannot be bound.
        """
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        self._authenticator = security.ZapAuthenticator(self._context, key)
        self._server = Server(
            self._context, host, settings.port, key, protocol.engine_decoder, settings.max_message_mib << 20
        )
        self._key = key
        self._directory_address = directory
        self._engine = engine
        self.info = msgspec.structs.replace(info, address=self._server.address)
        # Every holder of the key may command this engine, but only its own workers may vote: its executor gives them this.
        self.attach_token = secrets.token_hex(16)
        self._workers: dict[int, tuple[bytes, WorkerInfo]] = {}
        self._participant = Participant(version, workers, resume_orphans=settings.resume_orphans, joined=False)
        self._native_transfer = NativeTransfer(self._participant)
        self.tracing = Tracing(workers)
        self._queries = WeightQueries(workers)
        self.calls = UserCalls(workers, settings.max_message_mib << 20)
        self.peering = Peering(self._participant, self.info.address, engine, enabled=settings.fetches)
        self._guard = Guard()
        self._posted: collections.deque[Callable[[], list[Effect]]] = collections.deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._all_attached = threading.Event()
        self._registered = threading.Event()
        self.directory_refusal = ""
        self._switch_interval = ShortSwitchInterval()
        self._stopping = False
        self._farewell = True
        self._reason = ""
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
        """Wait until every worker has attached; return False if one did not in time."""
        return self._all_attached.wait(timeout)

    def wait_registered(self, timeout: float) -> bool:
        """Wait until the directory has said which update the group committed last; return False if it did not in time."""
        return self._registered.wait(timeout)

    def stop(self, reason: str = "", *, farewell: bool = True) -> None:
        """End the thread and close every socket; safe to call twice.

        Args:
            reason: why the engine's process ends, for the trainer that waits for this engine; empty to tell it nothing.
            farewell: unregister from the directory; otherwise it reports this engine as lost for a while.
        """
        self._farewell, self._reason = farewell, reason
        self._stopping = True
        self._wake()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        else:
            self._server.socket.close()
        # ``term`` returns only when the threads of the authenticator and the directory have closed their sockets. An
        # engine's exit must not hang on that.
        closing = threading.Thread(target=self._context.term, name="areal-close", daemon=True)
        closing.start()
        closing.join(timeout=5)
        if not self._thread.is_alive():
            self._wake_read.close()
            self._wake_write.close()

    def post(self, outcome: Callable[[], list[Effect]]) -> None:
        """Have the endpoint's thread run ``outcome`` and carry out its effects; callable from any thread."""
        self._posted.append(outcome)
        self._wake()

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except OSError:
            pass  # either the buffer is full and the thread wakes anyway, or the thread has ended

    def _run(self) -> None:
        directory = connect(self._context, self._directory_address, self._key, self.info.incarnation.encode())
        poller = zmq.Poller()
        link = PeerLink(self._context, poller, self._key, self.info.incarnation.encode())
        try:
            poller.register(self._server.socket, zmq.POLLIN)
            poller.register(self._wake_read.fileno(), zmq.POLLIN)
            poller.register(directory, zmq.POLLIN)
            self.peering.open(link, lambda message: self._tell(directory, message))
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
                self._carry_out(self.peering.tick(now))
                self.peering.rest()
                self._carry_out(self._queries.tick(now))
                self._carry_out(self.tracing.tick(now))
                self._carry_out(self.calls.tick(now))
                self._adapt_switch_interval()
                if now >= next_beat and self._all_attached.is_set():
                    next_beat = now + timing.HEARTBEAT_SECONDS
                    self._tell(directory, beat_of(self._participant, self.info))
            if self._reason and (answers := self._participant.ending(self._reason)):
                self._server.socket.linger = _UNREGISTER_MILLISECONDS
                self._carry_out(answers)
            if self._farewell:
                directory.linger = _UNREGISTER_MILLISECONDS
                self._tell(directory, protocol.Unregister(engine=self.info))
        except zmq.ContextTerminated:
            pass
        except Exception:
            # End the engine loudly, because without its endpoint it would drift out of the group unseen.
            logger.critical("the control endpoint of this engine failed; ending the engine", exc_info=True)
            os._exit(70)
        finally:
            self._switch_interval.end()
            link.close()
            directory.close()
            self._server.socket.close()

    def _adapt_switch_interval(self) -> None:
        """Shorten the interval during an update or a pause, because the trainer waits for this thread then."""
        if self._participant.update is not None or self._participant.generation != "running":
            self._switch_interval.begin()
        else:
            self._switch_interval.end()

    def _milliseconds_to_tick(self, next_beat: float) -> int:
        """Return how long to wait for a message: until the next beat, unless something may run out of time before."""
        state = self._participant
        asked = self._queries.waiting or self.tracing.waiting or self.calls.waiting or self.peering.waiting
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
                participant, epoch = self._participant, answer.committed_epoch
                self._carry_out(participant.on_group_epoch(answer.version, epoch, settled=answer.settled))
                self._registered.set()
                self.directory_refusal = ""
            if isinstance(answer, protocol.Engines):
                self._carry_out(self.peering.engines(answer, monotonic()))
            if isinstance(answer, protocol.Error) and answer.message != self.directory_refusal:
                self.directory_refusal = answer.message
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
            pass  # the directory is away, and the queue holds enough beats

    def _handle(self, caller: ReplyTo, message: protocol.EngineRequest | protocol.WorkerMessage) -> None:
        match message:
            case Hello():
                if message.protocol != protocol.PROTOCOL_VERSION:
                    self._server.answer(caller, wrong_protocol(message.protocol))
                else:
                    self._server.answer(caller, Welcome(protocol=protocol.PROTOCOL_VERSION, engine=self.info))
            case GetStatus():
                self._server.answer(caller, self._status())
            case DescribeWeights() | DigestWeights():
                self._ask_about_weights(caller, message)
            case GetTrace():
                self._carry_out(self.tracing.ask(caller, message, monotonic()))
            case Call():
                self._call(caller, message)
            case Fence():
                refusal = self._participant.fence(message.epoch)
                self._server.answer(caller, refusal or self._status())
            case Attach():
                self._attach(caller, message)
            case OfferWeights() | EndOffer():
                self._carry_out(self.peering.request(caller, message, monotonic()))
            case (
                WorkerDone()
                | WeightsMismatch()
                | DigestsTaken()
                | WeightsTaken()
                | WorkerTrace()
                | WorkerOffered()
                | WorkerOfferEnded()
                | ReadPacked()
                | WeightsFetched()
            ):
                self._hear(caller, message)
            case _:
                effects = self._participant.handle(caller, message, monotonic())
                self.tracing.asked(caller, message, self._participant)
                self._carry_out(effects)

    def call_done(self, effect: CallMethod, workers: tuple[protocol.CallAnswer, ...], error: str = "") -> list[Effect]:
        """Take the workers' answers to a call; for the engine's loop to post."""
        self._native_transfer.done(effect.method, effect.arguments, workers, error)
        return self.calls.done(effect.call, workers, error)

    def _call(self, caller: ReplyTo, message: Call) -> None:
        refusal = None if message.epoch is None else self._participant.fence(message.epoch)
        if refusal is None and not self.calls.knows(message.call):
            refusal = self._native_transfer.ask(message)
        self._carry_out([Reply(caller, refusal)] if refusal else self.calls.ask(caller, message, monotonic()))

    def _ask_about_weights(self, caller: ReplyTo, message: DescribeWeights | DigestWeights) -> None:
        if isinstance(message, DescribeWeights):
            self._carry_out(self._queries.describe(caller))
        elif self._participant.update_phase == "committing":
            self._server.answer(caller, protocol.Error(kind="busy", message="the engine is committing an update"))
        elif self._participant.sleep.reason:
            self._server.answer(caller, protocol.Error(kind="state", message=self._participant.sleep.reason))
        else:
            self._carry_out(self._queries.digest(caller, message, monotonic()))

    def _hear(self, worker: ReplyTo, message: _Report) -> None:
        known = self._workers.get(message.rank)
        if known is None or known[0] != worker.peer:
            return
        match message:
            case WorkerDone():
                self._carry_out(self._participant.worker_done(message))
            case WeightsMismatch():
                self._participant.weights_mismatch(message)
            case DigestsTaken():
                self._carry_out(self._queries.digests_taken(message))
            case WeightsTaken():
                self._carry_out(self._queries.weights_taken(message))
            case WorkerTrace():
                self._carry_out(self.tracing.worker_trace(message, monotonic()))
            case _:
                self._carry_out(self.peering.report(message, monotonic()))

    def _attach(self, caller: ReplyTo, message: Attach) -> None:
        own = secrets.compare_digest(message.token.encode(), self.attach_token.encode())
        if not own or message.worker.rank not in self._participant.workers:
            problem = f"{self.info.name} was not started with worker {message.worker.rank} on {message.worker.node}"
            self._server.answer(caller, protocol.Error(kind="state", message=problem))
            return
        self._workers[message.worker.rank] = (caller.peer, message.worker)
        workers = tuple(worker for _, (_, worker) in sorted(self._workers.items()))
        self.info = msgspec.structs.replace(self.info, workers=workers)
        self._server.answer(caller, protocol.Ack())
        if len(self._workers) == len(self._participant.workers):
            self._all_attached.set()

    def _status(self) -> Status:
        running, waiting = self._engine.request_counts()
        seconds = self._engine.oldest_call_seconds()
        return status_of(self._participant, self.info, running, waiting, seconds, self._engine.is_paused())

    def _carry_out(self, effects: list[Effect]) -> None:
        self.tracing.states(self._participant)
        if self._guard != (guard := guard_of(self._participant)):
            self._guard = guard
            self._engine.guard(guard)
        for effect in effects:
            match effect:
                case Reply():
                    self.tracing.answered(effect.caller)
                    self._server.answer(effect.caller, effect.answer)
                case Order():
                    for peer, _ in self._workers.values():
                        self._server.tell(peer, effect.message)
                case CallPause():
                    self._engine.pause(effect)
                case CallResume():
                    self._engine.resume(effect)
                case CallCancelPause():
                    self._engine.cancel_pause(effect.call)
                case CallCommit():
                    self._engine.commit(effect)
                case CallSleep() | CallWakeUp():
                    self._engine.change_sleep(effect)
                case CallMethod():
                    self._engine.call_method(effect)
                case _:
                    self.peering.carry_out(effect)
