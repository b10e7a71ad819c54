"""What an engine offers to stale engines of its group: what it serves, as it was after its last commit. No I/O, no clock.

An offer ends when its fetch does, at its deadline, and as soon as this engine begins an update, sleeps or is tainted. The
engine that fetches learns at the end whether that happened before.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..protocol import Error
from ..protocol.peer_messages import EndOffer, OfferEnded, OfferWeights, ReadPacked, WeightsOffered
from .effects import CallReadPacked, Effect, Order, Reply
from .returning import manifests_of

if TYPE_CHECKING:
    from ..protocol import ErrorKind
    from ..protocol.peer_messages import WorkerOffer, WorkerOffered, WorkerOfferEnded
    from ..protocol.server import ReplyTo
    from .participant import Participant

# Offers at once. Each takes a share of the link and of the copy engine.
_MOST_OFFERS = 2
# Upper bounds of an offer's time, and of the wait for the workers at its end.
_LONGEST_SECONDS, _END_SECONDS = 3600.0, 10.0


@dataclasses.dataclass
class _Offer:
    """An offer from its request until its answer to ``EndOffer``.

    Attributes:
        caller: who waits for the workers' offers, or at the end for their manifests.
        epoch: committed epoch of what is offered.
        ends: when it is given up.
        workers: what each worker offers, by rank.
        manifests: what each worker has sent, by rank, once it has ended.
        ending: whether the workers were told to end.
        failure: why what was sent must not be used; empty while it may.
    """

    caller: ReplyTo | None
    epoch: int
    ends: float
    workers: dict[int, WorkerOffer] = dataclasses.field(default_factory=dict)
    manifests: dict[int, str] = dataclasses.field(default_factory=dict)
    ending: bool = False
    failure: str = ""


class Offers:
    """The offers of one engine. Used from the endpoint's thread only."""

    def __init__(self, participant: Participant, *, enabled: bool = True) -> None:
        self._participant, self._enabled = participant, enabled
        self._offers: dict[str, _Offer] = {}

    @property
    def waiting(self) -> bool:
        """True if an offer has a deadline to keep."""
        return bool(self._offers)

    def _unfit(self, epoch: int) -> str:
        """Say why this engine cannot offer the weights of ``epoch``; empty if it can."""
        p = self._participant
        if not self._enabled:
            return "AREAL_VLLM_PEERS is off there"
        if p.tainted or p.stale or p.foreign:
            return "its own weights are tainted, stale or foreign"
        if p.sleep.reason:
            return "it sleeps"
        if p.update is not None or p.update_phase != "idle":
            return "an update has begun there"
        return "" if p.joined and p.committed_epoch == epoch else "it serves another update"

    def ask(self, caller: ReplyTo, message: OfferWeights, now: float) -> list[Effect]:
        """Offer what is served; ``caller`` is answered when all workers listen."""
        if reason := self._unfit(message.committed_epoch):
            return _refuse(caller, "state", reason)
        if message.adapters != manifests_of(self._participant.adapters):
            return _refuse(caller, "state", "it serves other adapters")
        if message.fetch in self._offers:
            return _refuse(caller, "state", "this offer is made already")
        if sum(not offer.failure for offer in self._offers.values()) >= _MOST_OFFERS:
            return _refuse(caller, "busy", f"{_MOST_OFFERS} engines fetch from it already")
        ends = now + min(max(message.timeout, 0.0), _LONGEST_SECONDS)
        self._offers[message.fetch] = _Offer(caller, message.committed_epoch, ends)
        return [Order(message)]

    def worker_offered(self, message: WorkerOffered, now: float) -> list[Effect]:
        """Take a worker's offer, or its reason why there is none."""
        offer = self._offers.get(message.fetch)
        if offer is None or offer.ending or offer.caller is None:
            return []
        if message.offer is None:
            return self._end(message.fetch, offer, f"worker {message.rank}: {message.error}", now)
        offer.workers[message.rank] = message.offer
        p = self._participant
        if p.workers - set(offer.workers):
            return []
        caller, offer.caller = offer.caller, None
        offer.ends = now + _LONGEST_SECONDS
        workers = tuple(one for _, one in sorted(offer.workers.items()))
        answer = WeightsOffered(
            version=p.version,
            update=p.last_update,
            weights=p.weights,
            unproven=p.unproven,
            workers=workers,
            draft_version=p.draft_version,
        )
        return [Reply(caller, answer)]

    def end(self, caller: ReplyTo, message: EndOffer, now: float) -> list[Effect]:
        """End an offer; ``caller`` is answered with what the workers sent."""
        offer = self._offers.get(message.fetch)
        if offer is None:
            return _refuse(caller, "state", "it has no such offer, or an update has ended it")
        if offer.failure:
            del self._offers[message.fetch]
            return _refuse(caller, "state", offer.failure)
        if offer.ending or offer.caller is not None:
            return [*self._end(message.fetch, offer, "it was ended", now), *_refuse(caller, "state", "it was ended")]
        offer.caller, offer.ending, offer.ends = caller, True, now + _END_SECONDS
        return [Order(message)]

    def worker_ended(self, message: WorkerOfferEnded, now: float) -> list[Effect]:
        """Take a worker's manifest of what it sent."""
        offer = self._offers.get(message.fetch)
        if offer is None or not offer.ending or offer.failure:
            return []
        if message.error:
            return self._end(message.fetch, offer, f"worker {message.rank}: {message.error}", now)
        offer.manifests[message.rank] = message.manifest
        if self._participant.workers - set(offer.manifests):
            return []
        if reason := self._unfit(offer.epoch):
            return self._end(message.fetch, offer, reason, now)
        del self._offers[message.fetch]
        assert offer.caller is not None
        return [Reply(offer.caller, OfferEnded(manifests=offer.manifests))]

    def read_packed(self, message: ReadPacked) -> list[Effect]:
        """Let a worker read a packed weight on the engine's loop, unless the offer is over."""
        offer = self._offers.get(message.fetch)
        return [CallReadPacked(message)] if offer is not None and not offer.failure else []

    def tick(self, now: float) -> list[Effect]:
        """End the offers whose time is over, or which this engine can no longer make."""
        effects: list[Effect] = []
        for name, offer in list(self._offers.items()):
            if now >= offer.ends:
                effects += [] if offer.failure else self._end(name, offer, "its time was over", now)
                del self._offers[name]
            elif not offer.failure and (reason := self._unfit(offer.epoch)):
                effects += self._end(name, offer, reason, now)
        return effects

    def _end(self, name: str, offer: _Offer, reason: str, now: float) -> list[Effect]:
        """Give an offer up. It is kept for a while, so that the engine that fetches learns why."""
        caller, offer.caller = offer.caller, None
        offer.failure, offer.ends = reason, now + _END_SECONDS
        order = Order(EndOffer(fetch=name))
        if caller is None:
            return [order]
        return [order, *_refuse(caller, "state", reason)]


def _refuse(caller: ReplyTo, kind: ErrorKind, message: str) -> list[Effect]:
    return [Reply(caller, Error(kind=kind, message=message))]
