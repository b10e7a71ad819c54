"""Engines that come back fetch their group's weights from a peer: the state machine, and over real sockets."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import msgspec
import pytest
from waiting import eventually

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.config import Settings
from areal_vllm_ext.engine_core.effects import AskDirectory, AskPeer, CallCommitFetched, CallReadPacked, Order, Reply
from areal_vllm_ext.engine_core.offers import Offers
from areal_vllm_ext.engine_core.participant import Participant
from areal_vllm_ext.engine_core.returning import Returning
from areal_vllm_ext.engine_core.status import beat_of, status_of
from areal_vllm_ext.protocol import Adapter, Begin, Disk, Engines, Error, Sender, ServedAdapter, Sleep, Status
from areal_vllm_ext.protocol.peer_messages import (
    EndFetch,
    EndOffer,
    FetchWeights,
    HeldAdapter,
    OfferEnded,
    OfferWeights,
    ReadPacked,
    WeightsFetched,
    WeightsOffered,
    WorkerOffer,
    WorkerOffered,
    WorkerOfferEnded,
)
from areal_vllm_ext.protocol.server import ReplyTo
from chaos.simulation import engine_info
from harness.simulated_engine import Deployment, Shape, deployed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from areal_vllm_ext.engine_core.effects import Effect
    from areal_vllm_ext.protocol import Message, security

EPOCH = 7
NOW = 100.0


class Rig:
    """A stale engine of two workers, and what its state machine asks for."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.me = engine_info(0, 3, 9)
        self.peers = [engine_info(rank, 3, rank) for rank in (1, 2)]
        self.participant = Participant("v0", frozenset((0, 1)))
        names = iter(f"fetch-{number}" for number in range(99))
        self.returning = Returning(self.participant, self.me.address, lambda: next(names), enabled=enabled)
        (pause,) = self.participant.on_group_epoch("v1", EPOCH)
        self.participant.pauses.pause_done(pause.call, "")  # type: ignore[union-attr]
        self.now = NOW

    def tick(self, seconds: float = 0.0) -> list[Effect]:
        self.now += seconds
        return self.returning.tick(self.now)

    def statuses(self, asks: list[Effect], **changes: object) -> list[Effect]:
        """Answer the requests for statuses as current engines do."""
        effects: list[Effect] = []
        for ask in asks:
            assert isinstance(ask, AskPeer)
            effects += self.returning.answered(ask.number, self.status(ask.address, **changes), self.now)
        return effects

    def status(self, address: str, **changes: object) -> Status:
        (info,) = (peer for peer in self.peers if peer.address == address)
        current = status_of(Participant("v1", frozenset((0, 1))), info)
        given = {"committed_epoch": EPOCH, "weights": "manifest", **changes}
        return msgspec.structs.replace(current, **given)

    def up_to_reading(self) -> AskPeer:
        assert isinstance(self.tick()[0], AskDirectory)
        asks = self.returning.engines(Engines(alive=(self.me, *self.peers)), self.now)
        (offer,) = self.statuses(asks)
        assert isinstance(offer, AskPeer)
        (order,) = self.returning.answered(offer.number, OFFER, self.now)
        assert isinstance(order, Order)
        assert isinstance(order.message, FetchWeights)
        return offer

    def fetched(self, rank: int, fetch: str = "fetch-0", **report: object) -> list[Effect]:
        message = WeightsFetched(fetch=fetch, rank=rank, **{"manifest": f"m{rank}", **report})  # type: ignore[arg-type]
        return self.returning.worker_fetched(message, self.now)

    def up_to_commit(self) -> CallCommitFetched:
        self.up_to_reading()
        assert self.fetched(0) == []
        (ask,) = self.fetched(1)
        assert isinstance(ask, AskPeer)
        assert ask.message == EndOffer(fetch="fetch-0")
        (commit,) = self.returning.answered(ask.number, OfferEnded(manifests={0: "m0", 1: "m1"}), self.now)
        assert isinstance(commit, CallCommitFetched)
        return commit


