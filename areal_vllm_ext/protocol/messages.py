"""Every request on the wire, and what a worker and its engine tell each other.

A request travels as the frames ``[request id, msgpack]`` and its answer as ``[request id, msgpack]``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from .types import (
    PROTOCOL_VERSION,
    Allocation,
    EngineInfo,
    Epoch,
    KVPolicy,
    LeaseSeconds,
    Message,
    Name,
    PauseMode,
    Rank,
    Seconds,
    Segment,
    Sender,
    Span,
    Staging,
    Version,
    WorkerInfo,
    WorkerWeights,
)

# Requests to an engine


class Hello(Message):
    protocol: int = PROTOCOL_VERSION


class GetStatus(Message):
    pass


class DescribeWeights(Message):
    """Ask for the checkpoint tensors that the engine's model is made of."""


class Pause(Message):
    """Pause generation. ``update`` names the update that needs the pause; empty for a user's own pause.

    A user's own pause outlasts its request. With a ``lease`` it is over once ``holder`` has not said ``KeepPaused`` for so
    many seconds; 0: until somebody resumes.
    """

    epoch: Epoch
    mode: PauseMode
    kv: KVPolicy
    timeout: Seconds
    update: str = ""
    holder: str = ""
    lease: LeaseSeconds = 0


class KeepPaused(Message):
    """``holder``, whose pause has a lease, is alive. Commands nothing, so it carries no epoch."""

    holder: str
    lease: LeaseSeconds


class Resume(Message):
    epoch: Epoch


class Begin(Message):
    """Open an update. The answer comes when every worker of the engine is ready to receive.

    ``senders``: the trainer's ranks that send to this engine, by number. ``spans``: of each kind of span, engine and workers
    keep so many for ``GetTrace``; 0: no trace.
    """

    epoch: Epoch
    update: str
    version: Version
    senders: dict[Rank, Sender]
    timeout: Seconds
    staging: Staging = Staging()
    spans: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0


class Bucket(Message):
    """Announce one bucket of ``nbytes`` bytes. The answer comes when every worker holds it that ``sender`` sends to.

    ``digests`` are those of the segments' bytes (``digest.py``), made by the trainer when the bucket was filled.
    ``location`` is the bucket's offset in shared memory, host's or GPU's, in bytes; other transports leave it 0. Where there
    are ``allocations``, the tensors lie in the trainer's own memory instead, and may be read for as long as the last 8 bytes of
    the shared memory hold ``stamp``.
    """

    epoch: Epoch
    update: str
    index: int
    nbytes: int
    segments: tuple[Segment, ...]
    digests: tuple[int, ...] = ()
    location: int = 0
    sender: Rank = 0
    allocations: tuple[Allocation, ...] = ()
    stamp: int = 0

    @property
    def step(self) -> str:
        """What ``WorkerDone`` calls it."""
        return f"bucket {self.index} of sender {self.sender}" if self.sender else f"bucket {self.index}"


class Prepare(Message):
    """Ask for the vote, after each sender has sent so many ``buckets``.

    ``base``: the manifest of weights that the engine has, of which everything stays that was not sent; empty: all was sent.
    """

    epoch: Epoch
    update: str
    buckets: dict[Rank, int]
    base: str = ""


class Commit(Message):
    epoch: Epoch
    update: str


class Abort(Message):
    epoch: Epoch
    update: str
    reason: str


class Fence(Message):
    """Raise the epoch that the engine obeys, and ask for its status."""

    epoch: Epoch


class AdoptEpoch(Message):
    """The weights that the engine has are the group's, as of this epoch. Sent where an update was settled without an engine
    that may have switched: that one is stale when it comes back.
    """

    epoch: Epoch


class DigestWeights(Message):
    """Ask for digests of what every worker serves, taken while it generates. ``request`` is any name for the answers.

    With ``contents`` also of each checkpoint tensor that was applied last (or that the engine was started from).
    """

    request: str
    timeout: Seconds
    contents: bool = False


class GetTrace(Message):
    """Ask what engine and workers did in ``update``, the last that was begun here, and for how long. Answered after ``timeout``
    at the latest, without the workers that were silent.
    """

    update: str
    timeout: Seconds


EngineRequest = (
    Hello
    | GetStatus
    | DescribeWeights
    | Pause
    | KeepPaused
    | DigestWeights
    | Resume
    | Begin
    | Bucket
    | Prepare
    | Commit
    | Abort
    | Fence
    | AdoptEpoch
    | GetTrace
)


# A worker and its engine


class Attach(Message):
    """A worker's first word to its engine. ``token`` is what the engine told its own workers through ``areal_attach``."""

    worker: WorkerInfo
    token: str


class WorkerDone(Message):
    """A worker finished ``step`` of ``update``, or failed with ``error``. ``step`` names the request that asked.

    ``manifest``, in the vote, is ``digest.manifest`` of all tensors that the worker holds; of Begin, of those that it has, if
    it could do with what has changed since.
    """

    update: str
    rank: int
    step: str
    error: str = ""
    manifest: str = ""


class WeightsMismatch(Message):
    """A worker found, after it had switched to ``update``, that what it applied is not what it received."""

    update: str
    rank: Rank
    reason: str


class DigestsTaken(Message):
    """A worker's answer to ``DigestWeights``; ``error`` says why there is none, ``busy`` that it may ask again."""

    request: str
    rank: int
    weights: WorkerWeights | None = None
    error: str = ""
    busy: bool = False


class WorkerTrace(Message):
    """A worker's answer to ``GetTrace``, at ``now`` of its clock."""

    update: str
    rank: int
    now: float
    spans: tuple[Span, ...]


WorkerMessage = Attach | WorkerDone | WeightsMismatch | DigestsTaken | WorkerTrace
WorkerOrder = Begin | Bucket | Prepare | Abort | DigestWeights | GetTrace


# Requests to the directory


class Register(Message):
    """An engine says that it lives, who it is, and the highest epoch that it has seen. Repeated every second.

    ``committed_epoch`` is the epoch of the update that brought ``version``, 0 for the weights that it was started with.
    ``needs_recovery``: a client has left it in an update, or paused.
    """

    engine: EngineInfo
    epoch: Epoch
    version: Version = 0
    committed_epoch: Epoch = 0
    needs_recovery: bool = False


class Unregister(Message):
    """An engine ends, in order."""

    engine: EngineInfo


class Discover(Message):
    pass


class AcquireLease(Message):
    holder: Name
    seconds: LeaseSeconds


class RenewLease(Message):
    epoch: Epoch
    seconds: LeaseSeconds


class ReleaseLease(Message):
    epoch: Epoch


DirectoryRequest = Hello | Register | Unregister | Discover | AcquireLease | RenewLease | ReleaseLease
