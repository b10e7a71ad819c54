"""The directory: which engines live, and who may command them. It commands nothing itself.

``Directory`` has no I/O and no clock: messages and clock readings in, answers out. ``serve`` runs it behind a socket:
in engine 0's process, or on its own (``areal-vllm directory``) for several replicas.
"""

from __future__ import annotations

import threading
import uuid
from time import monotonic
from typing import TYPE_CHECKING

import zmq

from . import __version__, protocol, security, wire
from .protocol import (
    EPOCH_JUMP,
    Ack,
    AcquireLease,
    Answer,
    DirectoryRequest,
    Discover,
    EngineInfo,
    Engines,
    Error,
    Hello,
    Lease,
    Register,
    ReleaseLease,
    RenewLease,
    Welcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BEAT_SECONDS = 1.0
# An engine that was not heard for so long is reported as lost, and forgotten after the second time.
LOST_AFTER = 5.0
FORGOTTEN_AFTER = 60.0
# So many engines at most, and as many that lost their place: whatever registers, memory has an end.
MOST_ENGINES = 4096
_MAX_MESSAGE_BYTES = 1 << 20


class Directory:
    """Registration, liveness and the lease."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, int], tuple[EngineInfo, float]] = {}
        # Processes that were replaced under their name and still beat: two replicas share one name.
        self._usurped: dict[str, tuple[EngineInfo, float]] = {}
        self._epoch = 0
        self._holder = ""
        self._lease_ends = 0.0

    def handle(self, message: DirectoryRequest, now: float) -> Answer:
        match message:
            case Hello():
                if message.protocol != protocol.PROTOCOL_VERSION:
                    return wrong_protocol(message.protocol)
                return Welcome(protocol=protocol.PROTOCOL_VERSION, package_version=__version__)
            case Register():
                return self._register(message, now)
            case Discover():
                return self._discover(now)
            case AcquireLease():
                return self._acquire(message, now)
            case RenewLease():
                return self._renew(message, now)
            case ReleaseLease():
                if message.epoch == self._epoch:
                    self._lease_ends = now
                return Ack()

    def _register(self, message: Register, now: float) -> Answer:
        # The newest incarnation of a rank replaces an older one, whose late beats must not bring it back. A lost one is
        # replaced by any: its successor may run on a node whose clock is behind.
        key = (message.engine.replica, message.engine.dp_rank)
        if problem := self._absurd(message, key, now):
            return Error(kind="state", message=problem)
        known = self._engines.get(key)
        if known and known[0].incarnation > message.engine.incarnation and now - known[1] <= LOST_AFTER:
            if len(self._usurped) < MOST_ENGINES:
                self._usurped[message.engine.incarnation] = (message.engine, now)
            return Error(
                kind="state",
                message=f"{known[0].name} took the place of {message.engine.name}: give each replica a name of its own "
                "(AREAL_VLLM_REPLICA)",
            )
        self._engines[key] = (message.engine, now)
        # After a restart of the directory the engines remember the epoch for it.
        self._epoch = max(self._epoch, message.epoch)
        return Ack()

    def _absurd(self, message: Register, key: tuple[str, int], now: float) -> str:
        """Why ``message`` cannot be an engine's; empty where it can."""
        if message.engine.dp_rank >= message.engine.dp_size:
            return f"{message.engine.name} cannot be one of {message.engine.dp_size}"
        if message.epoch > self._epoch + EPOCH_JUMP:
            return f"epoch {message.epoch} is no lease's: it is too far above {self._epoch}, the highest that was seen here"
        if max(len(self._engines), len(self._usurped)) >= MOST_ENGINES:
            self._prune(now)
        if len(self._engines) >= MOST_ENGINES and key not in self._engines:
            return f"this directory knows {MOST_ENGINES} engines already: use several directories"
        return ""

    def _prune(self, now: float) -> None:
        self._engines = {key: entry for key, entry in self._engines.items() if now - entry[1] <= FORGOTTEN_AFTER}
        self._usurped = {name: entry for name, entry in self._usurped.items() if now - entry[1] <= LOST_AFTER}

    def _discover(self, now: float) -> Answer:
        self._prune(now)
        by_rank = [entry for _, entry in sorted(self._engines.items())]
        return Engines(
            alive=tuple(engine for engine, heard in by_rank if now - heard <= LOST_AFTER),
            lost=tuple((engine, now - heard) for engine, heard in by_rank if now - heard > LOST_AFTER),
            usurped=tuple(engine for engine, heard in self._usurped.values() if now - heard <= LOST_AFTER),
        )

    def _acquire(self, message: AcquireLease, now: float) -> Answer:
        if message.above > self._epoch + EPOCH_JUMP:
            return Error(kind="fenced", epoch=self._epoch, message=f"epoch {message.above} is no lease's")
        if now < self._lease_ends and message.holder != self._holder:
            left = self._lease_ends - now
            return Error(
                kind="held",
                holder=self._holder,
                epoch=self._epoch,
                message=f"{self._holder} commands these engines (its lease runs out in {left:.1f} s unless renewed)",
            )
        self._epoch = max(self._epoch, message.above) + 1
        self._holder = message.holder
        self._lease_ends = now + message.seconds
        return Lease(epoch=self._epoch, seconds=message.seconds)

    def _renew(self, message: RenewLease, now: float) -> Answer:
        if message.epoch != self._epoch:
            return Error(kind="fenced", epoch=self._epoch, message="the lease was lost: somebody else holds it now")
        self._lease_ends = now + message.seconds
        return Lease(epoch=self._epoch, seconds=message.seconds)


def wrong_protocol(theirs: int) -> Error:
    """The answer to a peer of another protocol."""
    return Error(
        kind="protocol",
        message=f"peer speaks protocol {theirs}, this side {protocol.PROTOCOL_VERSION} (areal-vllm-ext {__version__}): "
        "install the same areal-vllm-ext on trainer and engines",
    )


def new_incarnation(now: float) -> str:
    """A name for a process that sorts after the names of earlier processes."""
    return f"{round(now * 1e6):020d}-{uuid.uuid4().hex[:8]}"


class DirectoryServer:
    """Runs a ``Directory`` in a thread of its own."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        port: int,
        key: security.ClusterKey,
        max_message_bytes: int = _MAX_MESSAGE_BYTES,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Bind now, so that an address in use is an error here and not in a thread."""
        self._server = wire.Server(context, host, port, key, protocol.directory_decoder, max_message_bytes)
        self._directory = Directory()
        self._clock = clock
        self.address = self._server.address
        self.thread = threading.Thread(target=self._run, name="areal-directory", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._server.socket.poll()
                for caller, message in self._server.requests():
                    self._server.answer(caller, self._directory.handle(message, self._clock()))
        except zmq.ContextTerminated:
            self._server.socket.close()
