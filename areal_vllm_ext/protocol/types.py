"""The types that messages are made of: bounds, names and structs.

Messages are ``msgspec`` structs with a type tag; unknown fields and unknown tags are refused. Durations are relative
seconds, because the clocks of nodes differ. ``docs/protocol.md`` describes each message.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

PROTOCOL_VERSION = 11
REQUEST_ID_BYTES = 16
NO_SLEEP_MODE = "this engine was started without vLLM's sleep mode: start it with --enable-sleep-mode, on a GPU"

# Bounds of what comes from the wire: room above every epoch, finite leases and waits, names of bounded length.
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
# Epochs are counted up. One that jumps further than this was not issued by a directory, and would use up the range.
EPOCH_JUMP = 2**32
Rank = Annotated[int, msgspec.Meta(ge=0, le=2**16)]
Name = Annotated[str, msgspec.Meta(max_length=4096)]
Version = int | Name
Seconds = Annotated[float, msgspec.Meta(ge=-1e7, le=1e7)]
LeaseSeconds = Annotated[float, msgspec.Meta(ge=0, le=300)]
PauseMode = Literal["abort", "wait", "keep"]
UpdatePhase = Literal["idle", "receiving", "prepared", "committing", "tainted", "stale", "foreign"]
Generation = Literal["running", "pausing", "paused", "resuming"]
SleepState = Literal["awake", "weights_only", "asleep_1", "asleep_2"]
SleepLevel = Literal[1, 2]
SleepTag = Literal["weights", "kv_cache"]
KVPolicy = Literal["recompute", "keep", "reuse"]
StagingKind = Literal["auto", "device", "host"]
ErrorKind = Literal[
    "malformed",  # the frames or the message could not be read
    "protocol",  # another protocol number
    "fenced",  # a higher epoch has been seen
    "busy",  # something in flight excludes the request
    "state",  # the engine's state does not allow the request
    "timeout",  # the engine gave up at the request's deadline
    "failed",  # the engine tried and failed
    "held",  # another holder has the lease
]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages: immutable, tagged with its class name, closed to unknown fields."""


class Payload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what messages carry."""


# The errors of ``decode`` for a message that cannot be read.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


# What messages carry


class WorkerInfo(Payload):
    """One device process (a TP/PP rank) of an engine."""

    rank: Rank
    node: Name
    pid: int
    device: Name
    device_id: Name


class EngineInfo(Payload):
    """One EngineCore: a DP rank of a replica.

    ``incarnation`` is new each time that the process starts. ``sleep_mode``: started with vLLM's ``--enable-sleep-mode``.
    ``lockstep``: the ranks of this replica compute together (MoE), so they also resume together. ``drafter``: how it drafts
    with a model (``eagle``, ``mtp``, ``draft_model``); empty if it does not.
    """

    replica: Name
    dp_rank: Rank
    dp_size: Rank
    headless: bool
    node: Name
    pid: int
    incarnation: Name
    address: Name
    dtype: Name
    workers: tuple[WorkerInfo, ...] = ()
    sleep_mode: bool = False
    lockstep: bool = False
    drafter: Name = ""

    @property
    def name(self) -> str:
        """Return the engine's name in messages to people."""
        return f"DP rank {self.dp_rank} of replica {self.replica} (node {self.node}, pid {self.pid})"


class TensorMeta(msgspec.Struct, frozen=True, array_like=True):
    """Name, shape and dtype (``torch`` name, such as ``bfloat16``) of one checkpoint tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """A checkpoint tensor inside a bucket, contiguous and row-major.

    ``offset`` counts bytes from the start of the bucket. In a bucket of ``allocations`` it counts from the start of the
    allocation with the number ``allocation``.
    """

    tensor: TensorMeta
    offset: int
    allocation: int = 0


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    """Device memory of the trainer: ``nbytes`` bytes that ``handle``, a ``cudaIpcMemHandle_t`` (64 bytes), opens."""

    handle: bytes
    nbytes: int


class WorkerWeights(Payload):
    """What one worker serves.

    ``live`` has the digest of each parameter and buffer of its model. ``changed`` names those whose digest was different
    right after the last commit, so they are damaged. Workers of equal ``layout`` must have equal ``live``. ``contents`` are
    the checkpoint's tensors behind them. ``manifest`` is that of the last update; empty for the weights it started with.
    ``uncompared``: the tensors of ``contents`` that are not known to be live, with the reason; an empty name means all.
    """

    rank: int
    layout: str
    manifest: str
    live: dict[str, int]
    changed: tuple[str, ...] = ()
    contents: tuple[tuple[TensorMeta, int], ...] = ()
    uncompared: dict[str, str] = {}


class CallAnswer(Payload):
    """What a user's method answered on one worker: ``value`` in msgpack, or the type and the message of its exception."""

    rank: int
    value: bytes = b""
    error_type: str = ""
    error: str = ""


