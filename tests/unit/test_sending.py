"""Weights on their whole way: a trainer's client, the wire, real receivers, staging and the switch; only vLLM is missing."""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from real_receivers import (
    SHAPES,
    TRANSPORTS,
    WORKERS,
    Served,
    assert_untouched,
    checkpoint,
    group,
    send,
    served,
    set_bucket_bytes,
    shared_engines,
    weights,
)
from safetensors.torch import save_file
from waiting import eventually, in_thread

from areal_vllm_ext import EngineGroup, InvalidWeights, UpdateAborted
from areal_vllm_ext.client.delivery import choose_transport
from areal_vllm_ext.client.sending import Sending
from areal_vllm_ext.protocol import Ack, Begin, Bucket, Disk, EngineInfo, Prepare, Sender, SharedMemory
from areal_vllm_ext.transport import tcp
from areal_vllm_ext.transport.broadcast import BroadcastSink, BroadcastSource
from areal_vllm_ext.transport.shared_memory import SharedMemorySink, SharedMemorySource
from areal_vllm_ext.transport.tcp import TcpWork
from areal_vllm_ext.worker import sender_stream
from areal_vllm_ext.worker.receiver import Receiver
from areal_vllm_ext.worker.sender_stream import SenderStream
from areal_vllm_ext.worker.sources import Sources
from harness.simulated_engine import NEVER

