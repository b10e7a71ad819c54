"""Workers fetch a peer's live weights, unconverted: real models, loaded by vLLM, and a real connection between two workers."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_models import (
    FAMILIES,
    LoadedWorker,
    adapted,
    checkpoint,
    lora_slots,
    lora_worker,
    same_slots,
    saved,
    trained,
    weights_of,
)

from areal_vllm_ext.client.lora import copied
from areal_vllm_ext.integrity import digest
from areal_vllm_ext.protocol import TensorMeta, Units
from areal_vllm_ext.protocol.peer_messages import (
    EndFetch,
    EndOffer,
    FetchWeights,
    OfferWeights,
    ReadPacked,
    WeightsFetched,
    WorkerOffer,
    WorkerOffered,
    WorkerOfferEnded,
)
from areal_vllm_ext.worker import fetching
from areal_vllm_ext.worker.adapters.staged import StagedAdapters
from areal_vllm_ext.worker.context import WorkerContext
from areal_vllm_ext.worker.load import proof
from areal_vllm_ext.worker.peers import Peers

pytestmark = pytest.mark.timeout(300)

FETCH = "a random name"
NUMBER = 1 << 30


class Worker:
    """A worker with a real model, whose reports are answered here as by an engine."""

    def __init__(self, folder: Any, transposed: tuple[str, ...] = (), *, lora: bool = False) -> None:
        self.loaded = self.load(folder, lora=lora)
        for name in transposed:
            weight = self.loaded.get_model().get_parameter(name)
            weight.data = weight.data.t().contiguous().t()
        self.reports: queue.Queue[Any] = queue.Queue()
        self.context = WorkerContext(self.loaded, self.reports.put)
        self.peers = Peers(self.context, "127.0.0.1", self.reports.put)

    def load(self, folder: Any, *, lora: bool) -> LoadedWorker:
        return lora_worker(folder=folder) if lora else LoadedWorker(folder)

    def expect(self, kind: type[Any], seconds: float = 60.0) -> Any:
        """Return the next report of a kind; meanwhile read packed weights, as calls on the engine's loop do."""
        ends = time.monotonic() + seconds
        while True:
            report = self.reports.get(timeout=max(ends - time.monotonic(), 0.0))
            if isinstance(report, ReadPacked):
                self.peers.read_packed(report.rank, report.fetch, report.layer, report.start, report.count)
            elif isinstance(report, kind):
                return report

    def offer(self, **adapters: str) -> WorkerOffer:
        self.peers.order(OfferWeights(fetch=FETCH, committed_epoch=1, timeout=60.0, adapters=adapters))
        offered = self.expect(WorkerOffered)
        assert offered.offer is not None, offered.error
        return offered.offer

    def begin(self, offer: WorkerOffer) -> None:
        self.peers.order(FetchWeights(fetch=FETCH, peer="DP rank 0", offers=(offer,), timeout=60.0))

    def commit(self) -> None:
        self.peers.commit(FETCH, "u1", {"math": NUMBER}, (NUMBER,))

    def bring(self, model: Any) -> str:
        """Bring an adapter as an update does; returns its manifest."""
        adapter, update, store = copied("math", model), StagedAdapters(), self.context.adapters
        update.add("math", adapter.tensors, {meta.name: (meta, value) for meta, value in adapter.entries})
        update.vote(Units(weights=False, adapters=(adapter.unit,)), store, self.context.intake)
        store.commit(update.voted, {"math": NUMBER}, (NUMBER,))
        return adapter.unit.manifest

    def slots(self) -> dict[str, list[torch.Tensor]]:
        """What vLLM computes with after a request for the adapter."""
        from vllm.lora.request import LoRARequest

        runner: Any = self.loaded.model_runner
        runner.add_lora(LoRARequest("math", NUMBER, "nowhere"))
        return lora_slots(runner)

    def served(self) -> dict[str, int]:
        model = self.loaded.get_model()
        return proof.digests_of_model(model) | proof.packed_digests(model)


