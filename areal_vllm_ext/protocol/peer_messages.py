"""Messages between an engine that fetches its group's weights and a peer that offers them, and between each and its workers.

engine that is stale                       peer
OfferWeights(fetch, committed_epoch) ────▶ its workers listen
                           ◀──────────── WeightsOffered: addresses, and the digest of each tensor
its workers connect, and read ◀═══════════ bytes, worker to worker
EndOffer(fetch)                      ────▶ has anything changed since?
                           ◀──────────── OfferEnded: the manifest of what each worker sent
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from .types import Adapter, Epoch, Message, Name, Payload, Rank, Seconds, TensorMeta, Version

HeldKind = Literal[
    "tensor",  # a parameter or buffer
    "attribute",  # a tensor that a load made of weights, and that a module keeps elsewhere
    "packed",  # the weight of a linear layer on a CPU, which no tensor shows
]


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of a worker's live model, in the format that kernels read.

    ``digest``: as it was after the last commit; None where that is not known before it is read.
    """

    tensor: TensorMeta
    kind: HeldKind
    digest: int | None = None


class HeldAdapter(Payload):
    """A LoRA adapter that a worker serves: what it is, and peft's tensors with the digests that they had when they came.

    They are numbered after those of ``held``.
    """

    unit: Adapter
    tensors: tuple[tuple[TensorMeta, int], ...]


class WorkerOffer(Payload):
    """What one worker offers, to the worker of equal ``layout`` that connects to ``address`` (``host:port``).

    ``attributes``: digests of further tensors in the model, which are not sent and must be equal. ``contents``: the
    checkpoint's tensors behind them; None for those that the engine was started with. ``compared``: whether these are known to
    be live. ``adapters``: those that were asked for.
    """

    rank: Rank
    layout: Name
    address: Name
    held: tuple[Held, ...]
    attributes: dict[str, int] = msgspec.field(default_factory=dict)
    contents: tuple[tuple[TensorMeta, int], ...] | None = None
    compared: bool = False
    adapters: tuple[HeldAdapter, ...] = ()


class OfferWeights(Message):
    """Ask an engine to let this engine's workers read what it serves, if the update of ``committed_epoch`` brought that.

    ``fetch`` is random: workers prove to each other that they know it. ``adapters``: the manifests of the adapters that it
    serves, by name.
    """

    fetch: Name
    committed_epoch: Epoch
    timeout: Seconds
    adapters: dict[Name, str] = msgspec.field(default_factory=dict)


class EndOffer(Message):
    """End an offer, and ask for the manifest of what was sent."""

    fetch: Name


class WeightsOffered(Message):
    """The answer to ``OfferWeights``: what the engine serves, and what each of its workers offers.

    ``update``, ``weights``, ``unproven``, ``draft_version``: as in ``Status``.
    """

    version: Version
    update: Name
    weights: Name
    unproven: Name
    workers: tuple[WorkerOffer, ...]
    draft_version: Version | None = None


class OfferEnded(Message):
    """The answer to ``EndOffer``: by rank, the manifest of what the worker sent. Nothing was committed meanwhile."""

    manifests: dict[Rank, str]


class WorkerOffered(Message):
    """A worker listens, or says in ``error`` why it cannot offer its weights."""

    fetch: str
    rank: Rank
    offer: WorkerOffer | None = None
    error: str = ""


class WorkerOfferEnded(Message):
    """A worker has ended its offer; ``manifest`` is that of what it sent, or ``error`` says why it sent not all."""

    fetch: str
    rank: Rank
    manifest: str = ""
    error: str = ""


class ReadPacked(Message):
    """A worker asks for a call on the engine's loop that reads ``count`` columns of a packed weight, from ``start`` on."""

    fetch: str
    rank: Rank
    layer: str
    start: Annotated[int, msgspec.Meta(ge=0, le=2**32)]
    count: Annotated[int, msgspec.Meta(ge=1, le=2**32)]


class FetchWeights(Message):
    """Order to a worker: read the weights of the peer's worker of the same rank, and keep them aside."""

    fetch: str
    peer: str
    offers: tuple[WorkerOffer, ...]
    timeout: Seconds


class EndFetch(Message):
    """Order to a worker: give a fetch up, and free its memory."""

    fetch: str
    reason: str


class WeightsFetched(Message):
    """A worker holds all tensors of the peer, each with its digest; or ``error`` says why it does not.

    ``unlike``: its layout is not the peer's, so asking this peer again is of no use.
    """

    fetch: str
    rank: Rank
    manifest: str = ""
    error: str = ""
    unlike: bool = False