__all__ = ["checkpoint", "group", "served", "shared_engines"]  # the fixtures


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_worker_serves_what_was_sent_update_after_update(
    served: Served, group: EngineGroup, transport: str, tmp_path: Path
) -> None:
    for seed in range(1, 4):
        new = weights(seed)
        if transport == "disk":
            save_file(new, tmp_path / "model.safetensors")
            send(group, tmp_path, seed)
        else:
            send(group, new, seed, transport=transport, bucket_mib=1)
        assert served.serves(new)
        assert [state.version for state in group.status()] == [seed, seed]
        assert served.staging_is_free()


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_many_small_buckets_bring_the_same(
    served: Served, group: EngineGroup, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = weights(4)
    opened = group.update(1, timeout=20, transport=transport)
    set_bucket_bytes(opened, 300)
    with opened:
        opened.send(new)
    assert served.serves(new)


def test_no_bucket_is_announced_after_one_that_did_not_get_through(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that has not heard of that one would take the next for it."""
    announced: list[int] = []
    announce = Sending.announce

    def noted(self: Sending, bucket: Bucket) -> Any:
        announced.append(bucket.index)
        return announce(self, bucket)

    def stalls(*_: object) -> None:
        time.sleep(0.2)  # the next bucket is filled meanwhile
        raise TimeoutError("the wire is dead")

    monkeypatch.setattr(Sending, "announce", noted)
    monkeypatch.setattr(BroadcastSink, "start", stalls)
    opened = group.update(1, timeout=20, transport="broadcast")
    set_bucket_bytes(opened, 300)
    with pytest.raises(UpdateAborted, match="the wire is dead"), opened:
        opened.send(weights(5))
    assert announced == [0]
    assert_untouched(served)


def small_buckets(group: EngineGroup, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """An update in buckets of 300 bytes: one for each tensor but the last two."""
    opened = group.update(1, timeout=20, **options)
    set_bucket_bytes(opened, 300)
    return opened


def test_a_bucket_comes_while_the_one_before_does_and_is_checked(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[SenderStream, threading.Event] = collections.defaultdict(threading.Event)
    started: set[tuple[object, int]] = set()
    # Of each intake, when its first bucket was: whether its second was started.
    on_its_way: dict[object, bool] = {}
    checked_first: dict[object, bool] = {}
    put, start, wait, first_corrupt = (
        SenderStream.put,
        BroadcastSource.start,
        TcpWork.wait,
        sender_stream.first_corrupt,
    )

    def note(seen: dict[object, bool]) -> None:
        thread = threading.current_thread()
        seen.setdefault(thread, (thread, 1) in started)

    def tells(self: SenderStream, bucket: Bucket) -> None:
        put(self, bucket)
        if bucket.index == 1:
            told[self].set()

    def noted(self: BroadcastSource, bucket: Bucket, *arguments: Any) -> Any:
        if bucket.index == 0:  # not before the next one was announced
            eventually(lambda: len(told) == 4 and all(one.is_set() for one in told.values()))
        started.add((threading.current_thread(), bucket.index))
        return start(self, bucket, *arguments)

    def waited(self: TcpWork, *arguments: Any) -> torch.Tensor:
        if threading.current_thread().name.startswith("areal-receive"):
            note(on_its_way)
        return wait(self, *arguments)

    def checked(segments: Any, *arguments: Any) -> str:
        note(checked_first)
        return first_corrupt(segments, *arguments)

    monkeypatch.setattr(SenderStream, "put", tells)
    monkeypatch.setattr(BroadcastSource, "start", noted)
    monkeypatch.setattr(TcpWork, "wait", waited)
    monkeypatch.setattr(sender_stream, "first_corrupt", checked)
    with small_buckets(group, monkeypatch, transport="broadcast") as update:
        update.send(weights(5))
    for seen in (on_its_way, checked_first):
        assert list(seen.values()) == [True] * 4
    assert served.serves(weights(5))


def test_buckets_that_are_on_their_way_are_given_up_with_their_update(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, cancel = TcpWork.wait, TcpWork.cancel
    cancelled: list[TcpWork] = []

    def stalls(self: TcpWork, *arguments: Any) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            raise TimeoutError("the wire is dead")
        return wait(self, *arguments)

    def noted(self: TcpWork) -> None:
        cancelled.append(self)
        cancel(self)

    monkeypatch.setattr(TcpWork, "wait", stalls)
    monkeypatch.setattr(TcpWork, "cancel", noted)
    with (
        pytest.raises(UpdateAborted, match="the wire is dead"),
        small_buckets(group, monkeypatch, transport="broadcast") as up,
    ):
        up.send(weights(5))
    assert len(set(cancelled)) >= BroadcastSink.slots - 1
    assert_untouched(served)


def test_an_error_while_workers_get_ready_ends_an_update_in_order(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source = Sources.open

    def late(self: Sources, *arguments: Any) -> Any:
        time.sleep(0.3)
        return open_source(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Sources, "open", late)
        patched.setattr(Sending, "split_shareable", lambda *_: 1 / 0)
        phases: list[tuple[str, float]] = []
        opened = group.update(
            1, timeout=20, transport="shared_memory", on_phase=lambda phase: phases.append((phase, time.monotonic()))
        )
        with pytest.raises(ZeroDivisionError), opened as update:
            update.send(weights(5))
        (begin, began), (abort, aborted) = phases
        assert (begin, abort) == ("begin", "abort")
        assert aborted - began > 0.25, "not while engines are still asked to begin"
        assert update._transaction.driver.coordinator.phase == "done"  # type: ignore[union-attr]
    assert_untouched(served)
    send(group, weights(6), 2)
    assert served.serves(weights(6))


def addresses(served: Served) -> list[set[int]]:
    """Of what each worker had staged at the last commit."""
    return [{tensor.data_ptr() for tensor in held.values()} for _, held in sorted(served.weights.items())]


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_staging_that_is_kept_is_used_by_the_next_update(served: Served, group: EngineGroup, transport: str) -> None:
    places = []
    for seed, keep in enumerate((True, True, False, False), 1):
        send(group, weights(seed), seed, transport=transport, keep_buffers=keep)
        if isinstance(sink := group._group._sinks.sink, BroadcastSink):
            assert bool(sink._buffers) == keep, "the trainer's buckets"
        assert served.serves(weights(seed))
        places.append(addresses(served))
        kept = [receiver.context.memory.kept for receivers in served.receivers.values() for receiver in receivers]
        assert [bool(one) for one in kept] == [keep] * 4
    # What the last update staged is still there when the next one comes (this test holds it), so other memory is elsewhere.
    assert places[0] == places[1] == places[2]
    assert not any(one & another for one, another in zip(places[2], places[3], strict=True))


def test_staging_that_is_kept_is_not_used_for_other_tensors(served: Served, group: EngineGroup) -> None:
    new = weights(1)
    send(group, new, 1, transport="broadcast", keep_buffers=True)
    others = dict(reversed(weights(2).items()))
    send(group, others, 2, transport="broadcast", keep_buffers=True)
    assert served.serves(others)


def test_staging_of_an_update_that_was_given_up_is_not_kept(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something may still be written there."""
    send(group, weights(1), 1, transport="broadcast", keep_buffers=True)
    with (
        pytest.raises(InvalidWeights),
        small_buckets(group, monkeypatch, transport="broadcast", keep_buffers=True) as up,
    ):
        up.send(weights(2) | {"scale": torch.tensor(float("nan"))})
    eventually(served.staging_is_free)
    assert not any(receiver.context.memory.kept for receivers in served.receivers.values() for receiver in receivers)


def test_digests_that_do_not_go_with_the_tensors_are_refused(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = Sending.announce

    def one_less(self: Sending, bucket: Bucket) -> Any:
        return announce(self, msgspec.structs.replace(bucket, digests=bucket.digests[1:]))

    monkeypatch.setattr(Sending, "announce", one_less)
    with pytest.raises(UpdateAborted, match="4 digests of 5 tensors"):
        send(group, weights(2), transport="shared_memory")
    assert_untouched(served)


def test_buckets_are_received_in_the_order_of_their_bytes_each_once() -> None:
    """Announcements may come late, and again."""
    update: Any = SimpleNamespace(context=SimpleNamespace(rank=0))
    stream = SenderStream(update, 0, Disk(path="/nowhere"))
    for index in (1, 3, 0, 1, 0, 2, 3):
        stream.put(Bucket(epoch=1, update="this", index=index, nbytes=0, segments=()))
    assert [stream._orders.get_nowait().index for _ in range(stream._orders.qsize())] == [0, 1, 2, 3]


def test_auto_is_broadcast_where_no_worker_shares_the_trainers_gpu(served: Served, group: EngineGroup) -> None:
    new = weights(5)
    send(group, new)
    assert served.serves(new)


def test_an_iterable_is_sent_as_it_is_gathered(served: Served, group: EngineGroup) -> None:
    new = weights(6)
    send(group, iter(new.items()))
    assert served.serves(new)


def test_floating_point_is_cast_on_the_way(served: Served, group: EngineGroup) -> None:
    new = weights(7)
    send(group, {name: tensor.double() for name, tensor in new.items()}, dtype="float32")
    assert served.serves(new)


def wrong_weights() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    good = weights(1)
    return {
        "unknown": (good | {"nrom": torch.zeros(16)}, "nrom is not a weight .* did you mean norm"),
        "shape": (good | {"norm": torch.zeros(17)}, r"norm has shape \[17\]"),
        "dtype": (good | {"norm": torch.zeros(16, dtype=torch.int32)}, "norm has dtype int32"),
        "missing": ({name: good[name] for name in list(good)[1:]}, "1 of 5 tensors are missing: embed"),
        "nan": (good | {"norm": torch.full((16,), float("nan"))}, "norm holds NaN"),
    }


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
@pytest.mark.parametrize("form", ["mapping", "iterable"])
@pytest.mark.parametrize("case", wrong_weights())
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_changes(
    served: Served, group: EngineGroup, case: str, form: str, transport: str
) -> None:
    source, message = wrong_weights()[case]
    with pytest.raises(InvalidWeights, match=message):
        send(group, source if form == "mapping" else iter(source.items()), transport=transport)
    assert_untouched(served)
    new = weights(8)
    send(group, new)
    assert served.serves(new), "the next update works"


@pytest.mark.parametrize("case", ["unknown", "shape", "dtype", "missing", "nan", "cut off", "absent"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_workers(
    served: Served, group: EngineGroup, case: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    if case == "cut off":
        save_file(weights(1), file)
        file.write_bytes(file.read_bytes()[:-10])
        message = "truncated"
    elif case == "absent":
        message = "holds no"
    else:
        source, message = wrong_weights()[case]
        save_file(source, file)
    with pytest.raises(UpdateAborted, match=message):
        send(group, tmp_path)
    assert_untouched(served)


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_a_trainer_that_stalls_is_given_up_and_the_next_one_works(
    served: Served, group: EngineGroup, transport: str
) -> None:
    new = weights(9)

    def stalling() -> Iterator[tuple[str, torch.Tensor]]:
        for place, (name, tensor) in enumerate(new.items()):
            if place == 2:
                time.sleep(1.2)
            yield name, tensor

    with pytest.raises(
        UpdateAborted, match=r"the source of the tensors took that long: the next ones came 0\.\d s after"
    ):
        send(group, stalling(), timeout=1.0, transport=transport)
    assert_untouched(served)
    send(group, new)
    assert served.serves(new)


@pytest.mark.parametrize("way", ["replaced by rename", "a second checkpoint beside it"])
def test_a_folder_that_changes_between_begin_and_vote_is_refused_by_every_engine(
    served: Served, group: EngineGroup, tmp_path: Path, way: str
) -> None:
    folder = tmp_path / "step"
    folder.mkdir()
    old, new = weights(1), weights(2)
    shards = {"model-00001-of-00002.safetensors": list(old)[:2], "model-00002-of-00002.safetensors": list(old)[2:]}
    for file, names in shards.items():
        save_file({name: old[name] for name in names}, folder / file)

    def change(phase: str) -> None:
        if phase == "prepare":
            save_file({name: new[name] for name in list(old)[2:]}, tmp_path / "new")
            target = "model-00002-of-00002.safetensors" if way == "replaced by rename" else "copy.safetensors"
            (tmp_path / "new").rename(folder / target)

    with pytest.raises(UpdateAborted, match=r"(-00002-of-00002|copy)\.safetensors changed while it was read"):
        send(group, folder, on_phase=change)
    assert_untouched(served)
    if way == "replaced by rename":
        send(group, folder, 2)
    else:
        with pytest.raises(UpdateAborted, match="holds two checkpoints"):
            send(group, folder, 2)


def test_bytes_that_do_not_get_through_by_the_deadline_are_said_with_the_worker(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()
    monkeypatch.setattr(tcp._Outgoing, "_transfer", lambda *_: stopped.wait(20))
    started = time.monotonic()
    try:
        # The trainer's own end and the engine's silence are two views of one fault: whichever is seen first is told.
        with pytest.raises(
            UpdateAborted,
            match=r"a bucket of \d+ bytes was not through .*worker 0 of DP rank 0|DP rank 0 .* did not answer",
        ):
            send(group, weights(1), timeout=1.5, transport="broadcast")
        assert time.monotonic() - started < 3.0
    finally:
        stopped.set()
    monkeypatch.undo()
    assert_untouched(served)


def test_an_error_of_the_trainers_own_aborts_and_is_not_hidden(served: Served, group: EngineGroup) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "embed", weights(1)["embed"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        send(group, broken())
    assert_untouched(served)


def test_an_engine_that_never_pauses_aborts_what_was_received(served: Served, group: EngineGroup) -> None:
    engine = served.deployment.engines[1]
    engine.seconds["pause"] = NEVER
    try:
        with pytest.raises(UpdateAborted):
            send(group, weights(1), timeout=1.0)
    finally:
        engine.seconds.clear()
    assert served.weights == {}
    eventually(served.staging_is_free)
    eventually(lambda: [state.generation for state in group.status()] == ["running", "running"])


def test_two_trainers_that_update_at_the_same_time_do_not_mix(served: Served, key_file: Path) -> None:
    def train(seed: int) -> None:
        with EngineGroup.connect(served.deployment.directory, key_file=key_file) as client:
            for version in (seed, seed + 10):
                send(client, weights(version), version)

    trainers = [in_thread(lambda seed=seed: train(seed)) for seed in (1, 2)]
    for thread, _ in trainers:
        thread.join(60)
    assert [outcome for _, outcome in trainers] == [[None], [None]]
    last = {engine.version for engine in served.deployment.engines.values()}
    assert len(last) == 1
    assert served.serves(weights(int(str(last.pop()))))


def test_nothing_is_left_in_shared_memory(served: Served, group: EngineGroup, segment_folder: Path) -> None:
    send(group, weights(1), transport="shared_memory")
    assert served.serves(weights(1))
    assert list(segment_folder.iterdir()) == []


# What a receiver does with orders that do not belong together


@pytest.fixture
def endpointless(served: Served) -> Receiver:
    return served.receivers[0][0]


def reports(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(receiver.context, "report", lambda message: said.append((message.step, message.error)))
    return said


def test_orders_of_another_update_are_not_carried_out(
    endpointless: Receiver, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    said = reports(endpointless, monkeypatch)
    endpointless._handle(
        Begin(epoch=1, update="this", version=1, senders={0: Sender(transfer=Disk(path=str(checkpoint)))}, timeout=5.0)
    )
    eventually(lambda: said == [("begin", "")])
    endpointless._handle(Prepare(epoch=1, update="other", buckets={0: 0}))
    endpointless._handle(Bucket(epoch=1, update="other", index=0, nbytes=0, segments=()))
    endpointless._handle(Ack())
    time.sleep(0.05)
    assert said == [("begin", "")]
    with pytest.raises(RuntimeError, match="has no staged weights of update other"):
        endpointless.staged("other")
    endpointless._handle(Prepare(epoch=1, update="this", buckets={0: 0}))
    eventually(lambda: said[1:] == [("prepare", "")])
    assert set(endpointless.staged("this").tensors) == set(SHAPES)
    endpointless.discard("this")
    with pytest.raises(RuntimeError, match="has no staged weights"):
        endpointless.staged("this")


def test_a_bucket_that_is_missing_is_a_no(
    endpointless: Receiver, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    said = reports(endpointless, monkeypatch)
    endpointless._handle(
        Begin(epoch=1, update="this", version=1, senders={0: Sender(transfer=Disk(path=str(checkpoint)))}, timeout=5.0)
    )
    endpointless._handle(Prepare(epoch=1, update="this", buckets={0: 3}))
    eventually(lambda: len(said) == 2)
    assert said[1][0] == "prepare"
    assert "3 buckets were sent, 0 arrived" in said[1][1]
    endpointless.discard("this")


def test_a_newer_update_ends_the_one_before_with_its_thread(
    endpointless: Receiver, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    said = reports(endpointless, monkeypatch)
    for update in ("first", "second"):
        endpointless._handle(
            Begin(
                epoch=1,
                update=update,
                version=1,
                senders={0: Sender(transfer=Disk(path=str(checkpoint)))},
                timeout=60.0,
            )
        )
    eventually(lambda: said.count(("begin", "")) >= 1)
    eventually(lambda: not any(one.name.startswith("areal-receive-first") for one in threading.enumerate()))
    with pytest.raises(RuntimeError, match="no staged weights of update first"):
        endpointless.staged("first")
    endpointless.discard("second")


def test_a_transfer_that_cannot_be_opened_is_told_to_the_engine(
    endpointless: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = reports(endpointless, monkeypatch)
    transfer = SharedMemory(segment="areal-" + "0" * 32, nbytes=16)
    endpointless._handle(Begin(epoch=1, update="this", version=1, senders={0: Sender(transfer=transfer)}, timeout=5.0))
    # Of the update before, an answer may be on its way yet.
    eventually(lambda: any(step == "begin" and "not on this host" in error for step, error in said))
    endpointless.discard("this")


@pytest.mark.parametrize("kind", ["auto", "device", "host"])
def test_staging_without_room_is_refused_with_the_numbers(
    served: Served, group: EngineGroup, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_vllm_ext.worker.staging.free_bytes", lambda _: 100)
    with pytest.raises(
        UpdateAborted, match=r"0\.00 GiB of host memory for 4 workers of this host, where 0\.00 GiB are free"
    ):
        send(group, weights(26), staging=kind)
    assert not served.weights


@pytest.mark.parametrize("staging", ["attic"])
def test_an_unknown_staging_is_refused(group: EngineGroup, staging: str) -> None:
    with pytest.raises(ValueError, match=r"staging must be one of .*, not"):
        group.update(1, staging=staging)


def test_auto_is_ipc_where_a_worker_runs_on_the_trainers_own_gpu(
    group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_vllm_ext.client.delivery.device_id", lambda _: "GPU-1")
    engine = group.engines()[0]
    there = msgspec.structs.replace(engine.workers[0], device_id="GPU-1")
    moved = msgspec.structs.replace(engine, workers=(*engine.workers[1:], there))
    assert choose_transport("auto", torch.device("cuda", 0), [engine]) == "broadcast"
    assert choose_transport("auto", torch.device("cuda", 0), [engine, moved]) == "ipc"
    assert choose_transport("auto", torch.device("cpu"), [moved]) == "broadcast"
    assert choose_transport("shared_memory", torch.device("cuda", 0), [moved]) == "shared_memory"


def test_auto_is_ipc_where_the_only_worker_is_on_a_gpu_that_can_read_the_trainers(
    group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_vllm_ext.client.delivery.device_id", lambda device: f"GPU-{device.index}")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda reads, _: reads.index in (1, 3))

    def on(*places: int) -> list[EngineInfo]:
        engine = group.engines()[0]
        workers = tuple(msgspec.structs.replace(engine.workers[0], device_id=f"GPU-{place}") for place in places)
        return [msgspec.structs.replace(engine, workers=workers)]

    trainer = torch.device("cuda", 0)
    assert choose_transport("auto", trainer, on(1)) == "ipc"
    assert choose_transport("auto", trainer, on(1), peer_ipc_failed=True) == "broadcast"
    assert choose_transport("auto", trainer, on(2)) == "broadcast", "GPU 2 cannot read the trainer's"
    assert choose_transport("auto", trainer, on(1, 3)) == "broadcast", "they would share what leaves the trainer's"
    assert choose_transport("auto", trainer, on(1, 7)) == "broadcast", "GPU 7 is elsewhere"
    assert choose_transport("auto", trainer, on(0, 7), peer_ipc_failed=True) == "ipc", "NCCL has one rank a device"


def test_where_memory_is_out_of_reach_auto_goes_on_by_broadcast(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from areal_vllm_ext.client import delivery

    def choose(*_: object, peer_ipc_failed: bool = False) -> str:
        return "broadcast" if peer_ipc_failed else "ipc"

    class OutOfReach(SharedMemorySink):
        """Its workers are refused, as where a container has an IPC namespace of its own."""

        def __init__(self, engines: int, _: object, bucket_bytes: int, slot_bytes: int) -> None:
            super().__init__(engines, bucket_bytes, slot_bytes)
            self.transfers = [SharedMemory(segment=f"areal-{'0' * 32}", nbytes=1)] * engines

    monkeypatch.setattr(delivery, "choose_transport", choose)
    monkeypatch.setattr("areal_vllm_ext.transport.ipc.CudaIpcSink", OutOfReach)
    for seed in (1, 2):
        send(group, weights(seed), transport="auto")
        assert served.serves(weights(seed))
    assert group._group._sinks.peer_ipc_failed


def test_weights_that_turn_out_wrong_pause_their_engine_until_the_next_update(
    served: Served, group: EngineGroup
) -> None:
    send(group, weights(1))
    engine = served.deployment.engines[0]
    served.receivers[0][1]._report_damage(engine.endpoint.participant.last_update, "layer.0 was not applied")
    eventually(lambda: not engine.running)
    state = group.status()[0]
    assert (state.update_phase, state.error) == ("tainted", "worker 1: layer.0 was not applied")
    assert served.deployment.engines[1].running
    send(group, weights(2))
    assert served.serves(weights(2))
    assert engine.running


def test_a_source_that_serves_one_update_is_closed_with_it(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(SharedMemorySource, "reusable", False)
    monkeypatch.setattr(SharedMemorySource, "close", lambda _: closed.append(1))
    send(group, weights(1), transport="shared_memory")
    assert served.serves(weights(1))
    eventually(lambda: len(closed) == 2 * WORKERS)


def lose_connections(receiver: Receiver) -> None:
    for _, source in list(receiver.context.sources._kept):
        receiver.context.sources.drop(source)


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_a_worker_that_lost_its_connection_gets_a_new_one(served: Served, group: EngineGroup, transport: str) -> None:
    send(group, weights(30), transport=transport)
    lose_connections(served.receivers[1][0])
    send(group, weights(31), version=2, transport=transport)
    assert served.serves(weights(31))


def test_the_connection_that_was_used_least_recently_is_closed_first(served: Served, key_file: Path) -> None:
    with contextlib.ExitStack() as stack:
        groups = [
            stack.enter_context(EngineGroup.connect(served.deployment.directory, key_file=key_file)) for _ in range(5)
        ]
        receiver = served.receivers[0][0]
        for number in (0, 1, 2, 3, 0, 4):
            send(groups[number], weights(number), version=number, transport="broadcast")
        kept = [source for _, source in receiver.context.sources._kept]
        send(groups[0], weights(0), version=9, transport="broadcast")
        assert [source for _, source in receiver.context.sources._kept] == [*kept[:2], kept[3], kept[2]]