OFFER = WeightsOffered(
    version="v1",
    update="u1",
    weights="manifest",
    unproven="",
    workers=tuple(WorkerOffer(rank=rank, layout="l", address="a:1", held=()) for rank in (0, 1)),
)


def orders(effects: list[Effect], kind: type[Message]) -> list[Message]:
    return [
        effect.message for effect in effects if isinstance(effect, Order | AskPeer) and isinstance(effect.message, kind)
    ]


def test_it_serves_the_groups_version_once_nothing_newer_can_be_committed() -> None:
    rig = Rig()
    commit = rig.up_to_commit()
    assert (commit.version, commit.update) == ("v1", "u1")
    assert rig.participant.update_phase == "committing"
    assert rig.returning.committed("", rig.now) == []
    p = rig.participant
    assert (p.version, p.committed_epoch, p.last_update, p.weights) == ("v1", EPOCH, "u1", "manifest")
    assert p.loaded == f"peer: {rig.peers[0].name}"
    assert beat_of(p, rig.me).stale, "it asks the directory"
    assert p.on_group_epoch("v1", EPOCH, settled=False) == []
    assert p.stale
    assert p.generation == "paused"
    (resume,) = p.on_group_epoch("v1", EPOCH, settled=True)
    assert p.pauses.resume_done(resume.call, "") == []  # type: ignore[union-attr]
    assert (p.stale, p.generation) == ("", "running")


MATH = ServedAdapter(version="v0", manifest="m")


def offered(*adapters: tuple[str, str]) -> WeightsOffered:
    """An offer whose workers have these adapters."""
    held = tuple(HeldAdapter(Adapter(name, "{}", manifest), ()) for name, manifest in adapters)
    workers = tuple(msgspec.structs.replace(worker, adapters=held) for worker in OFFER.workers)
    return msgspec.structs.replace(OFFER, workers=workers)


def up_to_offer(rig: Rig, **adapters: ServedAdapter) -> AskPeer:
    rig.tick()
    asks = rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)
    (offer,) = rig.statuses(asks, adapters=adapters)
    assert isinstance(offer, AskPeer)
    return offer


def test_it_gets_the_adapters_that_its_peer_serves_and_no_others() -> None:
    rig = Rig()
    rig.participant.adapters = {"old": ServedAdapter(version="v0", manifest="o")}
    offer = up_to_offer(rig, math=MATH)
    assert isinstance(offer.message, OfferWeights)
    assert offer.message.adapters == {"math": "m"}
    assert orders(rig.returning.answered(offer.number, offered(("math", "m")), rig.now), FetchWeights)
    (ask,) = [*rig.fetched(0), *rig.fetched(1)]
    assert isinstance(ask, AskPeer)
    (commit,) = rig.returning.answered(ask.number, OfferEnded(manifests={0: "m0", 1: "m1"}), rig.now)
    assert isinstance(commit, CallCommitFetched)
    assert commit.adapters == {"math": MATH}
    assert set(rig.participant.adapters) == {"old"}, "nothing is live yet"
    rig.returning.committed("", rig.now)
    assert rig.participant.adapters == {"math": MATH}


@pytest.mark.parametrize("held", [(), (("math", "another"),), (("math", "m"), ("code", "c"))])
def test_workers_that_offer_other_adapters_are_not_read(held: tuple[tuple[str, str], ...]) -> None:
    rig = Rig()
    offer = up_to_offer(rig, math=MATH)
    assert not orders(rig.returning.answered(offer.number, offered(*held), rig.now), FetchWeights)
    assert "its workers offer other adapters than it serves" in rig.participant.fetching


def test_engines_with_different_adapters_are_no_peers() -> None:
    rig = Rig()
    rig.tick()
    one, other = rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)
    assert rig.statuses([one]) == []
    assert rig.statuses([other], adapters={"math": MATH}) == []
    assert "serve different weights or adapters as this version" in rig.participant.fetching


