"""Every request on the wire, and what a worker and its engine tell each other.

A request travels as the frames ``[request id, msgpack]`` and its answer as ``[request id, msgpack]``.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from .peer_messages import (
    EndFetch,
    EndOffer,
    FetchWeights,
    OfferWeights,
    ReadPacked,
    WeightsFetched,
    WorkerOffered,
    WorkerOfferEnded,
)
from .types import (
    PROTOCOL_VERSION,
    WEIGHTS_ONLY,
    Allocation,
    EngineInfo,
    Epoch,
    KVPolicy,
    LeaseSeconds,
    Message,
    Name,
    PauseMode,
    Payload,
    Rank,
    Seconds,
    Segment,
    Sender,
    SleepLevel,
    SleepTag,
    Span,
    Staging,
    TensorMeta,
    Units,
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

    A user's own pause outlasts its request. It ends ``lease`` seconds after ``holder``'s last ``KeepPaused``; a lease of 0
    lasts until a resume. ``to_sleep``: the engine runs, and is paused to sleep, so the client that wakes it up resumes it.
    """

    epoch: Epoch
    mode: PauseMode
    kv: KVPolicy
    timeout: Seconds
    update: str = ""
    holder: str = ""
    lease: LeaseSeconds = 0
    to_sleep: bool = False


class KeepPaused(Message):
    """Renew the pause of ``holder``. This commands nothing new, so it carries no epoch."""

    holder: str
    lease: LeaseSeconds


class Resume(Message):
    """Resume generation. ``update`` names the update whose pause ends; a user's own pause stands. Empty: end every pause."""

    epoch: Epoch
    update: str = ""


class Sleep(Message):
    """Take the weights and the KV cache of a paused engine from the device, by vLLM's sleep mode.

    ``level`` 1 keeps the weights aside in host memory, 2 discards them.
    """

    epoch: Epoch
    level: SleepLevel
    timeout: Seconds


class WakeUp(Message):
    """Bring back what ``tags`` name to the device; empty: all. Generation stays paused."""

    epoch: Epoch
    timeout: Seconds
    tags: tuple[SleepTag, ...] = ()


class Begin(Message):
    """Open an update. The answer comes when every worker of the engine is ready to receive.

    ``senders``: the trainer's ranks that send to this engine, by number. ``spans``: how many spans of each kind engine and
    workers keep for ``GetTrace``; 0: no trace.
    """

    epoch: Epoch
    update: str
    version: Version
    senders: dict[Rank, Sender]
    timeout: Seconds
    staging: Staging = Staging()
    spans: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 0


class Bucket(Message):
    """Announce one bucket of ``nbytes`` bytes. The answer comes when every worker that ``sender`` sends to holds it.

    ``digests`` are those of the segments' bytes (``integrity/digest.py``), computed by the trainer when it filled the bucket.
    ``location`` is the bucket's offset in bytes in shared memory, of the host or the GPU; 0 for other transports. If there
    are ``allocations``, the tensors lie in the trainer's own memory. They may be read while the last 8 bytes of the shared
    memory hold ``stamp``; the trainer overwrites them to revoke. ``adapter`` names the adapter whose tensors these are;
    ``draft``: they are the drafter's. Else they are base weights.
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
    adapter: Name = ""
    draft: bool = False

    @property
    def step(self) -> str:
        """Return the name of this step in ``WorkerDone``."""
        return f"bucket {self.index} of sender {self.sender}" if self.sender else f"bucket {self.index}"


class Prepare(Message):
    """Ask for the vote. ``buckets``: how many buckets each sender has sent.

    ``base``: the manifest of the live weights on which this update builds: every tensor that was not sent stays as it is.
    ``kept``, without a base: tensors that were not sent, and that are still as the engine was started with.
    Both empty: all tensors were sent. ``units``: what the update consists of; without base weights, these stay as they are.
    """

    epoch: Epoch
    update: str
    buckets: dict[Rank, int]
    base: str = ""
    kept: tuple[str, ...] = ()
    units: Units = WEIGHTS_ONLY


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
    """Date the engine's weights to this epoch: they are what the group committed last.

    Recovery sends it after it aborted without an engine that may have committed, so that this engine is stale on return.
    """

    epoch: Epoch


class DigestWeights(Message):
    """Ask for digests of what every worker serves, taken while the engine generates.

    ``request`` is any name; the workers' answers carry it. With ``contents``, also of each checkpoint tensor that was applied
    last, or that the engine was started from.
    """

    request: str
    timeout: Seconds
    contents: bool = False


class GetTrace(Message):
    """Ask what engine and workers did, and when, in ``update``, the last that began here.

    After ``timeout`` the answer comes without the workers that were silent.
    """

    update: str
    timeout: Seconds


class Call(Message):
    """Call a method of the user's own worker extension on every worker. ``call`` is any name; the engine runs each once.

    ``arguments`` is a msgpack array. ``epoch``: of the lease; None without one.
    """

    call: str
    method: Name
    arguments: bytes
    timeout: Seconds
    epoch: Epoch | None = None


EngineRequest = (
    Hello
    | GetStatus
    | DescribeWeights
    | Pause
    | KeepPaused
    | DigestWeights
    | Resume
    | Sleep
    | WakeUp
    | Begin
    | Bucket
    | Prepare
    | Commit
    | Abort
    | Fence
    | AdoptEpoch
    | GetTrace
    | Call
    | OfferWeights
    | EndOffer
)


# A worker and its engine


class Attach(Message):
    """Introduce a worker to its engine. ``token`` is what the engine gave its own workers through ``areal_attach``."""

    worker: WorkerInfo
    token: str


class WorkerDone(Message):
    """A worker finished ``step`` of ``update``, or failed with ``error``. ``step`` names the request that asked.

    ``manifest`` (``integrity/digest.py``): in the vote, of all units: the base weights that the worker will hold after the
    commit, the adapters and the drafter's weights that came. In the answer to Begin, the base of a delta update: of the live
    weights, if this worker accepts changed tensors only.
    """

    update: str
    rank: int
    step: str
    error: str = ""
    manifest: str = ""


class WeightsMismatch(Message):
    """A worker found, after the commit of ``update``, that it serves other weights than it received."""

    update: str
    rank: Rank
    reason: str


class DigestsTaken(Message):
    """A worker's answer to ``DigestWeights``; ``error`` says why it has none, ``busy`` that asking again may help."""

    request: str
    rank: int
    weights: WorkerWeights | None = None
    error: str = ""
    busy: bool = False


