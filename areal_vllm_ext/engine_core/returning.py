"""How a stale engine gets its group's weights from a peer, without a trainer. No I/O, no clock, no randomness.

    WAITING ──▶ ASKING ──members──▶ CHOOSING ──statuses──▶ OFFERING ──offer──▶ READING ──all workers──▶ ENDING
       ▲                                                                                                   │ manifests agree
       └── any refusal, silence, error, or a client that begins an update here ◀── COMMITTING ◀────────────┘

Nothing live changes before COMMITTING, and what is read belongs to one commit of the peer: each tensor must have the digest
that it had after that commit, and the peer says at the end that it has committed nothing since. Afterwards the engine stays
paused until the directory has said, for a heartbeat, that no client can have committed anything newer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..protocol import Discover, Engines, Error, GetStatus, Status
from ..protocol.peer_messages import (
    EndFetch,
    EndOffer,
    FetchWeights,
    OfferEnded,
    OfferWeights,
    WeightsFetched,
    WeightsOffered,
)
from .effects import AskDirectory, AskPeer, CallCommitFetched, Effect, Order

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..protocol import Answer, EngineInfo, ServedAdapter
    from .participant import Participant

Phase = Literal["waiting", "asking", "choosing", "offering", "reading", "ending", "committing"]

# Seconds until a step without an answer has failed. Reading has the workers' own, shorter deadlines.
_SECONDS: dict[Phase, float] = {"asking": 3.0, "choosing": 3.0, "offering": 15.0, "reading": 1800.0, "ending": 15.0}
# Seconds until the next attempt: the first, and at most.
_FIRST_RETRY, _LAST_RETRY = 0.5, 10.0
# How many members are asked for their status; further ones in later attempts.
_ASKED = 16


class Returning:
    """The fetches of one engine.

    Attributes:
        phase: of the current attempt.
    """

    def __init__(
        self, participant: Participant, address: str, new_name: Callable[[], str], *, enabled: bool = True
    ) -> None:
        """
        Args:
            participant: the engine's state machine.
            address: the engine's own.
            new_name: returns a random name for a fetch.
            enabled: whether to fetch at all.
        """
        self.phase: Phase = "waiting"
        self._participant, self._address, self._new_name, self._enabled = participant, address, new_name, enabled
        self._ends = 0.0  # of this phase; while waiting: when the next attempt begins
        self._attempts = 0
        self._retry = _FIRST_RETRY
        self._epoch = 0  # of the weights that this attempt is for
        self._numbers = 0
        self._asked: dict[int, EngineInfo] = {}
        self._statuses: dict[str, tuple[EngineInfo, Status]] = {}
        self._unlike: dict[str, str] = {}  # peers of another layout, by incarnation, and what differs
        self._fetch = ""
        self._peer: EngineInfo | None = None
        self._adapters: dict[str, ServedAdapter] = {}  # that the peer serves
        self._offer: WeightsOffered | None = None
        self._fetched: dict[int, str] = {}

    @property
    def active(self) -> bool:
        """Whether an attempt is in progress."""
        return self.phase != "waiting"

    @property
    def _may_fetch(self) -> bool:
        """Whether newer weights can become live here now."""
        p = self._participant
        stale = bool(p.stale) and p.group_epoch > p.committed_epoch and not p.tainted
        return stale and p.update_phase == "idle" and p.generation == "paused" and p.sleep.is_awake

    # Time

    def tick(self, now: float) -> list[Effect]:
        """Begin an attempt, or end one that can no longer succeed."""
        if self.phase == "committing":
            return []
        if not self._may_fetch:
            self._retry, self._ends = _FIRST_RETRY, min(self._ends, now)
            if not self._participant.stale:
                self._participant.fetching = ""
            return self._give_up("this engine is in an update, sleeps or runs", now) if self.active else []
        if not self._enabled:
            self._participant.fetching = "it fetches from no peer, because AREAL_VLLM_PEERS is off: send an update"
            return []
        if self.active and self._participant.group_epoch != self._epoch:
            return self._give_up("the group has committed another update", now)
        if now < self._ends:
            return []
        if self.active:
            return self._give_up(self._late, now)
        self._epoch = self._participant.group_epoch
        self._asked, self._statuses, self._fetched = {}, {}, {}
        self._peer = self._offer = None
        self._go_on("asking", now)
        return [AskDirectory(Discover())]

    # Answers

    def engines(self, answer: Engines, now: float) -> list[Effect]:
        """Take the directory's answer: who is there."""
        if self.phase != "asking" or not self._may_fetch:
            return []
        others = [engine for engine in answer.alive if engine.address != self._address]
        self._unlike = {name: why for name, why in self._unlike.items() if any(e.incarnation == name for e in others)}
        if not others:
            return self._give_up("no other engine is there: send an update", now)
        first = self._attempts * _ASKED % len(others)
        self._go_on("choosing", now)
        return [self._ask(engine, GetStatus()) for engine in (*others[first:], *others[:first])[:_ASKED]]

    def answered(self, number: int, answer: Answer, now: float) -> list[Effect]:
        """Take a peer's answer to the request of this number; late and repeated ones change nothing."""
        engine = self._asked.pop(number, None)
        if engine is None or not self._may_fetch:
            return []
        if self.phase == "choosing":
            if isinstance(answer, Status):
                self._statuses[engine.incarnation] = (engine, answer)
            return [] if self._asked else self._choose(now)
        if isinstance(answer, Error):
            return self._give_up(answer.message, now)
        if self.phase == "offering" and isinstance(answer, WeightsOffered):
            return self._read(answer, now)
        if self.phase == "ending" and isinstance(answer, OfferEnded):
            return self._commit(answer, now)
        return []

    def _choose(self, now: float) -> list[Effect]:
        current = [
            (engine, status)
            for engine, status in self._statuses.values()
            if (status.committed_epoch, status.update_phase, status.sleep) == (self._epoch, "idle", "awake")
        ]
        if not current:
            return self._give_up("no engine of this version is idle: waiting for one, or for an update", now)
        holders = {
            (status.weights, *sorted(manifests_of(status.adapters).items())): engine for engine, status in current
        }
        if len(holders) > 1:
            names = " and ".join(engine.name for engine in list(holders.values())[:2])
            return self._give_up(
                f"{names} serve different weights or adapters as this version: run areal-vllm verify", now
            )
        like = [one for one in current if one[0].incarnation not in self._unlike]
        if not like:
            why = self._unlike[current[0][0].incarnation]
            return self._give_up(f"no engine of equal layout serves this version ({why}): send an update", now)
        self._peer, status = like[self._attempts % len(like)]
        self._adapters = dict(status.adapters)
        self._fetch = self._new_name()
        self._go_on("offering", now)
        order = OfferWeights(
            fetch=self._fetch,
            committed_epoch=self._epoch,
            timeout=self._left,
            adapters=manifests_of(self._adapters),
        )
        return [self._ask(self._peer, order)]

    def _read(self, offer: WeightsOffered, now: float) -> list[Effect]:
        assert self._peer is not None
        _, status = self._statuses[self._peer.incarnation]
        if offer.weights != status.weights:
            return self._give_up("its weights changed while it was asked", now)
        wanted = manifests_of(self._adapters)
        if any({one.unit.name: one.unit.manifest for one in worker.adapters} != wanted for worker in offer.workers):
            return self._give_up("its workers offer other adapters than it serves", now)
        self._offer = offer
        self._go_on("reading", now)
        return [Order(FetchWeights(fetch=self._fetch, peer=self._peer.name, offers=offer.workers, timeout=self._left))]

    def worker_fetched(self, message: WeightsFetched, now: float) -> list[Effect]:
        """Take a worker's report that it holds all of the peer's tensors, or why it does not."""
        if message.fetch != self._fetch or self.phase != "reading":
            return []
        assert self._peer is not None
        if message.error:
            if message.unlike:
                self._unlike[self._peer.incarnation] = message.error
            return self._give_up(f"worker {message.rank}: {message.error}", now)
        self._fetched[message.rank] = message.manifest
        if self._participant.workers - set(self._fetched):
            return []
        self._go_on("ending", now)
        return [self._ask(self._peer, EndOffer(fetch=self._fetch))]

    def _commit(self, ended: OfferEnded, now: float) -> list[Effect]:
        assert self._offer is not None
        if ended.manifests != self._fetched:
            return self._give_up("other bytes arrived than it sent", now)
        self._go_on("committing", now)
        self._participant.update_phase = "committing"
        return [CallCommitFetched(self._fetch, self._offer.version, self._offer.update, self._adapters)]

    def committed(self, error: str, now: float, *, touched: bool = True) -> list[Effect]:
        """Every worker has made the fetched weights live, or one failed and left a partly loaded set of weights.

        Args:
            error: why not; empty if they are live.
            now: the clock's reading.
            touched: whether a worker was asked at all; if not, what is live is as before.
        """
        p, offer, peer = self._participant, self._offer, self._peer
        assert offer is not None
        assert peer is not None
        if not touched:
            self.phase = "ending"  # the workers still hold what they have read
            return [*self._give_up(error, now), *p.fetch_committed()]
        self._go_on("waiting", now)
        if error:
            p.tainted = f"what was fetched from {peer.name} could not be made live: {error}"
        else:
            p.weights, p.loaded, p.unproven = offer.weights, f"peer: {peer.name}", offer.unproven
            p.committed_epoch, p.version, p.last_update = self._epoch, offer.version, offer.update
            p.adapters = self._adapters
            p.foreign = p.error = p.fetching = ""
            p.draft_version = offer.draft_version
            p.stale = f"version {p.version} was fetched from {peer.name}, and waits until no client commits a newer one"
        self._offer = self._peer = None
        return p.fetch_committed()

    # Steps

    @property
    def _left(self) -> float:
        return _SECONDS[self.phase]

    @property
    def _late(self) -> str:
        match self.phase:
            case "asking":
                return "the directory does not answer"
            case "choosing":
                return "no engine answers"
            case "reading":
                return "its workers were not read in time"
            case _:
                return "it does not answer"

    def _go_on(self, phase: Phase, now: float) -> None:
        self.phase, self._ends = phase, now + _SECONDS.get(phase, 0.0)
        if self._peer is not None and phase in ("offering", "reading", "ending"):
            self._participant.fetching = f"fetching from {self._peer.name}"

    def _ask(self, engine: EngineInfo, message: GetStatus | OfferWeights | EndOffer) -> AskPeer:
        self._numbers += 1
        self._asked[self._numbers] = engine
        return AskPeer(self._numbers, engine.address, message)

    def _give_up(self, reason: str, now: float) -> list[Effect]:
        """End this attempt. What is live was not touched."""
        if self.phase == "choosing" and self._asked and self._statuses and reason == self._late:
            self._asked = {}  # some answered; do without the silent
            return self._choose(now)
        effects: list[Effect] = []
        if self._peer is not None:
            if self.phase in ("reading", "ending"):
                effects.append(Order(EndFetch(fetch=self._fetch, reason=reason)))
            if self.phase in ("offering", "reading"):
                self._numbers += 1
                effects.append(AskPeer(self._numbers, self._peer.address, EndOffer(fetch=self._fetch)))
            reason = f"nothing was fetched from {self._peer.name}: {reason}"
        self._participant.fetching = reason if self._participant.stale else ""
        self._attempts += 1
        self.phase, self._asked, self._peer, self._offer = "waiting", {}, None, None
        self._ends = now + self._retry
        self._retry = min(self._retry * 2, _LAST_RETRY)
        return effects


def manifests_of(adapters: Mapping[str, ServedAdapter]) -> dict[str, str]:
    """Return the manifest of each adapter, by name."""
    return {name: one.manifest for name, one in adapters.items()}