def test_an_engine_offers_the_adapters_that_it_serves() -> None:
    peer = Participant("v1", frozenset((0, 1)))
    peer.committed_epoch, peer.adapters = EPOCH, {"math": MATH}
    offers, caller = Offers(peer), ReplyTo(b"engine", b"1")
    wanted = OfferWeights(fetch="f", committed_epoch=EPOCH, timeout=9)
    (refused,) = offers.ask(caller, wanted, NOW)
    assert isinstance(refused, Reply)
    assert isinstance(refused.answer, Error)
    assert refused.answer.message == "it serves other adapters"
    (order,) = offers.ask(caller, msgspec.structs.replace(wanted, adapters={"math": "m"}), NOW)
    assert isinstance(order, Order)


def test_it_stays_stale_where_the_group_has_gone_on_meanwhile() -> None:
    rig = Rig()
    rig.up_to_commit()
    rig.returning.committed("", rig.now)
    rig.participant.on_group_epoch("v2", EPOCH + 1, settled=True)
    assert "the group is at version v2, this engine at v1" in rig.participant.stale
    assert isinstance(rig.tick(60.0)[0], AskDirectory), "it fetches again"


@pytest.mark.parametrize("when", ["reading", "ending"])
def test_an_update_ends_a_fetch(when: str) -> None:
    rig = Rig()
    rig.up_to_reading()
    asks = [] if when == "reading" else [*rig.fetched(0), *rig.fetched(1)]
    begin = Begin(epoch=EPOCH + 1, update="u2", version="v2", senders={0: Sender(transfer=Disk(path="/"))}, timeout=9)
    rig.participant.handle(ReplyTo(b"trainer", b"1"), begin, rig.now)
    for ask in asks:
        assert isinstance(ask, AskPeer)
        assert rig.returning.answered(ask.number, OfferEnded(manifests={0: "m0", 1: "m1"}), rig.now) == []
    assert orders(rig.tick(), EndFetch)
    assert rig.participant.update_phase == "receiving"
    assert "this engine is in an update" in rig.participant.fetching


def test_an_update_that_comes_during_the_commit_waits_for_it() -> None:
    rig = Rig()
    rig.up_to_commit()
    begin = Begin(epoch=EPOCH + 1, update="u2", version="v2", senders={0: Sender(transfer=Disk(path="/"))}, timeout=9)
    assert rig.participant.handle(ReplyTo(b"trainer", b"1"), begin, rig.now) == []
    assert orders(rig.returning.committed("", rig.now), Begin) == [begin]
    assert rig.participant.update_phase == "receiving"


def test_a_sleeping_engine_fetches_nothing() -> None:
    rig = Rig()
    rig.up_to_reading()
    rig.participant.handle(ReplyTo(b"user", b"1"), Sleep(epoch=EPOCH, level=1, timeout=9), rig.now)
    assert orders(rig.tick(), EndFetch)


def test_workers_that_hold_other_bytes_than_were_sent_commit_nothing() -> None:
    rig = Rig()
    rig.up_to_reading()
    rig.fetched(0)
    (ask,) = rig.fetched(1)
    assert isinstance(ask, AskPeer)
    effects = rig.returning.answered(ask.number, OfferEnded(manifests={0: "m0", 1: "other"}), rig.now)
    assert orders(effects, EndFetch)
    assert rig.participant.fetching == f"nothing was fetched from {rig.peers[0].name}: other bytes arrived than it sent"


def test_a_peer_that_says_an_update_began_is_left() -> None:
    rig = Rig()
    rig.up_to_reading()
    rig.fetched(0)
    (ask,) = rig.fetched(1)
    assert isinstance(ask, AskPeer)
    refusal = Error(kind="state", message="an update has begun there")
    assert orders(rig.returning.answered(ask.number, refusal, rig.now), EndFetch)
    assert "an update has begun there" in rig.participant.fetching
    assert rig.returning.answered(ask.number, OfferEnded(manifests={0: "m0", 1: "m1"}), rig.now) == [], (
        "a second answer"
    )


