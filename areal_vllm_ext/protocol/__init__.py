"""Every message on the wire, and nothing else.

A request travels as the frames ``[request id, msgpack]`` and its answer as ``[request id, msgpack]``. Messages are
``msgspec`` structs with a type tag; unknown fields and unknown tags are refused. Durations are seconds and relative,
because clocks of different nodes differ. ``docs/protocol.md`` describes each message.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PROTOCOL_VERSION = 6
REQUEST_ID_BYTES = 16

# Bounds of what comes from the wire: no epoch that leaves no higher one, no lease or wait for ever, no name without end.
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
# Epochs are counted up: one so far above all that were seen is no lease's, and would leave no room for later ones.
EPOCH_JUMP = 2**32
Rank = Annotated[int, msgspec.Meta(ge=0, le=2**16)]
Name = Annotated[str, msgspec.Meta(max_length=4096)]
Version = int | Name
Seconds = Annotated[float, msgspec.Meta(ge=-1e7, le=1e7)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0, le=300)]
PauseMode = Literal["abort", "wait", "keep"]
StatusPhase = Literal["idle", "receiving", "prepared", "committing", "tainted", "stale"]
KVPolicy = Literal["keep", "recompute"]
StagingKind = Literal["auto", "device", "host", "none"]
ErrorKind = Literal[
    "malformed",  # the frames or the message could not be read
    "protocol",  # another protocol number
    "fenced",  # a higher epoch has been seen
    "busy",  # something that excludes the request is under way
    "state",  # the engine's state does not allow the request
    "timeout",  # the engine gave up at the request's deadline
    "failed",  # the engine tried and failed
    "held",  # another holder has the lease
]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages: immutable, tagged with its class name, closed to unknown fields."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what messages carry."""


# What a message that cannot be read raises in ``decode``.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


# What messages carry


class WorkerInfo(Part):
    """One device process (a TP/PP rank) of an engine."""

    rank: Rank
    node: Name
    pid: int
    device: Name
    device_id: Name


class EngineInfo(Part):
    """One EngineCore: a DP rank of a replica. ``incarnation`` is new each time that the process starts."""

    replica: Name
    dp_rank: Rank
    dp_size: Rank
    headless: bool
    node: Name
    pid: int
    incarnation: Name
    address: Name
    model: Name
    dtype: Name
    device: Name
    vllm_version: Name
    package_version: Name
    workers: tuple[WorkerInfo, ...] = ()

    @property
    def name(self) -> str:
        """How people are told about this engine."""
        return f"DP rank {self.dp_rank} of replica {self.replica} (node {self.node}, pid {self.pid})"


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    """Name, shape and dtype (``torch`` name, such as ``bfloat16``) of one checkpoint tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """A checkpoint tensor inside a bucket: ``offset`` bytes from the bucket's start, contiguous, row-major. In a bucket of
    ``allocations``, from the start of the one with this number.
    """

    tensor: TensorMeta
    offset: int
    allocation: int = 0


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    """Device memory of the trainer's: ``nbytes`` bytes that a ``cudaIpcMemHandle_t`` (64 bytes) opens."""

    handle: bytes
    nbytes: int


class WorkerWeights(Part):
    """What one worker serves.

    ``live`` has the digest of each parameter and buffer of its model; ``changed`` names those that were another after the
    last commit, so are damaged. Workers of equal ``layout`` must have equal ``live``. ``contents`` are the checkpoint's tensors
    behind them, ``manifest`` is of those of the last update (empty for the weights it started with).
    """

    rank: int
    layout: str
    manifest: str
    live: dict[str, int]
    changed: tuple[str, ...] = ()
    contents: tuple[tuple[TensorMeta, int], ...] = ()


# How the bytes travel: one struct a transport


class Broadcast(Part, tag=True):
    """Rank 0 of a communicator, the trainer, broadcasts buckets. Ranks are assigned by the client, never computed.

    ``ranks`` maps a worker's rank inside its engine to its rank in the communicator. ``rendezvous`` is a
    ``host:port`` of the trainer's store (gloo) or a unique id in hexadecimal (NCCL). ``met``: all have met there in an
    earlier update, and nobody can any more.
    """

    backend: Literal["gloo", "nccl"]
    communicator: str
    world_size: int
    ranks: dict[int, int]
    rendezvous: str
    met: bool = False


class SharedMemory(Part, tag=True):
    """Buckets lie in ``segment``, ``nbytes`` bytes of POSIX shared memory that trainer and workers of one host share."""

    segment: str
    nbytes: int


class CudaIpc(Part, tag=True):
    """Buckets lie in ``nbytes`` bytes of device memory that the trainer shares with the workers of its host.

    ``host`` is the kernel's boot id, ``device_id`` the GPU's UUID, ``handle`` a ``cudaIpcMemHandle_t`` (64 bytes). With
    ``shares``, most tensors come as buckets of ``allocations``, and a worker on that device stages nothing.
    """

    host: str
    device_id: str
    handle: bytes
    nbytes: int
    shares: bool = False


class Disk(Part, tag=True):
    """A Hugging Face checkpoint directory that every worker can read."""

    path: str


Transfer = Broadcast | SharedMemory | CudaIpc | Disk


class Sender(Part):
    """A rank of the trainer that sends in an update. ``workers``: the ranks, inside the engine, of those of its workers that
    it sends to; empty for all of them.
    """

    transfer: Transfer
    workers: tuple[Rank, ...] = ()


