"""How a worker of the simulation reads the weights of a peer: in pieces, each at a moment of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from areal_vllm_ext.protocol.peer_messages import FetchWeights

if TYPE_CHECKING:
    from areal_vllm_ext.protocol import Version

    from .engine import Engine

_PIECES = 3
_SILENT_SECONDS = 10.0


class Reading:
    """What one worker has read of a peer.

    Attributes:
        drafted: the peer's drafter.
        pieces: the version of the peer's weights at the moment when each was read.
        adapters: the manifests of the peer's adapters, by name, at the moment when they were read.
    """

    def __init__(self, order: FetchWeights, rank: int, now: float) -> None:
        (offer,) = (offer for offer in order.offers if offer.rank == rank)
        self.fetch, self.rank, self.address, self.digest = order.fetch, rank, offer.address, offer.layout
        self.offered = {one.unit.name: one.unit.manifest for one in offer.adapters}
        self.drafted = offer.attributes["draft"]
        self.pieces: list[Version] = []
        self.adapters: dict[str, str] | None = None
        self.started = now

    @property
    def complete(self) -> bool:
        return len(self.pieces) == _PIECES

    def __repr__(self) -> str:
        return f"{self.fetch}: {self.pieces}"


def read(reading: Reading, peer: Engine | None, now: float) -> str:
    """Read the next piece and compare it with its digest; return why that failed, or an empty string."""
    if peer is None:
        return "" if now - reading.started < _SILENT_SECONDS else "the connection is silent"
    piece = peer.send_piece(reading.fetch, reading.rank)
    if piece is None:
        return "the peer has ended its offer"
    if str(piece) != reading.digest:
        return "other bytes arrived than were offered"
    if reading.adapters is None:
        reading.adapters = {name: one for name, one in peer.adapters.items() if name in reading.offered}
        if reading.adapters != reading.offered:
            return "other adapters arrived than were offered"
    reading.pieces.append(piece)
    return ""