def test_peers_of_another_layout_are_asked_once() -> None:
    rig = Rig()
    for number, peer in enumerate(rig.peers):
        rig.tick(60.0)
        asks = rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)
        (offer,) = rig.statuses(asks)
        assert isinstance(offer, AskPeer)
        assert offer.address == peer.address
        rig.returning.answered(offer.number, OFFER, rig.now)
        rig.fetched(0, fetch=f"fetch-{number}", error="tp 2 there, tp 1 here", unlike=True)
    rig.tick(60.0)
    assert rig.statuses(rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)) == []
    assert "no engine of equal layout serves this version (tp 2 there, tp 1 here)" in rig.participant.fetching
    assert "send an update" in status_of(rig.participant, rig.me).error


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"committed_epoch": EPOCH - 1}, "no engine of this version is idle"),
        ({"update_phase": "receiving"}, "no engine of this version is idle"),
        ({"update_phase": "foreign"}, "no engine of this version is idle"),
        ({"sleep": "asleep_1"}, "no engine of this version is idle"),
    ],
)
def test_only_idle_engines_of_the_groups_version_are_peers(changes: dict[str, object], cause: str) -> None:
    rig = Rig()
    rig.tick()
    assert rig.statuses(rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now), **changes) == []
    assert cause in rig.participant.fetching


def test_engines_that_differ_are_no_peers() -> None:
    rig = Rig()
    rig.tick()
    one, other = rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)
    assert rig.statuses([one]) == []
    assert rig.statuses([other], weights="another manifest") == []
    assert "serve different weights or adapters as this version" in rig.participant.fetching


def test_silence_ends_an_attempt_and_another_peer_is_next() -> None:
    rig = Rig()
    first = rig.up_to_reading()
    assert orders(rig.tick(1801.0), EndFetch)
    assert not rig.returning.active
    rig.tick(1.0)
    asks = rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)
    (second,) = rig.statuses(asks)
    assert isinstance(second, AskPeer)
    assert second.address != first.address
    assert rig.fetched(0) == [], "a report of the first attempt"


def test_an_engine_that_does_not_tell_its_status_is_left_out() -> None:
    rig = Rig()
    rig.tick()
    _, other = rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)
    assert rig.statuses([other]) == []
    (offer,) = rig.tick(4.0)
    assert isinstance(offer, AskPeer)
    assert isinstance(offer.message, OfferWeights)
    assert offer.address == rig.peers[1].address


def test_a_failed_commit_taints() -> None:
    rig = Rig()
    rig.up_to_commit()
    rig.returning.committed("RuntimeError: no memory", rig.now)
    assert "could not be made live: RuntimeError: no memory" in rig.participant.tainted
    assert rig.tick(60.0) == []


def test_a_commit_that_touched_nothing_is_tried_again() -> None:
    rig = Rig()
    rig.up_to_commit()
    effects = rig.returning.committed("another user has put this engine to sleep", rig.now, touched=False)
    assert orders(effects, EndFetch), "the workers let go of what they have read"
    assert (rig.participant.tainted, rig.participant.update_phase) == ("", "idle")
    assert "has put this engine to sleep" in rig.participant.fetching
    assert any(isinstance(one, AskDirectory) for one in rig.tick(60.0))


def test_what_is_late_or_of_another_fetch_is_not_counted() -> None:
    rig = Rig()
    rig.up_to_reading()
    assert rig.fetched(0, fetch="another") == []
    assert rig.fetched(1) == [], "worker 0 has not fetched"


def test_a_peer_whose_weights_changed_is_not_read() -> None:
    rig = Rig()
    rig.tick()
    asks = rig.returning.engines(Engines(alive=(rig.me, *rig.peers)), rig.now)
    (offer,) = rig.statuses(asks, weights="another manifest")
    assert isinstance(offer, AskPeer)
    assert orders(rig.returning.answered(offer.number, OFFER, rig.now), FetchWeights) == []
    assert "its weights changed while it was asked" in rig.participant.fetching


def test_a_fetch_ends_when_the_group_goes_on() -> None:
    rig = Rig()
    rig.up_to_reading()
    rig.participant.on_group_epoch("v2", EPOCH + 1)
    assert orders(rig.tick(), EndFetch)
    assert "the group has committed another update" in rig.participant.fetching


