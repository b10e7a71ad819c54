"""A worker's end of a torch process group whose rank 0 is a trainer without this package."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from peers import forked_gloo  # noqa: F401 - a fixture

from areal_vllm_ext.process.file_limit import raise_file_limit
from areal_vllm_ext.protocol import Bucket, TensorMeta, TorchGroup
from areal_vllm_ext.transport.base import Cancelled, PeerLost, WorkerSite
from areal_vllm_ext.transport.buckets import packed_layout, unpack
from areal_vllm_ext.transport.gloo_process import split_rendezvous
from areal_vllm_ext.transport.torch_group import NcclGroup, TorchGroupSource
from areal_vllm_ext.worker.sources import Sources
from harness.torch_trainer import TorchTrainer, torch_trainer

SITE = WorkerSite(0, torch.device("cpu"))
TENSORS = {
    "a": torch.arange(24, dtype=torch.bfloat16).reshape(4, 6),
    "b": torch.randn(1000),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0),
}


def transfer(trainer: TorchTrainer, joining: str = "1", *, established: bool = False) -> TorchGroup:
    return TorchGroup(
        backend="gloo",
        group=trainer.name,
        joining=joining,
        world_size=2,
        ranks={0: 1},
        rendezvous=f"{trainer.host}:{trainer.port}",
        established=established,
    )


def announcement(tensors: dict[str, torch.Tensor]) -> Bucket:
    from areal_vllm_ext.protocol import Segment

    metas = [TensorMeta(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]
    segments, nbytes = packed_layout([Segment(meta, 0) for meta in metas])
    return Bucket(epoch=0, update="u", index=0, nbytes=nbytes, segments=segments)


def received(
    source: TorchGroupSource, bucket: Bucket, timeout: float = 20.0, cancelled: threading.Event | None = None
) -> dict[str, torch.Tensor]:
    buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
    is_cancelled = (cancelled or threading.Event()).is_set
    work = source.start(bucket, buffer, timeout, is_cancelled)
    try:
        work.wait(timeout, is_cancelled)
    except BaseException:
        work.cancel()
        raise
    return dict(unpack(bucket.segments, buffer))


@pytest.fixture(scope="module")
def trainer() -> Iterator[TorchTrainer]:
    with torch_trainer(2, "update_weight_group") as made:
        yield made


@pytest.fixture(scope="module")
def source(trainer: TorchTrainer) -> Iterator[TorchGroupSource]:
    """In a process of many open files: its descriptors are above 1023."""
    raise_file_limit()
    taken = [os.dup(0) for _ in range(1100)]
    made = TorchGroupSource(transfer(trainer), SITE, 60.0, threading.Event())
    for one in taken:
        os.close(one)
    trainer.joined.result(60)
    yield made
    made.close()


def test_tensors_arrive_as_they_were_sent(trainer: TorchTrainer, source: TorchGroupSource) -> None:
    for _ in range(2):
        sent = trainer.broadcast(list(TENSORS.values()))
        got = received(source, announcement(TENSORS))
        sent.result(10)
        for name, tensor in TENSORS.items():
            assert torch.equal(got[name], tensor), name


def test_buckets_in_flight_come_in_their_order(trainer: TorchTrainer, source: TorchGroupSource) -> None:
    first, second = {"b": TENSORS["b"]}, {"a": TENSORS["a"]}
    orders = [announcement(first), announcement(second)]
    buffers = [torch.empty(order.nbytes, dtype=torch.uint8) for order in orders]
    works = [source.start(order, buffer, 20.0, lambda: False) for order, buffer in zip(orders, buffers, strict=True)]
    trainer.broadcast([TENSORS["b"], TENSORS["a"]])
    for work in works:
        work.wait(20.0, lambda: False)
    assert torch.equal(dict(unpack(orders[0].segments, buffers[0]))["b"], TENSORS["b"])
    assert torch.equal(dict(unpack(orders[1].segments, buffers[1]))["a"], TENSORS["a"])


def test_a_tensor_of_another_size_costs_the_group_and_not_this_process() -> None:
    with torch_trainer(2, "group of another size") as trainer:
        source = TorchGroupSource(transfer(trainer), SITE, 60.0, threading.Event())
        trainer.joined.result(60)
        trainer.broadcast([torch.zeros(2_000_000)])
        with pytest.raises(PeerLost, match=r"group of another size: .*doesn't match"):
            received(source, announcement({"a": torch.zeros(8)}))
        source.close()


@pytest.mark.usefixtures("forked_gloo")
@pytest.mark.parametrize("way", ["time", "cancel"])
def test_a_trainer_that_sends_nothing_is_given_up(way: str) -> None:
    with torch_trainer(2, f"silent {way}") as trainer:
        source = TorchGroupSource(transfer(trainer), SITE, 60.0, threading.Event())
        trainer.joined.result(60)
        cancelled = threading.Event()
        started = time.monotonic()
        if way == "cancel":
            threading.Timer(0.3, cancelled.set).start()
            with pytest.raises(Cancelled):
                received(source, announcement(TENSORS), 30.0, cancelled)
        else:
            with pytest.raises(TimeoutError, match=r"were not through gloo within 0\.3 s"):
                received(source, announcement(TENSORS), 0.3)
        assert time.monotonic() - started < 5
        # What the trainer broadcasts now fails, and does not wait for ever.
        with pytest.raises(RuntimeError):
            trainer.broadcast([torch.zeros(2_000_000)]).result(10)
        source.close()


@pytest.mark.usefixtures("forked_gloo")
def test_a_group_that_never_comes_ends_at_the_deadline() -> None:
    with torch_trainer(3, "one rank too few") as trainer:
        started = time.monotonic()
        with pytest.raises((TimeoutError, PeerLost)):
            TorchGroupSource(transfer(trainer), SITE, 4.0, threading.Event())
        assert time.monotonic() - started < 15
        received_by = TorchGroup(
            backend="gloo", group="g", joining="1", world_size=2, ranks={0: 1}, rendezvous="127.0.0.1:1"
        )
        with pytest.raises((TimeoutError, PeerLost)):
            TorchGroupSource(received_by, SITE, 2.0, threading.Event())


@pytest.mark.usefixtures("forked_gloo")
def test_a_name_is_joined_again_and_a_lost_group_is_named() -> None:
    sources, cancelled = Sources(SITE), threading.Event()
    opened = []
    for joining in ("1", "2"):
        with torch_trainer(2, "again") as trainer:
            opened.append(sources.open(transfer(trainer, joining), 60.0, cancelled, 1))
            trainer.joined.result(60)
            again = sources.open(transfer(trainer, joining, established=True), 60.0, cancelled, 1)
            assert again is opened[-1]
            sent = trainer.broadcast(list(TENSORS.values()))
            assert torch.equal(received(opened[-1], announcement(TENSORS))["b"], TENSORS["b"])  # type: ignore[arg-type]
            sent.result(10)
    with pytest.raises(RuntimeError, match="no longer has its end"):
        sources.open(transfer(trainer, "1", established=True), 60.0, cancelled, 1)
    sources.drop(opened[-1])


def test_the_rendezvous_may_be_an_ipv6_address() -> None:
    assert split_rendezvous("[fe80::1]:29500") == ("fe80::1", 29500)
    assert split_rendezvous("10.0.0.1:29500") == ("10.0.0.1", 29500)


def test_nccls_id_is_read_where_torchs_backend_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store and its prefixes are torch's own; NCCL itself needs GPUs."""
    from torch.distributed import PrefixStore, TCPStore

    joined: list[tuple[object, ...]] = []

    def join(unique_id: str, rank: int, size: int, device: torch.device, *_: object) -> object:
        joined.append((unique_id, rank, size, device))
        return object()

    monkeypatch.setattr("areal_vllm_ext.transport.broadcast.NcclCommunicator", join)
    master = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    to = TorchGroup(
        backend="nccl",
        group="update_weight_group",
        joining="1",
        world_size=2,
        ranks={0: 1},
        rendezvous=f"127.0.0.1:{master.port}",
    )
    group = NcclGroup(to, 1, torch.device("cpu"), 5.0)
    with pytest.raises(TimeoutError, match=r"the trainer did not begin to broadcast within 0\.2 s"):
        group.start(torch.empty(0), [], 0.2, lambda: False)
    store: object = master
    # What ``init_custom_process_group`` and torch's ``_new_process_group_helper`` put around the store.
    for prefix in ("update_weight_group", "update_weight_group/", "cuda/"):
        store = PrefixStore(prefix, store)
    unique_id = bytes(range(128))
    store.set("0", unique_id)  # type: ignore[attr-defined] - the key of a group's first communicator
    group.start(torch.empty(0), [], 5.0, lambda: False)
    assert joined == [(unique_id.hex(), 1, 2, torch.device("cpu"))]
