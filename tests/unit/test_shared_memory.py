"""Shared memory: the same bytes, nothing beyond the segment, and nothing left in /dev/shm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import msgspec
import peers
import pytest
import torch

from areal_vllm_ext.protocol import Bucket, SharedMemory
from areal_vllm_ext.transport import shared_memory
from areal_vllm_ext.transport.buckets import aligned
from areal_vllm_ext.transport.shared_memory import SharedMemorySink, SharedMemorySource, remove_leftovers

CPU = torch.device("cpu")
SLOT = 4096


pytestmark = pytest.mark.usefixtures("segment_folder")


def segments() -> set[str]:
    return {path.name for path in shared_memory._FOLDER.iterdir()}


def bucket(nbytes: int, location: int) -> Bucket:
    return Bucket(epoch=1, update="u", index=0, nbytes=nbytes, segments=(), location=location)


def receive(source: SharedMemorySource, nbytes: int, location: int) -> torch.Tensor:
    never, buffer = (lambda: False), torch.empty(max(nbytes, 0), dtype=torch.uint8)
    return source.start(bucket(nbytes, location), buffer, 1.0, never).wait(1.0, never)


def done(error: Exception | None = None) -> Future[None]:
    future: Future[None] = Future()
    future.set_exception(error) if error else future.set_result(None)
    return future


@pytest.fixture
def sink(segment_folder: Path) -> Iterator[SharedMemorySink]:
    made = SharedMemorySink(2, 1024, SLOT)
    yield made
    made.close()
    assert not segments(), "something is left"


def test_every_worker_reads_what_was_written(sink: SharedMemorySink) -> None:
    sources = [SharedMemorySource(transfer, CPU) for transfer in sink.transfers]
    sink.connect(done())
    for index, size in enumerate((1, 255, SLOT, 0, 1000)):
        payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
        location, buffer = sink.buffer(index, size)
        buffer.copy_(payload)
        for source in sources:
            assert torch.equal(receive(source, size, location), payload)


def test_two_buckets_in_a_row_do_not_overlap_and_what_was_read_is_kept(sink: SharedMemorySink) -> None:
    source = SharedMemorySource(sink.transfers[0], CPU)
    (first_at, first), (second_at, second) = sink.buffer(0, SLOT), sink.buffer(1, SLOT)
    first.fill_(1)
    kept = receive(source, SLOT, first_at)
    second.fill_(2)
    assert receive(source, SLOT, first_at).eq(1).all()
    assert receive(source, SLOT, second_at).eq(2).all()
    first.fill_(3)  # the third bucket takes the first one's slot
    assert kept.eq(1).all()
    assert sink.buffer(2, SLOT)[0] == first_at


def test_any_dtype_can_be_viewed_in_either_slot() -> None:
    sink = SharedMemorySink(1, 1024, aligned(1001))
    try:
        for index in range(2):
            sink.buffer(index, 1000)[1].view(torch.float64).fill_(1.0)
    finally:
        sink.close()


def test_the_name_is_gone_once_the_workers_have_met_and_the_memory_is_not(sink: SharedMemorySink) -> None:
    source = SharedMemorySource(sink.transfers[0], CPU)
    assert sink.transfers[0].segment in segments()
    sink.connect(done())
    assert sink.transfers[0].segment not in segments()
    location, buffer = sink.buffer(0, 8)
    buffer.fill_(5)
    assert receive(source, 8, location).eq(5).all()
    sink.connect(done())  # the next update


def test_the_name_is_gone_where_a_worker_says_no(sink: SharedMemorySink) -> None:
    with pytest.raises(RuntimeError, match="no room"):
        sink.connect(done(RuntimeError("no room")))
    assert sink.transfers[0].segment not in segments()


def test_only_the_owner_can_open_the_segment(sink: SharedMemorySink) -> None:
    assert (shared_memory._FOLDER / sink.transfers[0].segment).stat().st_mode & 0o777 == 0o600


def test_nothing_is_left_where_the_trainer_is_killed_after_the_meeting(segment_folder: Path) -> None:
    process, connection = peers.start(peers.make_segment, segment_folder)
    transfer = connection.recv()
    try:
        source = SharedMemorySource(transfer, CPU)
        connection.send("all have met")
        assert connection.recv() == "met"
        process.kill()
        process.join()
        assert not segments()
        assert receive(source, SLOT, 0).eq(7).all(), "what was sent can still be read"
    finally:
        peers.end(process, connection)


def test_what_a_killed_trainer_left_is_removed_by_the_next_and_what_lives_is_not(segment_folder: Path) -> None:
    killed, to_killed = peers.start(peers.make_segment, segment_folder)
    living, to_living = peers.start(peers.make_segment, segment_folder)
    left, lives = to_killed.recv().segment, to_living.recv().segment
    try:
        killed.kill()
        killed.join()
        assert segments() == {left, lives}
        sink = SharedMemorySink(1, 1024, SLOT)
        assert segments() == {lives, sink.transfers[0].segment}
        sink.close()
        to_living.send("all have met")
        assert to_living.recv() == "met"
        assert not segments()
    finally:
        peers.end(killed, to_killed)
        peers.end(living, to_living)


def test_only_segments_are_removed(segment_folder: Path) -> None:
    other = segment_folder / "areal-notes"
    other.write_text("of another program")
    remove_leftovers()
    assert other.exists()


# Sizes


def test_a_bucket_larger_than_its_slot_is_refused(sink: SharedMemorySink) -> None:
    with pytest.raises(RuntimeError, match="larger than every tensor"):
        sink.buffer(0, SLOT + 1)


@pytest.mark.parametrize(("nbytes", "location"), [(1, 2 * SLOT), (2 * SLOT + 1, 0), (8, 2 * SLOT - 7), (8, -8)])
def test_a_bucket_outside_of_the_segment_is_refused(sink: SharedMemorySink, nbytes: int, location: int) -> None:
    source = SharedMemorySource(sink.transfers[0], CPU)
    with pytest.raises(ValueError, match="does not lie inside the shared memory"):
        receive(source, nbytes, location)


def test_a_bucket_of_a_negative_size_is_refused(sink: SharedMemorySink) -> None:
    source = SharedMemorySource(sink.transfers[0], CPU)
    with pytest.raises(ValueError, match="does not lie inside the shared memory"):
        receive(source, -8, 16)


def test_a_segment_smaller_than_was_said_is_refused(sink: SharedMemorySink) -> None:
    with pytest.raises(ValueError, match=r"larger than|greater than"):
        SharedMemorySource(msgspec.structs.replace(sink.transfers[0], nbytes=10 * SLOT), CPU)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "areal-", "areal-" + "g" * 32, "areal-" + "0" * 33, ""]
)
def test_a_name_that_is_no_segments_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a shared memory segment"):
        SharedMemorySource(SharedMemory(segment=name, nbytes=1), CPU)


def test_a_link_in_the_place_of_a_segment_is_not_followed(segment_folder: Path) -> None:
    (segment_folder / "target").write_bytes(bytes(16))
    link = segment_folder / ("areal-" + "0" * 32)
    link.symlink_to(segment_folder / "target")
    with pytest.raises(OSError, match="symbolic link"):
        SharedMemorySource(SharedMemory(segment=link.name, nbytes=16), CPU)


def test_a_worker_on_another_host_is_told_of_broadcast() -> None:
    with pytest.raises(RuntimeError, match=r"not on this host.*transport='broadcast'"):
        SharedMemorySource(SharedMemory(segment="areal-" + "0" * 32, nbytes=16), CPU)


def test_a_full_shm_is_said_before_anything_is_sent() -> None:
    room = os.statvfs("/dev/shm")
    if room.f_blocks == 0:
        pytest.skip("/dev/shm has no limit here")
    with pytest.raises(RuntimeError, match=r"/dev/shm\S* has no room for \d+ MiB .*bucket_mib"):
        SharedMemorySink(1, 1024, room.f_blocks * room.f_frsize)
    assert not segments()
