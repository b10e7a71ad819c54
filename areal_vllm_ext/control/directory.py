"""The directory: which engines are alive, which weights they agreed on, and who may command them.

``Directory`` has no I/O and no clock: messages and clock readings go in, answers come out. ``directory_server.py`` runs it.
"""

from __future__ import annotations

import uuid

from .. import protocol
from .._version import __version__
from ..protocol import (
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
    Registered,
    ReleaseLease,
    RenewLease,
    Unregister,
    Welcome,
    timing,
)

# Upper bound of registered engines, and of displaced ones, so that whatever registers cannot exhaust memory.
MOST_ENGINES = 4096


class Directory:
    """Registration, liveness and the lease."""

    def __init__(self, started: float = 0.0, settle_seconds: float = 0.0) -> None:
        """
        Args:
            started: the clock's reading.
                settle_seconds: for so long after its start it does not say what the group agreed on: after a restart, whoever
                knows may not have been heard yet.
        """
        self._started = started
        self._settle_seconds = settle_seconds
        self._engines: dict[tuple[str, int], tuple[EngineInfo, float]] = {}
        self._beats: dict[tuple[str, int], Register] = {}
        # The newest that was agreed on, also where every engine that had it is gone: none that comes back serves an older one.
        self._newest: Register | None = None
        # Who has heard what the group agreed on. Nobody else serves, or is told to do anything.
        self._joined: set[tuple[str, int]] = set()
        # Processes that were replaced under their name and still beat: two replicas share one name.
        self._displaced: dict[str, tuple[EngineInfo, float]] = {}
        self._epoch = 0
        self._holder = ""
        self._lease_ends = 0.0

    def handle(self, message: DirectoryRequest, now: float) -> Answer:
        match message:
            case Hello():
                if message.protocol != protocol.PROTOCOL_VERSION:
                    return wrong_protocol(message.protocol)
                return Welcome(protocol=protocol.PROTOCOL_VERSION)
            case Register():
                return self._register(message, now)
            case Unregister():
                return self._unregister(message)
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
        if known and known[0].incarnation > message.engine.incarnation and now - known[1] <= timing.LOST_AFTER_SECONDS:
            if len(self._displaced) < MOST_ENGINES:
                self._displaced[message.engine.incarnation] = (message.engine, now)
            return Error(
                kind="state",
                message=f"{known[0].name} took the place of {message.engine.name}: give each replica a name of its own "
                "(AREAL_VLLM_REPLICA)",
            )
        self._engines[key] = (message.engine, now)
        if known is None or known[0].incarnation != message.engine.incarnation:
            self._joined.discard(key)
        self._beats[key] = message
        if self._newest is None or message.committed_epoch >= self._newest.committed_epoch:
            self._newest = message
        # After a restart of the directory the engines remember the epoch for it.
        self._epoch = max(self._epoch, message.epoch)
        if key not in self._joined:
            if not self._knows_what_was_agreed(now):
                return Ack()
            self._joined.add(key)
        assert self._newest is not None
        return Registered(version=self._newest.version, committed_epoch=self._newest.committed_epoch)

    def _knows_what_was_agreed(self, now: float) -> bool:
        """Not just after its start, nor while a client may be changing it, nor before everybody has told of the change."""
        told_after = self._lease_ends + timing.HEARTBEAT_SECONDS if self._lease_ends else 0.0
        return (
            now - self._started >= self._settle_seconds
            and now >= self._lease_ends
            and all(
                heard >= told_after or now - heard > timing.LOST_AFTER_SECONDS
                for key, (_, heard) in self._engines.items()
                if key in self._joined
            )
        )

    def _unregister(self, message: Unregister) -> Answer:
        key = (message.engine.replica, message.engine.dp_rank)
        known = self._engines.get(key)
        if known and known[0].incarnation == message.engine.incarnation:
            self._forget(key)
        return Ack()

    def _forget(self, key: tuple[str, int]) -> None:
        del self._engines[key], self._beats[key]
        self._joined.discard(key)

    def recovery_due(self, now: float) -> bool:
        """Whether no client is there, and has left engines in an update, or paused."""
        if now < self._lease_ends:
            return False
        # A beat from before the lease ended tells of what its holder has settled since.
        needs_recovery = any(
            self._beats[key].needs_recovery
            for key, (_, heard) in self._engines.items()
            if key in self._joined and heard > self._lease_ends and now - heard <= timing.LOST_AFTER_SECONDS
        )
        # What an engine that is not heard yet has done decides what the others must do: it gets the time to be heard.
        return needs_recovery and (now - self._started > timing.LOST_AFTER_SECONDS or not self._some_rank_missing())

    def _some_rank_missing(self) -> bool:
        sizes = {replica: engine.dp_size for (replica, _), (engine, _) in self._engines.items()}
        return any((replica, rank) not in self._engines for replica, size in sizes.items() for rank in range(size))

    def _absurd(self, message: Register, key: tuple[str, int], now: float) -> str:
        """Why ``message`` cannot be an engine's; empty where it can."""
        if message.engine.dp_rank >= message.engine.dp_size:
            return f"{message.engine.name} cannot be one of {message.engine.dp_size}"
        if max(message.epoch, message.committed_epoch) > self._epoch + EPOCH_JUMP:
            return f"epoch {message.epoch} is no lease's: it is too far above {self._epoch}, the highest that was seen here"
        if max(len(self._engines), len(self._displaced)) >= MOST_ENGINES:
            self._prune(now)
        if len(self._engines) >= MOST_ENGINES and key not in self._engines:
            return f"this directory knows {MOST_ENGINES} engines already: use several directories"
        return ""

    def _prune(self, now: float) -> None:
        for key, (_, heard) in list(self._engines.items()):
            if now - heard > timing.FORGOTTEN_AFTER_SECONDS:
                self._forget(key)
        self._displaced = {
            name: entry for name, entry in self._displaced.items() if now - entry[1] <= timing.LOST_AFTER_SECONDS
        }

    def _discover(self, now: float) -> Engines:
        self._prune(now)
        by_rank = sorted(self._engines.items())
        alive = [(key, engine) for key, (engine, heard) in by_rank if now - heard <= timing.LOST_AFTER_SECONDS]
        return Engines(
            alive=tuple(engine for key, engine in alive if key in self._joined),
            joining=tuple(engine for key, engine in alive if key not in self._joined),
            lost=tuple(
                (engine, now - heard) for _, (engine, heard) in by_rank if now - heard > timing.LOST_AFTER_SECONDS
            ),
            displaced=tuple(
                engine for engine, heard in self._displaced.values() if now - heard <= timing.LOST_AFTER_SECONDS
            ),
        )

    def _acquire(self, message: AcquireLease, now: float) -> Answer:
        if now < self._lease_ends and message.holder != self._holder:
            left = self._lease_ends - now
            return Error(
                kind="held",
                holder=self._holder,
                epoch=self._epoch,
                message=f"{self._holder} commands these engines (its lease runs out in {left:.1f} s unless renewed)",
            )
        self._epoch += 1
        self._holder = message.holder
        self._lease_ends = now + message.seconds
        return Lease(epoch=self._epoch, seconds=message.seconds, engines=self._discover(now))

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