def fetch(peer: Worker, stale: Worker, offer: WorkerOffer) -> WeightsFetched:
    """Fetch what ``peer`` offers; both do their part on one thread."""
    stale.begin(offer)
    ends = time.monotonic() + 60.0
    while stale.reports.empty():
        assert time.monotonic() < ends
        with contextlib.suppress(queue.Empty):
            peer.expect(SimpleNamespace, 0.02)
    return stale.expect(WeightsFetched)  # type: ignore[no-any-return]


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Iterator[tuple[Worker, Worker]]:
    """A peer, and a worker that was started with other weights."""
    family = getattr(request, "param", "dense")
    folder = checkpoint(family)
    with saved(trained(weights_of(folder), 1), folder) as other:
        yield Worker(other), Worker(folder)


@pytest.mark.parametrize("two", FAMILIES, indirect=True)
def test_a_worker_serves_what_its_peer_serves(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    expected = peer.served()
    assert stale.served() != expected
    fetched = fetch(peer, stale, peer.offer())
    assert not fetched.error
    peer.peers.order(EndOffer(fetch=FETCH))
    ended = peer.expect(WorkerOfferEnded)
    assert (ended.error, ended.manifest) == ("", fetched.manifest)
    stale.commit()
    assert stale.served() == expected
    assert peer.served() == expected


def test_a_worker_serves_the_adapter_of_its_peer() -> None:
    folder = checkpoint("dense")
    with saved(trained(weights_of(folder), 1), folder) as other:
        peer, stale = Worker(other, lora=True), Worker(folder, lora=True)
        manifest = peer.bring(adapted(3))
        slots = peer.slots()  # so that the adapter lies in its model
        expected = peer.served()
        fetched = fetch(peer, stale, peer.offer(math=manifest))
        assert not fetched.error
        stale.commit()
        assert stale.served() == expected
        assert same_slots(stale.slots(), slots)
        assert any(tensor.any() for tensors in slots.values() for tensor in tensors)
        # It can be a peer itself.
        (found,) = stale.context.adapters.find({"math": manifest})
        assert found.unit.manifest == digest.adapter_manifest(found.unit.config, found.contents.values())


def test_a_worker_that_cannot_serve_the_adapter_reads_no_weights() -> None:
    folder = checkpoint("dense")
    peer, stale = Worker(folder, lora=True), Worker(folder)
    fetched = fetch(peer, stale, peer.offer(math=peer.bring(adapted(3))))
    assert "adapter math: this engine was started without --enable-lora" in fetched.error
    assert not fetched.unlike, "a later update may remove the adapter"
    peer.peers.order(EndOffer(fetch=FETCH))
    assert peer.expect(WorkerOfferEnded).error == "not all of its tensors were sent"


def test_an_adapter_that_the_peers_worker_does_not_have_is_no_offer() -> None:
    peer = Worker(checkpoint("dense"))
    peer.peers.order(OfferWeights(fetch=FETCH, committed_epoch=1, timeout=60.0, adapters={"math": "m"}))
    assert peer.expect(WorkerOffered).error == "it does not have adapter math"


def test_damaged_bytes_are_refused(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    offer = peer.offer()
    before = stale.served()
    tensor = peer.loaded.get_model().get_parameter("model.norm.weight").data
    tensor.view(torch.uint8)[5] ^= 1  # its memory is damaged after its digests were taken
    fetched = fetch(peer, stale, offer)
    assert fetched.error == "model.norm.weight arrived with other bytes than the peer serves since its last commit"
    with pytest.raises(RuntimeError, match="has not fetched all weights"):
        stale.commit()
    assert stale.served() == before


@pytest.mark.parametrize("damaged", [False, True])
def test_weights_that_lie_transposed_are_fetched_and_compared(damaged: bool) -> None:
    """As those of FP8 layers do."""
    name, folder = "model.embed_tokens.weight", checkpoint("dense")
    with saved(trained(weights_of(folder), 1), folder) as other:
        peer, stale = Worker(other, (name,)), Worker(folder, (name,))
        expected, offer = peer.served(), peer.offer()
        if damaged:
            peer.loaded.get_model().get_parameter(name).data[3, 5] += 1
        fetched = fetch(peer, stale, offer)
        assert fetched.error == (f"{name} has changed since it was loaded" if damaged else "")
        if not damaged:
            stale.commit()
            assert stale.served() == expected


def test_an_update_on_the_peer_ends_the_offer(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    offer = peer.offer()
    peer.context.live_weights.is_busy = lambda: True
    assert fetch(peer, stale, offer).error == "an update has begun there"
    peer.peers.order(EndOffer(fetch=FETCH))
    assert peer.expect(WorkerOfferEnded).error == "an update has begun there"


def test_a_commit_on_the_peer_ends_the_offer(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    offer = peer.offer()
    with peer.context.live_weights.committing(None, "u2"):
        pass
    assert fetch(peer, stale, offer).error == "its weights have changed"


def test_a_peer_of_another_layout_is_refused(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    offer = peer.offer()
    other = WorkerOffer(rank=0, layout="rank 0, tp 2", address=offer.address, held=offer.held)
    fetched = fetch(peer, stale, other)
    assert fetched.unlike
    assert "its layout is rank 0, tp 2; this engine's is rank 0, tp 1" in fetched.error


def test_a_model_of_other_tensors_is_refused() -> None:
    dense, biases = Worker(checkpoint("dense")), Worker(checkpoint("biases"))
    fetched = fetch(dense, biases, dense.offer())
    assert fetched.unlike
    assert "is another tensor there, or missing" in fetched.error


def test_a_value_elsewhere_in_the_model_must_be_equal(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    peer.loaded.get_model().model.projection = torch.ones(3)
    stale.loaded.get_model().model.projection = torch.zeros(3)
    fetched = fetch(peer, stale, peer.offer())
    assert not fetched.unlike, "another attempt may find it equal"
    assert "model.projection has another value there, and is no weight" in fetched.error


def test_an_attribute_that_a_load_makes_is_fetched(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    peer.loaded.get_model().model.projection = torch.ones(3)
    stale.loaded.get_model().model.projection = torch.zeros(3)
    peer.context.loader.made = ("model.projection",)
    assert not fetch(peer, stale, peer.offer()).error
    stale.commit()
    assert torch.equal(stale.loaded.get_model().model.projection, torch.ones(3))
    assert stale.context.loader.made == ("model.projection",)


def test_a_fetch_that_is_given_up_commits_nothing(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    assert not fetch(peer, stale, peer.offer()).error
    stale.peers.order(EndFetch(fetch=FETCH, reason="an update began"))
    with pytest.raises(RuntimeError, match="has not fetched these weights"):
        stale.commit()


def test_a_peer_that_is_gone_is_named(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    offer = peer.offer()
    peer.peers.order(EndOffer(fetch=FETCH))
    stale.begin(offer)
    error = stale.expect(WeightsFetched).error
    assert "the peer" in error
    assert peer.expect(WorkerOfferEnded).error == "not all of its tensors were sent"


def test_without_room_on_the_host_nothing_is_fetched(
    two: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, stale = two
    monkeypatch.setattr(fetching, "free_bytes", lambda _: 1 << 20)
    assert "the host has no room for the weights" in fetch(peer, stale, peer.offer()).error


def test_what_follows_a_fetch_is_compared_with_it(two: tuple[Worker, Worker]) -> None:
    peer, stale = two
    contents = {"w": (TensorMeta("w", "float32", (1,)), 7)}
    with peer.context.live_weights.committing(contents, "u1"):
        pass
    deadline = time.monotonic() + 30
    while not peer.context.live_weights.base()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not fetch(peer, stale, peer.offer()).error
    stale.commit()
    described = stale.context.live_weights.describe(contents=False)
    assert described.manifest == digest.manifest(contents.values())
    assert described.live == peer.context.live_weights.describe(contents=False).live
    assert not described.changed
