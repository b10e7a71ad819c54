"""Broadcast over TCP on loopback: the same bytes on every rank, and every wait ends."""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import peers
import pytest
import torch
from peers import join
from torch.multiprocessing.reductions import StorageWeakRef
from waiting import in_thread

from areal_vllm_ext.protocol import Bucket, TensorMeta
from areal_vllm_ext.transport.base import Cancelled
from areal_vllm_ext.transport.broadcast import BroadcastSink, BroadcastSource
from areal_vllm_ext.transport.buckets import filled_buckets
from harness.simulated_engine import HOST

TIMEOUT = 0.7
NEVER_CANCELLED = threading.Event()


def bucket(nbytes: int, index: int = 0) -> Bucket:
    return Bucket(epoch=1, update="u", index=index, nbytes=nbytes, segments=())


def make_sink(members: list[list[int]], timeout: float = 5.0) -> BroadcastSink:
    return BroadcastSink(
        "tcp",
        {f"engine {number}": ranks for number, ranks in enumerate(members)},
        HOST,
        torch.device("cpu"),
        1 << 20,
        timeout,
    )


def receive(
    source: BroadcastSource, nbytes: int, timeout: float, cancelled: threading.Event, index: int = 0
) -> torch.Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    return source.start(bucket(nbytes, index), buffer, timeout, cancelled.is_set).wait(timeout, cancelled.is_set)


def send(
    sink: BroadcastSink, buffer: torch.Tensor, timeout: float, cancelled: threading.Event = NEVER_CANCELLED
) -> None:
    sink.start(buffer, timeout, cancelled.is_set).wait(timeout, cancelled.is_set)


def opened() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


class Group:
    """A sink and its sources, which are connected."""

    def __init__(self, members: list[list[int]]) -> None:
        self.sink = make_sink(members)
        with ThreadPoolExecutor(8) as pool:
            joining = [
                pool.submit(join, transfer, rank, 5.0)
                for transfer, ranks in zip(self.sink.transfers, members, strict=True)
                for rank in ranks
            ]
            opening = pool.submit(lambda: [future.result() for future in joining] and None)
            self.sink.connect(opening)
            self.sources = [future.result() for future in joining]

    def broadcast(self, payload: torch.Tensor, index: int = 0) -> list[torch.Tensor]:
        with ThreadPoolExecutor(8) as pool:
            receiving = [
                pool.submit(receive, source, payload.numel(), 5.0, NEVER_CANCELLED, index) for source in self.sources
            ]
            _, buffer = self.sink.buffer(index, payload.numel())
            buffer.copy_(payload)
            send(self.sink, buffer, 5.0)
            return [future.result() for future in receiving]

    def close(self) -> None:
        self.sink.close()
        for source in self.sources:
            source.close()


@pytest.fixture
def pair() -> Iterator[Group]:
    group = Group([[0]])
    yield group
    group.close()


def took(work: Callable[[], object]) -> tuple[float, BaseException | None]:
    """How long ``work`` took, and its error."""
    started = time.monotonic()
    try:
        work()
    except Exception as error:
        return time.monotonic() - started, error
    return time.monotonic() - started, None


# The bytes


def test_every_rank_of_every_engine_gets_the_same_bytes() -> None:
    group = Group([[0, 1], [0]])
    try:
        for index, size in enumerate((1, 255, 4097, 3 << 20, 0, 77)):
            payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
            for received in group.broadcast(payload, index):
                assert torch.equal(received, payload)
    finally:
        group.close()


def test_what_was_received_is_the_callers_to_keep(pair: Group) -> None:
    (first,) = pair.broadcast(torch.full((1000,), 1, dtype=torch.uint8))
    pair.broadcast(torch.full((1000,), 2, dtype=torch.uint8), index=2)
    assert first.eq(1).all()


def test_a_connection_serves_the_next_update_too(pair: Group) -> None:
    pair.broadcast(torch.zeros(10, dtype=torch.uint8))
    pair.sink.release()
    pair.sink.connect(opened())
    (received,) = pair.broadcast(torch.full((10,), 7, dtype=torch.uint8))
    assert received.eq(7).all()


def filled(sink: BroadcastSink) -> StorageWeakRef:
    """A bucket, which is kept to be filled again; returns its memory."""
    weights = [(TensorMeta("t", "float32", (8,)), torch.ones(8))]
    (_,) = filled_buckets(weights, 1024, lambda nbytes: sink.buffer(0, nbytes)[1], frozenset(), sink.filled)
    return StorageWeakRef(sink.buffer(0, 1024)[1].untyped_storage())


def test_a_slot_that_grows_leaves_no_smaller_buffer_behind(pair: Group) -> None:
    smaller = filled(pair.sink)
    gc.collect()
    assert not smaller.expired()
    pair.sink.buffer(pair.sink.slots, 4096)
    gc.collect()
    assert smaller.expired()


def test_ranks_are_assigned_by_the_client_each_once() -> None:
    sink = make_sink([[0, 1], [0], [3]])
    try:
        assert [transfer.ranks for transfer in sink.transfers] == [{0: 1, 1: 2}, {0: 3}, {3: 4}]
        assert {transfer.world_size for transfer in sink.transfers} == {5}
        assert len({transfer.communicator for transfer in sink.transfers}) == 1
        assert all(transfer.rendezvous.startswith(f"{HOST}:") for transfer in sink.transfers)
    finally:
        sink.close()


# Connecting


def test_the_listener_is_closed_once_all_have_connected(pair: Group) -> None:
    seconds, error = took(lambda: join(pair.sink.transfers[0], 0, TIMEOUT))
    assert isinstance(error, RuntimeError)
    assert seconds < TIMEOUT + 1


