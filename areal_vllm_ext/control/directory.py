"""The directory: which engines are alive, which weights they committed last, and who may command them.

``Directory`` has no I/O and no clock: messages and clock readings go in, answers come out. ``directory_server.py`` runs it.
"""

from __future__ import annotations

import uuid

import msgspec

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
    Forget,
    Hello,
    Lease,
    LeaveQueue,
    Register,
    Registered,
    ReleaseLease,
    RenewLease,
    Unregister,
    Welcome,
    timing,
)
from .lease import Leases

# Upper bound of registered engines, of displaced and of forgotten ones, so that registrations cannot exhaust memory.
MOST_ENGINES = 4096

_Key = tuple[str, int]  # replica and DP rank


class Directory:
    """Registration, liveness and the lease."""

    def __init__(self, started: float = 0.0, settle_seconds: float = 0.0) -> None:
        """
        Args:
            started: the clock's reading.
            settle_seconds: time after the start in which no engine joins and no lease is granted. After a restart, the
                engine that knows the last commit, or the client that holds the lease, may not have been heard yet.
        """
        self._started = started
        self._settle_seconds = settle_seconds
        self._leases = Leases(started + settle_seconds)
        # Each registered engine, and the time of its last heartbeat.
        self._engines: dict[_Key, tuple[EngineInfo, float]] = {}
        self._heartbeats: dict[_Key, Register] = {}
        # The heartbeat with the highest committed epoch. It stays when its engine is gone, so that no engine that comes
        # back serves older weights.
        self._newest: Register | None = None
        # Engines that have heard the committed epoch. Only these serve, and only these are commanded.
        self._joined: set[_Key] = set()
        # Since when the others have been waiting to join, and engines that have fetched weights from a peer to serve them.
        self._joining_since: dict[_Key, float] = {}
        # Processes that were replaced under their name and still send heartbeats: two replicas share one name.
        self._displaced: dict[str, tuple[EngineInfo, float]] = {}
        # Engines that were lost and that a user gave up. A dictionary, because it keeps the order.
        self._forgotten: dict[_Key, None] = {}

    def handle(self, message: DirectoryRequest, now: float) -> Answer:
        """Return the answer to ``message``."""
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
            case Forget():
                return self._forget(message, now)
            case AcquireLease():
                answer = self._leases.acquire(message, now, self._joins_before(now - message.waited, now))
                if isinstance(answer, Lease):
                    return msgspec.structs.replace(answer, engines=self._discover(now))
                return answer
            case LeaveQueue():
                self._leases.leave(message.holder, now)
                return Ack()
            case RenewLease():
                return self._leases.renew(message, now)
            case ReleaseLease():
                self._leases.release(message.epoch, now)
                return Ack()

    def _register(self, message: Register, now: float) -> Answer:
        key = (message.engine.replica, message.engine.dp_rank)
        if problem := self._reason_to_refuse(message, key, now):
            return Error(kind="state", message=problem)
        known = self._engines.get(key)
        # A newer incarnation replaces an older one, whose late heartbeats must not bring it back. A lost engine is replaced
        # by any incarnation, because its successor may run on a node whose clock is behind.
        if known and known[0].incarnation > message.engine.incarnation and not _is_lost(known[1], now):
            if len(self._displaced) < MOST_ENGINES:
                self._displaced[message.engine.incarnation] = (message.engine, now)
            return Error(
                kind="state",
                message=f"{known[0].name} took the place of {message.engine.name}: give each replica its own "
                "AREAL_VLLM_REPLICA",
            )
        self._engines[key] = (message.engine, now)
        self._forgotten.pop(key, None)
        if known is None or known[0].incarnation != message.engine.incarnation:
            self._joined.discard(key)
            self._joining_since[key] = now
        self._heartbeats[key] = message
        if self._newest is None or message.committed_epoch >= self._newest.committed_epoch:
            self._newest = message
        # After a restart of the directory, the engines bring the epoch back.
        self._leases.epoch = max(self._leases.epoch, message.epoch)
        settled = self._knows_committed_epoch(now) if message.stale or key not in self._joined else False
        if key not in self._joined:
            if not settled:
                return Ack()
            self._joined.add(key)
        newest = self._newest
        # An engine that has fetched the newest weights from a peer serves them once it hears that none are newer.
        if message.stale and message.committed_epoch >= newest.committed_epoch and not settled:
            self._joining_since.setdefault(key, now)
        else:
            self._joining_since.pop(key, None)
        settled = settled and message.stale and self._can_resume(message.engine, newest.committed_epoch, now)
        return Registered(version=newest.version, committed_epoch=newest.committed_epoch, settled=settled)

    def _can_resume(self, engine: EngineInfo, epoch: int, now: float) -> bool:
        """Return whether a stale engine would wait for no other rank when it resumes, where ranks resume together."""
        return not engine.lockstep or all(
            self._heartbeats[key].committed_epoch >= epoch or _is_lost(heard, now)
            for key, (_, heard) in self._engines.items()
            if key[0] == engine.replica
        )

    def _reason_to_refuse(self, message: Register, key: _Key, now: float) -> str:
        """Say why ``message`` cannot come from an engine of this group; empty if it can."""
        epoch = self._leases.epoch
        if message.engine.dp_rank >= message.engine.dp_size:
            return f"{message.engine.name} cannot be one of {message.engine.dp_size}"
        if max(message.epoch, message.committed_epoch) > epoch + EPOCH_JUMP:
            return f"epoch {message.epoch} is no lease's: it is too far above {epoch}, the highest that was seen here"
        if max(len(self._engines), len(self._displaced)) >= MOST_ENGINES:
            self._make_room(now)
        if len(self._engines) >= MOST_ENGINES and key not in self._engines:
            return f"this directory knows {MOST_ENGINES} engines, which is its limit: stop engines that are not needed"
        return ""

    def _knows_committed_epoch(self, now: float) -> bool:
        """Whether no engine can have committed something that this directory has not heard of.

        That may be so just after the start, while a client holds the lease, and until every engine that has joined was
        heard again after the lease.
        """
        ends = self._leases.ends
        heard_again = ends + timing.HEARTBEAT_SECONDS if ends else 0.0
        return (
            now - self._started >= self._settle_seconds
            and now >= ends
            and all(
                heard >= heard_again or _is_lost(heard, now)
                for key, (_, heard) in self._engines.items()
                if key in self._joined
            )
        )

    def _joins_before(self, since: float, now: float) -> str:
        """Say which engine joins before a client that came at ``since`` gets the lease; empty if none does.

        An engine joins while the lease is free, so clients that command without a break would keep it out for ever. It joins
        within 6 s: by then every engine was heard again or is lost.
        """
        for key, waits_since in self._joining_since.items():
            engine, heard = self._engines[key]
            if waits_since < since and not _is_lost(heard, now):
                return f"{engine.name} has just started, or fetched its weights, and joins first"
        return ""

    def _unregister(self, message: Unregister) -> Answer:
        key = (message.engine.replica, message.engine.dp_rank)
        known = self._engines.get(key)
        if known and known[0].incarnation == message.engine.incarnation:
            self._remove(key)
        return Ack()

    def _forget(self, message: Forget, now: float) -> Answer:
        """Give up lost engines for good: commands go on without them."""
        known = {
            key: entry
            for key, entry in self._engines.items()
            if key[0] == message.replica and message.dp_rank in (None, key[1])
        }
        keys = {(message.replica, message.dp_rank)} if message.dp_rank is not None else set(known)
        if not keys or not any(replica == message.replica for replica, _ in self._engines):
            return Error(kind="state", message=f"this directory knows no replica {message.replica}")
        for engine, heard in known.values():
            if not _is_lost(heard, now):
                return Error(kind="state", message=f"{engine.name} is alive: stop it before it is forgotten")
        for key in sorted(keys):
            if key in known:
                self._remove(key)
            self._forgotten[key] = None
        while len(self._forgotten) > MOST_ENGINES:
            del self._forgotten[next(iter(self._forgotten))]
        return self._discover(now)

    def _remove(self, key: _Key) -> None:
        del self._engines[key], self._heartbeats[key]
        self._joined.discard(key)
        self._joining_since.pop(key, None)

    def recovery_due(self, now: float) -> bool:
        """Whether a client that is gone has left engines in an update, or paused."""
        # Ignore heartbeats sent before the lease ended: its holder is at work, or may have cleaned up since.
        needs_recovery = any(
            self._heartbeats[key].needs_recovery
            for key, (_, heard) in self._engines.items()
            if key in self._joined and heard > self._leases.ends and not _is_lost(heard, now)
        )
        # After a restart, wait for every rank to register: a missing one may have committed, which decides for all.
        return needs_recovery and (_is_lost(self._started, now) or not self._some_rank_missing())

    def _some_rank_missing(self) -> bool:
        sizes = {replica: engine.dp_size for (replica, _), (engine, _) in self._engines.items()}
        return any((replica, rank) not in self._engines for replica, size in sizes.items() for rank in range(size))

    def _make_room(self, now: float) -> None:
        """Remove engines that were lost long ago, and displaced processes that have ended."""
        for key, (_, heard) in list(self._engines.items()):
            if now - heard > timing.FORGOTTEN_AFTER_SECONDS:
                self._remove(key)
        self._drop_ended(now)

    def _drop_ended(self, now: float) -> None:
        self._displaced = {name: entry for name, entry in self._displaced.items() if not _is_lost(entry[1], now)}

    def _discover(self, now: float) -> Engines:
        self._drop_ended(now)
        by_rank = sorted(self._engines.items())
        alive = [(key, engine) for key, (engine, heard) in by_rank if not _is_lost(heard, now)]
        return Engines(
            alive=tuple(engine for key, engine in alive if key in self._joined),
            joining=tuple(engine for key, engine in alive if key not in self._joined),
            lost=tuple((engine, now - heard) for _, (engine, heard) in by_rank if _is_lost(heard, now)),
            displaced=tuple(engine for engine, _ in self._displaced.values()),
            forgotten=tuple(self._forgotten),
        )


def _is_lost(heard: float, now: float) -> bool:
    return now - heard > timing.LOST_AFTER_SECONDS


def wrong_protocol(theirs: int) -> Error:
    """Return the answer to a peer of another protocol."""
    return Error(
        kind="protocol",
        message=f"peer speaks protocol {theirs}, this side {protocol.PROTOCOL_VERSION} (areal-vllm-ext {__version__}): "
        "install the same areal-vllm-ext on trainer and engines",
    )


def new_incarnation(now: float) -> str:
    """Return a name for a process that sorts after the names of earlier processes."""
    return f"{round(now * 1e6):020d}-{uuid.uuid4().hex[:8]}"