class Staging(Part):
    """Where a worker keeps an update's bytes until the commit. ``none``: nowhere, they go straight into the live model.

    ``nbytes``: of all weights, ``bucket``: of the largest bucket; 0 where it is not known. ``on_device`` and ``on_host``: how
    many workers of this update stage on the same device, on the same host. ``keep``: the memory is kept for the next update,
    else it is given back.
    """

    kind: StagingKind = "auto"
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    on_device: Annotated[int, msgspec.Meta(ge=1, le=2**20)] = 1
    on_host: Annotated[int, msgspec.Meta(ge=1, le=2**20)] = 1
    keep: bool = False
    bucket: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


class Span(msgspec.Struct, frozen=True, array_like=True):
    """``name`` was done from ``start`` to ``end``, by the clock of whoever tells, in seconds; ``track`` is a row of a trace."""

    track: str
    name: str
    start: float
    end: float


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
    timeout: Seconds


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


class Agree(Message):
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
    | Agree
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
    nbytes: int = 0
    manifest: str = ""


class WeightsDamaged(Message):
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


WorkerMessage = Attach | WorkerDone | WeightsDamaged | DigestsTaken | WorkerTrace
WorkerOrder = Begin | Bucket | Prepare | Abort | DigestWeights | GetTrace


# Requests to the directory


class Register(Message):
    """An engine says that it lives, who it is, and the highest epoch that it has seen. Repeated every second.

    ``agreed`` is the epoch of the update that brought ``version``, 0 for the weights that it was started with.
    ``unsettled``: a client has left it in an update, or paused.
    """

    engine: EngineInfo
    epoch: Epoch
    version: Version = 0
    agreed: Epoch = 0
    unsettled: bool = False


class Unregister(Message):
    """An engine ends, in order."""

    engine: EngineInfo


class Discover(Message):
    pass


class AcquireLease(Message):
    holder: Name
    seconds: LeaseSeconds
    above: Epoch = 0


class RenewLease(Message):
    epoch: Epoch
    seconds: LeaseSeconds


class ReleaseLease(Message):
    epoch: Epoch


DirectoryRequest = Hello | Register | Unregister | Discover | AcquireLease | RenewLease | ReleaseLease


# Answers


class Welcome(Message):
    protocol: int
    package_version: str
    engine: EngineInfo | None = None


class Status(Message):
    """What an engine says of itself. It answers by itself even while the engine is busy, paused or stuck.

    ``weights`` is the manifest (see ``WorkerDone``) of the update that it serves; empty for the weights it started with.
    ``unproven`` says why they could not be compared with a fresh load.
    """

    engine: EngineInfo
    version: Version
    phase: StatusPhase
    flow: Literal["running", "pausing", "paused", "resuming"]
    pause_mode: PauseMode | None
    paused_for: str
    epoch: int
    update: str
    update_version: Version | None
    last_update: str
    requests_running: int
    requests_waiting: int
    waiting_for_engine: float
    agreed: int = 0
    orphaned: bool = False
    error: str = ""
    weights: str = ""
    unproven: str = ""


class Weights(Message):
    """The checkpoint's tensors; empty with ``error`` where they cannot be told (a model loaded with dummy weights)."""

    tensors: tuple[TensorMeta, ...]
    error: str = ""


class WeightDigests(Message):
    """The answer to ``DigestWeights``, of every worker by rank."""

    workers: tuple[WorkerWeights, ...]


class Trace(Message):
    """The answer to ``GetTrace``, all by the engine's clock: when the question came, when it was answered, and what was done.
    ``silent`` workers have not told.
    """

    received: float
    answered: float
    spans: tuple[Span, ...]
    silent: tuple[int, ...] = ()


class Ack(Message):
    """Done. ``manifest``: see ``WorkerDone``."""

    seconds: float = 0.0
    manifest: str = ""


class Engines(Message):
    """The directory's answer: who is alive; who was, with the seconds since it was last heard; who lives, but lost its place
    because another replica uses the same name; and who is new and waits to hear what the group has agreed on.
    """

    alive: tuple[EngineInfo, ...]
    joining: tuple[EngineInfo, ...] = ()
    lost: tuple[tuple[EngineInfo, float], ...] = ()
    usurped: tuple[EngineInfo, ...] = ()


class Lease(Message):
    """The lease is the asker's for so many ``seconds``. ``engines``, where it was acquired: who is there now, and nobody joins
    while it is held.
    """

    epoch: int
    seconds: float
    engines: Engines | None = None


class Registered(Message):
    """The directory's answer to a beat: the newest version that engines have agreed on, and the epoch of its update."""

    version: Version
    agreed: Epoch


class Error(Message):
    kind: ErrorKind
    message: str
    holder: str = ""
    epoch: int = 0


Answer = Welcome | Status | Weights | WeightDigests | Trace | Ack | Engines | Lease | Registered | Error

encoder = msgspec.msgpack.Encoder()
engine_decoder: msgspec.msgpack.Decoder[EngineRequest | WorkerMessage] = msgspec.msgpack.Decoder(
    EngineRequest | WorkerMessage
)
directory_decoder: msgspec.msgpack.Decoder[DirectoryRequest] = msgspec.msgpack.Decoder(DirectoryRequest)
worker_decoder: msgspec.msgpack.Decoder[WorkerOrder | Answer] = msgspec.msgpack.Decoder(WorkerOrder | Answer)
answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