# How the bytes travel: one struct per transport


class Broadcast(Payload, tag=True):
    """Rank 0 of a communicator, the trainer, broadcasts buckets. Ranks are assigned by the client, never computed.

    ``ranks`` maps a worker's rank inside its engine to its rank in the communicator. ``rendezvous`` is a
    ``host:port`` of the trainer's listener (TCP) or a unique id in hexadecimal (NCCL). Over TCP, workers prove that they know
    ``communicator``. ``established``: every rank joined in an earlier update, and no rank can join now.
    """

    backend: Literal["tcp", "nccl"]
    communicator: str
    world_size: int
    ranks: dict[int, int]
    rendezvous: str
    established: bool = False


class SharedMemory(Payload, tag=True):
    """Buckets lie in ``segment``: ``nbytes`` bytes of POSIX shared memory of trainer and workers on one host."""

    segment: str
    nbytes: int


class CudaIpc(Payload, tag=True):
    """Buckets lie in ``nbytes`` bytes of device memory that the trainer shares with the workers on its host.

    ``host`` is the kernel's boot id, ``device_id`` the GPU's UUID, ``handle`` a ``cudaIpcMemHandle_t`` (64 bytes). If
    ``shared``, most tensors come as buckets of ``allocations``, and a worker on that device stages nothing.
    """

    host: str
    device_id: str
    handle: bytes
    nbytes: int
    shared: bool = False


class Disk(Payload, tag=True):
    """A Hugging Face checkpoint directory that every worker can read."""

    path: str


class TorchGroup(Payload, tag=True):
    """Rank 0 of the torch process group ``group``, a trainer without this package, broadcasts tensors one by one.

    ``ranks`` maps a worker's rank inside its engine to its rank in the group. ``rendezvous`` is ``host:port`` of the trainer's
    TCPStore, ``joining`` a name for this joining: another one with the same group's name replaces it. ``established``: every
    rank joined in an earlier update. Its buckets have no digests.
    """

    backend: Literal["gloo", "nccl"]
    group: Name
    joining: Name
    world_size: int
    ranks: dict[int, int]
    rendezvous: Name
    established: bool = False


Transfer = Broadcast | SharedMemory | CudaIpc | Disk | TorchGroup


class Sender(Payload):
    """A rank of the trainer that sends in an update.

    ``workers``: the ranks, inside the engine, of the workers that it sends to; empty for all of them.
    """

    transfer: Transfer
    workers: tuple[Rank, ...] = ()


class Staging(Payload):
    """Where a worker keeps an update's bytes until the commit.

    ``nbytes`` of all weights and ``bucket`` of the largest bucket are 0 if unknown. ``on_device`` and ``on_host``: how many
    workers of this update stage on the same device and on the same host. ``keep``: keep the memory for the next update
    instead of freeing it.
    """

    kind: StagingKind = "auto"
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    on_device: Annotated[int, msgspec.Meta(ge=1, le=2**20)] = 1
    on_host: Annotated[int, msgspec.Meta(ge=1, le=2**20)] = 1
    keep: bool = False
    bucket: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


class Adapter(Payload):
    """A LoRA adapter that an update brings.

    ``config`` is peft's configuration, in JSON. ``manifest`` is that of the configuration and all tensors. If they come from a
    trainer that announces no digests, it names the update instead, and only the workers' votes are compared.
    """

    name: Name
    config: str
    manifest: str


class Units(Payload):
    """What an update consists of: base weights (or not), adapters that it brings, names of adapters that it removes.

    ``draft``: whether it brings the drafter's weights too.
    """

    weights: bool = True
    adapters: tuple[Adapter, ...] = ()
    removed: tuple[Name, ...] = ()
    draft: bool = False


WEIGHTS_ONLY = Units()


class ServedAdapter(Payload):
    """An adapter that an engine serves: the version of the update that brought it, and its manifest."""

    version: Version
    manifest: str


class Span(msgspec.Struct, frozen=True, array_like=True):
    """``name`` lasted from ``start`` to ``end``, in seconds by its process's clock; ``track`` is a row of a trace."""

    track: str
    name: str
    start: float
    end: float