def test_a_worker_that_cannot_connect_ends_the_wait_at_once() -> None:
    sink = make_sink([[0], [0]], timeout=20.0)
    opening: Future[None] = Future()
    threading.Timer(0.1, opening.set_exception, (RuntimeError("no room"),)).start()
    try:
        seconds, error = took(lambda: sink.connect(opening))
        assert str(error) == "no room"
        assert seconds < 1.1
    finally:
        sink.close()


def test_a_worker_that_never_comes_is_named_and_the_others_are_let_go() -> None:
    sink = make_sink([[0], [0, 5]], timeout=TIMEOUT)
    joining, joined = in_thread(lambda: join(sink.transfers[1], 0, TIMEOUT))
    try:
        seconds, error = took(lambda: sink.connect(Future()))
        assert isinstance(error, TimeoutError)
        assert str(error).startswith("2 of 3 workers did not connect to 127.0.0.1:")
        assert "(worker 0 of engine 0, worker 5 of engine 1)" in str(error)
        assert seconds < TIMEOUT + 1
        joining.join(5)
        seconds, error = took(lambda: receive(joined[0], 10, 20.0, NEVER_CANCELLED))  # type: ignore[arg-type]
        assert str(error) == "the trainer: the connection was closed"
        assert seconds < 1
    finally:
        sink.close()


def test_a_trainer_that_is_gone_is_given_up(free_port: int) -> None:
    sink = make_sink([[0]])
    sink.close()
    transfer = msgspec.structs.replace(sink.transfers[0], rendezvous=f"{HOST}:{free_port}")
    seconds, error = took(lambda: join(transfer, 0, TIMEOUT))
    assert isinstance(error, TimeoutError | RuntimeError)
    assert seconds < TIMEOUT + 1


# Stalls


def test_a_trainer_that_stalls_is_a_timeout(pair: Group) -> None:
    seconds, error = took(lambda: receive(pair.sources[0], 1 << 20, TIMEOUT, NEVER_CANCELLED))
    assert isinstance(error, TimeoutError)
    assert str(error) == "a bucket of 1048576 bytes was not through after 0.7 s (from the trainer: 0)"
    assert TIMEOUT <= seconds < TIMEOUT + 1


def test_a_worker_that_stalls_is_a_timeout(pair: Group) -> None:
    _, buffer = pair.sink.buffer(0, 64 << 20)
    seconds, error = took(lambda: send(pair.sink, buffer, TIMEOUT))
    assert isinstance(error, TimeoutError)
    assert re.search(r"67108864 bytes was not through after 0.7 s \(worker 0 of engine 0: \d+\)", str(error))
    assert TIMEOUT <= seconds < TIMEOUT + 1


@pytest.mark.parametrize("end", ["worker", "trainer"])
def test_a_cancelled_wait_ends_at_once(pair: Group, end: str) -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    if end == "worker":
        seconds, error = took(lambda: receive(pair.sources[0], 1 << 20, 20.0, cancelled))
    else:
        _, buffer = pair.sink.buffer(0, 64 << 20)
        seconds, error = took(lambda: send(pair.sink, buffer, 20.0, cancelled))
    assert isinstance(error, Cancelled)
    assert seconds < 1.0


def test_after_a_failure_a_new_communicator_works_at_once(pair: Group) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        receive(pair.sources[0], 1 << 20, 0.2, NEVER_CANCELLED)
    pair.close()
    group = Group([[0]])
    try:
        (received,) = group.broadcast(torch.full((10,), 9, dtype=torch.uint8))
        assert received.eq(9).all()
    finally:
        group.close()
    assert time.monotonic() - started < 3.0


def test_a_bucket_of_another_size_is_an_error_at_both_ends(pair: Group) -> None:
    receiving, received = in_thread(lambda: took(lambda: receive(pair.sources[0], 1 << 20, 5.0, NEVER_CANCELLED)))
    _, buffer = pair.sink.buffer(0, 64 << 20)
    seconds, error = took(lambda: send(pair.sink, buffer, 5.0))
    assert isinstance(error, RuntimeError)
    assert str(error).startswith("worker 0 of engine 0: ")
    receiving.join(5)
    (outcome,) = received
    assert str(outcome[1]) == "the trainer: a bucket of 67108864 bytes came instead of 1048576"
    assert max(seconds, outcome[0]) < 1.0


# Death


def test_a_killed_worker_is_an_error_for_trainer_and_others_before_the_time_out() -> None:
    sink = make_sink([[0, 1]], timeout=60.0)
    process, connection = peers.start(peers.join_and_wait, sink.transfers[0], 1)
    try:
        with ThreadPoolExecutor(2) as pool:
            joining, _saying = pool.submit(join, sink.transfers[0], 0, 60.0), pool.submit(connection.recv)
            # As an engine answers Begin: when its workers have joined. Then the listener is closed.
            sink.connect(pool.submit(lambda: None))
            source = joining.result()
        receiving, received = in_thread(lambda: took(lambda: receive(source, 64 << 20, 2.0, NEVER_CANCELLED)))
        process.kill()
        process.join()
        _, buffer = sink.buffer(0, 64 << 20)
        seconds, error = took(lambda: send(sink, buffer, 2.0))
        assert isinstance(error, TimeoutError | RuntimeError)
        assert seconds < 3.0
        receiving.join(4)
        seconds, error = received[0]  # type: ignore[misc]
        assert seconds < 3.0, "it may have got its bytes, or an error; it must not hang"
    finally:
        peers.end(process, connection)
        sink.close()
