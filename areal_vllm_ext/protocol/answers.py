"""Every answer on the wire, and the encoder and decoders of all messages."""

from __future__ import annotations

import msgspec

from .messages import (
    DirectoryRequest,
    EngineRequest,
    Weights,
    WorkerMessage,
    WorkerOrder,
)
from .peer_messages import OfferEnded, WeightsOffered
from .types import (
    CallAnswer,
    EngineInfo,
    Epoch,
    ErrorKind,
    Generation,
    Message,
    PauseMode,
    ServedAdapter,
    SleepState,
    Span,
    UpdatePhase,
    Version,
    WorkerWeights,
)

# Answers


class Welcome(Message):
    protocol: int
    engine: EngineInfo | None = None


class Status(Message):
    """What an engine says about itself. It answers even while its loop is busy, paused or stuck.

    ``weights`` is the manifest (see ``WorkerDone``) of the update that it serves; empty for the weights it started with.
    ``loaded`` says how the workers loaded them: ``plan``, ``shadow``, ``reload`` with the reason, or ``peer`` with its name.
    ``unproven`` says why they could not be compared with a fresh load.

    ``sleep``: what vLLM's sleep mode has left on the device. ``free_memory``: bytes that were free on the device after the last
    step of it, the least of all workers; None where none was taken. ``runs_when_awake``: the engine ran when it was put to
    sleep. ``adapters``: those that updates brought, by name. ``draft_version``: of the last update that moved the drafter.
    """

    engine: EngineInfo
    version: Version
    update_phase: UpdatePhase
    generation: Generation
    pause_mode: PauseMode | None
    paused_for: str
    epoch: int
    update: str
    last_update: str
    requests_running: int
    requests_waiting: int
    waiting_for_engine: float
    committed_epoch: int = 0
    orphaned: bool = False
    error: str = ""
    weights: str = ""
    loaded: str = ""
    unproven: str = ""
    sleep: SleepState = "awake"
    free_memory: int | None = None
    runs_when_awake: bool = False
    adapters: dict[str, ServedAdapter] = msgspec.field(default_factory=dict)
    draft_version: Version | None = None


class WeightDigests(Message):
    """The answer to ``DigestWeights``: every worker's, by rank."""

    workers: tuple[WorkerWeights, ...]


class Trace(Message):
    """The answer to ``GetTrace``, by the engine's clock: when the question came, when it was answered, and all spans.

    ``silent`` workers did not answer in time.
    """

    received: float
    answered: float
    spans: tuple[Span, ...]
    silent: tuple[int, ...] = ()


class CallAnswers(Message):
    """The answer to ``Call``: every worker's, by rank."""

    workers: tuple[CallAnswer, ...]


class Ack(Message):
    """Done. ``manifest``: see ``WorkerDone``."""

    seconds: float = 0.0
    manifest: str = ""


class Engines(Message):
    """The directory's answer to ``Discover``.

    ``alive`` engines; ``lost`` ones, with the seconds since their last beat; ``displaced`` ones, which are alive but lost their
    place to another replica of the same name; ``joining`` ones, which wait to hear what the group committed last; and
    ``forgotten`` ones (replica and DP rank), which were lost and which a user gave up.
    """

    alive: tuple[EngineInfo, ...]
    joining: tuple[EngineInfo, ...] = ()
    lost: tuple[tuple[EngineInfo, float], ...] = ()
    displaced: tuple[EngineInfo, ...] = ()
    forgotten: tuple[tuple[str, int], ...] = ()


class Lease(Message):
    """The caller holds the lease for ``seconds``.

    ``engines``, in the answer to ``AcquireLease``: who is there now; no engine joins while the lease is held.
    """

    epoch: int
    seconds: float
    engines: Engines | None = None


class Registered(Message):
    """The directory's answer to a beat: the newest version that an engine has committed, and the epoch of its update.

    ``settled``, for an engine that is stale: none can have committed something newer, so if it has this it may serve it.
    """

    version: Version
    committed_epoch: Epoch
    settled: bool = False


class Error(Message):
    kind: ErrorKind
    message: str
    holder: str = ""
    epoch: int = 0


Answer = (
    Welcome
    | Status
    | Weights
    | WeightDigests
    | Trace
    | CallAnswers
    | WeightsOffered
    | OfferEnded
    | Ack
    | Engines
    | Lease
    | Registered
    | Error
)

encoder = msgspec.msgpack.Encoder()
engine_decoder: msgspec.msgpack.Decoder[EngineRequest | WorkerMessage] = msgspec.msgpack.Decoder(
    EngineRequest | WorkerMessage
)
directory_decoder: msgspec.msgpack.Decoder[DirectoryRequest] = msgspec.msgpack.Decoder(DirectoryRequest)
worker_decoder: msgspec.msgpack.Decoder[WorkerOrder | Answer] = msgspec.msgpack.Decoder(WorkerOrder | Answer)
answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