def test_an_engine_that_is_not_paused_yet_fetches_nothing() -> None:
    rig = Rig()
    rig.participant.pauses.state = "pausing"
    assert rig.tick() == []


class Offering:
    """A peer of two workers, whose offer ``a`` is asked for."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.participant = Participant("v1", frozenset((0, 1)))
        self.participant.committed_epoch = EPOCH
        self.offers = Offers(self.participant, enabled=enabled)
        self.answers: list[Message] = []
        self.ask("a")

    def ask(self, fetch: str) -> None:
        self.take(
            self.offers.ask(ReplyTo(b"peer", b"1"), OfferWeights(fetch=fetch, committed_epoch=EPOCH, timeout=10.0), NOW)
        )

    def end(self) -> None:
        self.take(self.offers.end(ReplyTo(b"peer", b"2"), EndOffer(fetch="a"), NOW))

    def take(self, effects: list[Effect]) -> None:
        self.answers += [one.answer for one in effects if isinstance(one, Reply)]

    def offered(self) -> Offering:
        for rank in (0, 1):
            offer = WorkerOffer(rank=rank, layout="l", address="a:1", held=())
            self.take(self.offers.worker_offered(WorkerOffered(fetch="a", rank=rank, offer=offer), NOW))
        return self

    def ended(self) -> None:
        for rank in (0, 1):
            self.take(self.offers.worker_ended(WorkerOfferEnded(fetch="a", rank=rank, manifest=f"m{rank}"), NOW))

    def refusal(self) -> str:
        answer = self.answers[-1]
        assert isinstance(answer, Error), answer
        return answer.message


def test_an_engine_offers_what_it_serves_until_the_end() -> None:
    rig = Offering().offered()
    assert isinstance(rig.answers[-1], WeightsOffered)
    rig.end()
    rig.ended()
    assert rig.answers[-1] == OfferEnded(manifests={0: "m0", 1: "m1"})
    assert not rig.offers.waiting


CHANGES: dict[str, tuple[Callable[[Participant], object], str]] = {
    "tainted": (lambda p: setattr(p, "tainted", "a cause"), "tainted, stale or foreign"),
    "stale": (lambda p: setattr(p, "stale", "a cause"), "tainted, stale or foreign"),
    "foreign": (lambda p: setattr(p, "foreign", "a cause"), "tainted, stale or foreign"),
    "asleep": (lambda p: p.sleep.moved_elsewhere(("weights",), 1), "it sleeps"),
    "in an update": (lambda p: setattr(p, "update_phase", "receiving"), "an update has begun there"),
    "after another": (lambda p: setattr(p, "committed_epoch", EPOCH + 1), "it serves another update"),
    "not joined": (lambda p: setattr(p, "joined", False), "it serves another update"),
}


@pytest.mark.parametrize("moment", ["asked", "read", "ended"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_engine_offers_nothing_that_it_may_not_serve(change: str, moment: str) -> None:
    rig = Offering().offered()
    makes, cause = CHANGES[change]
    if moment == "ended":
        rig.end()
    makes(rig.participant)
    match moment:
        case "asked":
            rig.ask("b")
        case "read":
            (order,) = rig.offers.tick(NOW)
            assert isinstance(order, Order)
            rig.end()
        case _:
            rig.ended()
    assert cause in rig.refusal()


def test_an_offer_is_made_once_and_has_an_end() -> None:
    rig = Offering()
    rig.ask("a")
    assert rig.refusal() == "this offer is made already"
    rig.take(rig.offers.tick(NOW + 9.9))
    assert len(rig.answers) == 1
    rig.take(rig.offers.tick(NOW + 10.0))
    assert rig.refusal() == "its time was over"
    assert not rig.offers.waiting


def test_an_offer_that_a_worker_could_not_make_says_so_at_its_end() -> None:
    rig = Offering().offered()
    order = ReadPacked(fetch="a", rank=0, layer="l", start=0, count=1)
    assert rig.offers.read_packed(order) == [CallReadPacked(order)]
    rig.end()
    rig.take(rig.offers.worker_ended(WorkerOfferEnded(fetch="a", rank=0, error="the link is down"), NOW))
    assert rig.refusal() == "worker 0: the link is down"
    assert rig.offers.read_packed(order) == []
    rig.end()
    assert rig.refusal() == "worker 0: the link is down"


def test_an_offer_that_failed_leaves_its_place_to_others() -> None:
    participant = Participant("v1", frozenset((0, 1)))
    participant.joined = True
    offers = Offers(participant)
    caller = ReplyTo(b"peer", b"1")

    def ask(fetch: str) -> Message:
        message = OfferWeights(fetch=fetch, committed_epoch=participant.committed_epoch, timeout=10.0)
        (effect,) = offers.ask(caller, message, NOW)
        return effect.message if isinstance(effect, Order) else effect.answer  # type: ignore[union-attr]

    assert [type(ask(name)) for name in ("a", "b")] == [OfferWeights, OfferWeights]
    assert ask("c") == Error(kind="busy", message="2 engines fetch from it already")
    offers.worker_offered(WorkerOffered(fetch="a", rank=1, error="no port is free"), NOW)
    assert isinstance(ask("c"), OfferWeights)
    assert isinstance(ask("d"), Error)


def test_an_engine_can_be_told_to_fetch_nothing() -> None:
    rig = Rig(enabled=False)
    assert rig.tick() == []
    assert "AREAL_VLLM_PEERS is off" in status_of(rig.participant, rig.me).error


# Over real sockets


def update(group: EngineGroup, version: int) -> None:
    with group.update(version, timeout=5) as one:
        one.send("/nowhere")


@pytest.fixture
def ready(deployment: Deployment, key_file: Path) -> Deployment:
    with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
        group.wait_ready(2, timeout=10)
    return deployment


def serves(deployment: Deployment, rank: int, version: int) -> bool:
    state = deployment.engines[rank].endpoint.participant
    return (state.version, state.generation, state.stale) == (version, "running", "")


def test_an_engine_that_restarts_is_back_without_a_trainer(ready: Deployment, key_file: Path) -> None:
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        update(group, 1)
        for _ in range(3):
            ready.stop_engine(1)
            again = ready.start_engine(1)
            eventually(lambda: serves(ready, 1, 1), timeout=10)
            assert again.calls.count("commit fetched 1") == 1
            assert group.status()[1].loaded.startswith("peer: DP rank 0 of replica simulated")
        update(group, 2)
        assert [state.version for state in group.status()] == [2, 2]


def test_an_update_takes_an_engine_along_that_fetches(ready: Deployment, key_file: Path) -> None:
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        update(group, 1)
        ready.stop_engine(1)
        again = ready.start_engine(1)
        again.seconds["fetch"] = 30.0
        eventually(lambda: "fetching from DP rank 0" in again.endpoint.participant.fetching, timeout=10)
        assert "fetching from DP rank 0" in group.status()[1].error
        update(group, 2)
        assert all(serves(ready, rank, 2) for rank in (0, 1))
        assert "commit fetched 1" not in again.calls


def test_a_peer_that_refuses_leaves_the_engine_stale(ready: Deployment, key_file: Path) -> None:
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        update(group, 1)
        ready.engines[0].errors["OfferWeights"] = "no port is free"
        ready.stop_engine(1)
        ready.start_engine(1)
        eventually(lambda: any("worker 0: no port is free" in state.error for state in group.status()), timeout=10)
        assert group.status()[1].update_phase == "stale"
        del ready.engines[0].errors["OfferWeights"]
        eventually(lambda: serves(ready, 1, 1), timeout=10)


def test_without_peers_it_stays_stale(key: security.ClusterKey, key_file: Path) -> None:
    shape = Shape(settings=Settings(peers="off"))
    with deployed(key, shape=shape) as two, EngineGroup.connect(two.directory, key_file=key_file) as group:
        group.wait_ready(2, timeout=10)
        update(group, 1)
        two.shape = dataclasses.replace(two.shape, settings=Settings())
        two.stop_engine(1)
        two.start_engine(1)
        eventually(lambda: any("AREAL_VLLM_PEERS is off there" in state.error for state in group.status()), timeout=10)