class DraftWeights(Payload):
    """What an engine's drafter takes, as ``Weights`` says it. ``with_base``: it is in the base model's checkpoint."""

    tensors: tuple[TensorMeta, ...]
    optional: tuple[str, ...] = ()
    ties: dict[str, str] = msgspec.field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    config: str = ""
    with_base: bool = False

    @classmethod
    def of(cls, weights: Weights, *, with_base: bool) -> DraftWeights:
        """Return what the drafter takes, given as of a base model."""
        return cls(weights.tensors, weights.optional, weights.ties, weights.prefixes, weights.config, with_base)

    @property
    def weights(self) -> Weights:
        """The same, as of a base model."""
        return Weights(
            tensors=self.tensors, optional=self.optional, ties=self.ties, prefixes=self.prefixes, config=self.config
        )


class Weights(Message):
    """What a model takes; ``tensors`` is empty with ``error`` if it is not known (quantised from other files, GGUF).

    ``optional`` names those that the model ignores or has under another name too, so that they need not be sent.
    ``ties`` has the first name of a tensor by each second one, also by second names that are not among ``tensors``.
    ``prefixes``: with and without one of these, a name means the same tensor.
    ``config`` is the model's Hugging Face configuration, in JSON; empty if it has none.
    ``draft`` is what the engine's drafter takes, beside this; None without one.
    """

    tensors: tuple[TensorMeta, ...]
    error: str = ""
    optional: tuple[str, ...] = ()
    ties: dict[str, str] = msgspec.field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    config: str = ""
    draft: DraftWeights | None = None

    @property
    def required(self) -> tuple[TensorMeta, ...]:
        """The tensors that must be sent."""
        optional = frozenset(self.optional)
        return tuple(tensor for tensor in self.tensors if tensor.name not in optional)


class WeightsTaken(Message):
    """What a worker's part of the model takes. It says so once, after it has attached."""

    rank: Rank
    weights: Weights


class WorkerTrace(Message):
    """A worker's answer to ``GetTrace``, at ``now`` of its clock."""

    update: str
    rank: int
    now: float
    spans: tuple[Span, ...]


PeerReport = WorkerOffered | WorkerOfferEnded | ReadPacked | WeightsFetched
WorkerMessage = Attach | WorkerDone | WeightsMismatch | DigestsTaken | WeightsTaken | WorkerTrace | PeerReport
PeerOrder = OfferWeights | EndOffer | FetchWeights | EndFetch
WorkerOrder = Begin | Bucket | Prepare | Abort | DigestWeights | GetTrace | PeerOrder


# Requests to the directory


class Register(Message):
    """An engine is alive: who it is, and the highest epoch that it has seen or heard of. Repeated every second.

    ``committed_epoch`` is the epoch of the update that brought ``version``; 0 for the weights that the engine started with.
    ``needs_recovery``: a client has left an update or a pause on it. ``stale``: it serves nothing until the answer says that
    its version is the newest.
    """

    engine: EngineInfo
    epoch: Epoch
    version: Version = 0
    committed_epoch: Epoch = 0
    needs_recovery: bool = False
    stale: bool = False


class Unregister(Message):
    """An engine ends on purpose."""

    engine: EngineInfo


class Discover(Message):
    pass


class Forget(Message):
    """Give up a lost engine for good, or all engines of a replica."""

    replica: Name
    dp_rank: Rank | None = None


class AcquireLease(Message):
    """Ask for the lease, after waiting for it for ``waited`` seconds. A refused holder keeps its place while it asks again."""

    holder: Name
    seconds: LeaseSeconds
    waited: Seconds = 0.0


class LeaveQueue(Message):
    """A client that waited for the lease has given up. A lease that it was granted meanwhile ends."""

    holder: Name


class RenewLease(Message):
    epoch: Epoch
    holder: Name
    seconds: LeaseSeconds


class ReleaseLease(Message):
    epoch: Epoch


DirectoryRequest = (
    Hello | Register | Unregister | Discover | Forget | AcquireLease | LeaveQueue | RenewLease | ReleaseLease
)
