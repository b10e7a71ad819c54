"""The endpoint's half of fetching from peers: what it fetches, what it offers, and its connections to other engines.

Used from the endpoint's thread only.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Any, Protocol

import zmq

from .. import protocol
from ..protocol.peer_messages import OfferWeights, ReadPacked, WeightsFetched, WorkerOffered
from ..protocol.server import connect
from .effects import AskDirectory, AskPeer, CallCommitFetched, CallReadPacked
from .offers import Offers
from .returning import Returning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..protocol import Answer, Discover, Engines, Message, security
    from ..protocol.messages import PeerReport
    from ..protocol.peer_messages import EndOffer
    from ..protocol.server import ReplyTo
    from .effects import Effect
    from .participant import Participant

logger = logging.getLogger("vllm.areal_vllm_ext")


class PeerCalls(Protocol):
    """What fetches and offers ask of their engine."""

    def commit_fetched(self, effect: CallCommitFetched) -> None: ...
    def read_packed(self, order: ReadPacked) -> None: ...


class PeerLink:
    """Connections by address; they are opened by the first request, and closed together."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], poller: zmq.Poller, key: security.ClusterKey, identity: bytes
    ) -> None:
        self._context, self._poller, self._key, self._identity = context, poller, key, identity
        self._sockets: dict[str, zmq.Socket[Any]] = {}

    def ask(self, effect: AskPeer) -> None:
        """Send a request; ``answers`` yields what comes back. A request that cannot be sent has no answer."""
        socket = self._sockets.get(effect.address)
        if socket is None:
            socket = self._sockets[effect.address] = connect(self._context, effect.address, self._key, self._identity)
            self._poller.register(socket, zmq.POLLIN)
        number = effect.number.to_bytes(protocol.REQUEST_ID_BYTES, "big")
        message: Message = effect.message
        try:
            socket.send_multipart([number, protocol.encoder.encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            logger.info("areal_vllm_ext: %s cannot be asked now", effect.address)

    def answers(self) -> Iterator[tuple[int, Answer]]:
        """Yield the answers that have come, each with the number of its request."""
        for address, socket in self._sockets.items():
            while socket.poll(0):
                frames = socket.recv_multipart()
                try:
                    answer = protocol.answer_decoder.decode(frames[-1])
                except protocol.UNREADABLE as error:
                    answer = protocol.Error(kind="malformed", message=f"{address} cannot be understood: {error}")
                yield int.from_bytes(frames[0], "big"), answer

    def close(self) -> None:
        """Close every connection."""
        for socket in self._sockets.values():
            self._poller.unregister(socket)
            socket.close(linger=200)  # the end of an offer may be on its way
        self._sockets = {}


class Peering:
    """Fetches and offers of one engine.

    Attributes:
        returning: how it gets its group's weights when it is stale.
    """

    def __init__(self, participant: Participant, address: str, engine: PeerCalls, *, enabled: bool) -> None:
        self.returning = Returning(participant, address, lambda: secrets.token_hex(16), enabled=enabled)
        self._offers = Offers(participant, enabled=enabled)
        self._participant, self._engine = participant, engine
        self._link: PeerLink | None = None
        self._ask_directory: Callable[[Discover], None] = lambda _: None
        self._said = ""

    @property
    def waiting(self) -> bool:
        """True if an offer has a deadline to keep."""
        return self._offers.waiting

    def open(self, link: PeerLink, ask_directory: Callable[[Discover], None]) -> None:
        """Use ``link``, and ``ask_directory``, from now on."""
        self._link, self._ask_directory = link, ask_directory

    def request(self, caller: ReplyTo, message: OfferWeights | EndOffer, now: float) -> list[Effect]:
        """Take a request of another engine."""
        if isinstance(message, OfferWeights):
            return self._offers.ask(caller, message, now)
        return self._offers.end(caller, message, now)

    def report(self, message: PeerReport, now: float) -> list[Effect]:
        """Take what a worker says."""
        match message:
            case WeightsFetched():
                return self.returning.worker_fetched(message, now)
            case WorkerOffered():
                return self._offers.worker_offered(message, now)
            case ReadPacked():
                return self._offers.read_packed(message)
            case _:
                return self._offers.worker_ended(message, now)

    def engines(self, answer: Engines, now: float) -> list[Effect]:
        """Take the directory's answer."""
        return self.returning.engines(answer, now)

    def tick(self, now: float) -> list[Effect]:
        """Take what other engines have answered, and let time pass."""
        effects: list[Effect] = []
        if self._link is not None:
            for number, answer in list(self._link.answers()):
                effects += self.returning.answered(number, answer, now)
        effects += [*self.returning.tick(now), *self._offers.tick(now)]
        if self._said != self._participant.fetching:
            self._said = self._participant.fetching
            if self._said:
                logger.info("areal_vllm_ext: this engine is stale (%s); %s", self._participant.stale, self._said)
        return effects

    def carry_out(self, effect: Effect) -> None:
        """Carry out an effect that only fetches and offers have."""
        match effect:
            case CallCommitFetched():
                self._engine.commit_fetched(effect)
            case CallReadPacked():
                self._engine.read_packed(effect.order)
            case AskDirectory():
                self._ask_directory(effect.message)
            case AskPeer():
                if self._link is not None:
                    self._link.ask(effect)
            case _:
                raise AssertionError(f"no way to carry out {effect!r}")

    def rest(self) -> None:
        """Close the connections to other engines while nothing is fetched."""
        if self._link is not None and not self.returning.active:
            self._link.close()
