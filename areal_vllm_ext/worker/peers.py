"""A worker's fetches from peers, and its offers to them.

Orders come from the receiver's thread, calls from the worker's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol.peer_messages import EndFetch, EndOffer, FetchWeights, OfferWeights
from .fetching import Fetching
from .offering import Offering

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from ..protocol.messages import PeerOrder, PeerReport
    from .context import WorkerContext


class Peers:
    """At most one fetch, and the engine's offers."""

    def __init__(self, context: WorkerContext, host: str, report: Callable[[PeerReport], None]) -> None:
        """
        Args:
            context: of the worker.
            host: the address of this machine on which offers listen.
            report: sends a message to the engine's endpoint.
        """
        self._context, self._host, self._report = context, host, report
        self._fetching: Fetching | None = None
        self._offerings: dict[str, Offering] = {}

    def order(self, message: PeerOrder) -> None:
        """Carry out an order; returns at once."""
        match message:
            case OfferWeights():
                offering = self._offerings[message.fetch] = Offering(self._context, message, self._host, self._report)
                offering.start()
            case EndOffer():
                if ended := self._offerings.pop(message.fetch, None):
                    ended.end()
            case FetchWeights():
                if self._fetching is not None:
                    self._fetching.cancel()
                self._fetching = Fetching(self._context, message, self._report)
                self._fetching.start()
            case EndFetch():
                if self._fetching is not None and self._fetching.name == message.fetch:
                    self._fetching.cancel()
                    self._fetching = None

    def commit(self, fetch: str, update: str, numbers: Mapping[str, int], kept: Collection[int]) -> None:
        """Make what was fetched live. See ``Fetching.commit``.

        Raises:
            RuntimeError: it was given up, or the live weights are not what was fetched.
        """
        fetching = self._fetching
        if fetching is None or fetching.name != fetch:
            raise RuntimeError(f"worker {self._context.rank} has not fetched these weights")
        try:
            fetching.commit(update, numbers, kept)
        finally:
            self._fetching = None

    def read_packed(self, rank: int, fetch: str, layer: str, start: int, count: int) -> None:
        """Read columns of a packed weight for an offer of this worker."""
        if rank == self._context.rank and (offering := self._offerings.get(fetch)) is not None:
            offering.take_columns(layer, start, count)
