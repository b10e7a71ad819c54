"""CUDA IPC without a GPU: what C is called with, when memory is freed, and who is refused.

That the bytes arrive on a GPU is shown by benchmarks/gpu_smoke.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from waiting import eventually

from areal_vllm_ext.client.sending import Sending
from areal_vllm_ext.integrity import digest
from areal_vllm_ext.integrity.digest import Contents
from areal_vllm_ext.observability.spans import SpanRecorder
from areal_vllm_ext.protocol import Bucket, CudaIpc, Prepare
from areal_vllm_ext.transport import cuda_runtime, ipc, ipc_memory, ipc_sharing
from areal_vllm_ext.transport.base import WorkerSite
from areal_vllm_ext.transport.buckets import meta_of, packed_layout, unpack
from areal_vllm_ext.transport.cuda_runtime import CudaRuntime, Memory
from areal_vllm_ext.transport.device import host_id
from areal_vllm_ext.transport.ipc import CudaIpcSink, CudaIpcSource
from areal_vllm_ext.worker.sender_stream import SenderStream

compiler = shutil.which("cc") or shutil.which("gcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if compiler is None:
        pytest.skip("needs a C compiler")
    built = tmp_path_factory.mktemp("cudart") / "libcudart.so"
    source = Path(__file__).with_name("simulated_cudart.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, source], check=True)
    return built


@pytest.fixture
def runtime(library: Path) -> CudaRuntime:
    return CudaRuntime(str(library), driver=str(library))


def counter(library: Path, name: str) -> int:
    return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), name).value


def test_memory_is_shared_by_its_handle_and_copied(runtime: CudaRuntime, library: Path) -> None:
    memory = runtime.allocate(100)
    ctypes.memmove(memory.address, bytes(range(100)), 100)
    handle = runtime.share(memory)
    assert len(handle) == 64
    opened = runtime.open(handle, 100)
    assert ctypes.c_uint.in_dll(ctypes.CDLL(str(library)), "last_flags").value == 1  # peer access
    target = torch.empty(60, dtype=torch.uint8)
    runtime.copy(target.data_ptr(), opened.address + 40, 60, 0x55AA0000F00D)
    assert target.tolist() == list(range(40, 100))
    assert ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), "last_stream").value == 0x55AA0000F00D


def test_memory_ends_with_its_last_user(runtime: CudaRuntime, library: Path) -> None:
    memory = runtime.allocate(100)
    opened = runtime.open(runtime.share(memory), 100)
    assert (counter(library, "allocated"), counter(library, "opened")) == (1, 1)
    del opened
    assert (counter(library, "allocated"), counter(library, "opened")) == (1, 0)
    del memory
    assert (counter(library, "allocated"), counter(library, "opened")) == (0, 0)


def test_a_failure_is_raised_and_cleared(runtime: CudaRuntime, library: Path) -> None:
    with pytest.raises(RuntimeError, match="cudaMalloc: out of memory"):
        runtime.allocate(1 << 21)
    with pytest.raises(RuntimeError, match="cudaIpcOpenMemHandle: invalid argument"):
        runtime.open(bytes(64), 100)
    assert counter(library, "last_error") == 0
    assert counter(library, "opened") == 0


@pytest.mark.parametrize("handle", [b"", bytes(63), bytes(65)])
def test_a_handle_of_another_length_is_refused(runtime: CudaRuntime, handle: bytes) -> None:
    with pytest.raises(ValueError, match="has 64 bytes, not"):
        runtime.open(handle, 100)


def test_a_runtime_that_is_not_there_is_said() -> None:
    with pytest.raises(RuntimeError, match="the CUDA runtime cannot be loaded"):
        CudaRuntime("libcudart-that-is-nowhere.so")


# Who has to use another transport

TRANSFER = CudaIpc(host=host_id(), device_id="GPU-1", handle=bytes(64), nbytes=8)


def site(device: str) -> WorkerSite:
    return WorkerSite(0, torch.device(device))


def test_a_worker_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="this worker runs on cpu: use transport='broadcast'"):
        CudaIpcSource(TRANSFER, site("cpu"))


def test_a_worker_on_another_host() -> None:
    other = CudaIpc(host="another", device_id="GPU-1", handle=bytes(64), nbytes=8)
    with pytest.raises(RuntimeError, match="on another host: use transport='broadcast'"):
        CudaIpcSource(other, site("cuda:0"))


@pytest.mark.parametrize("can", [True, False])
def test_a_worker_whose_gpu_may_not_read_the_trainers(monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    # The trainer's GPU is index 1 here, whatever its index is there.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *pair: asked.append(pair) or can)
    if can:
        ipc._check_peer(torch.device("cuda", 0), "GPU-1")
    else:
        with pytest.raises(RuntimeError, match=r"cuda:0 cannot read .* GPU-1: use transport='broadcast'"):
            ipc._check_peer(torch.device("cuda", 0), "GPU-1")
    assert asked == [(torch.device("cuda", 0), 1)]
    ipc._check_peer(torch.device("cuda", 0), "GPU-that-is-not-visible")
    assert len(asked) == 1, "what is not known is tried"


def test_a_trainer_whose_weights_are_in_host_memory() -> None:
    with pytest.raises(RuntimeError, match="these weights are on cpu: use 'shared_memory'"):
        CudaIpcSink(1, torch.device("cpu"), 1024, 1024)


# Sharing in place


def memory_as_tensor(memory: Memory, **_: object) -> torch.Tensor:
    """What ``torch.as_tensor`` makes of device memory; the tensor keeps it."""
    array = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
    array.memory = memory
    return torch.frombuffer(array, dtype=torch.uint8)


class Gpu:
    """Stands for every device, those of host memory too."""

    type = "cuda"

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


@pytest.fixture
def simulated(runtime: CudaRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaRuntime]:
    """torch's CUDA on host memory: what is left of it is which bytes are read where, and when."""
    nothing: Any = SimpleNamespace(
        synchronize=lambda: None, wait_stream=lambda _: None, record=lambda _: None, query=lambda: True, cuda_stream=0
    )
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    for name in ("Stream", "Event", "current_stream", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nothing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch, "as_tensor", memory_as_tensor)
    monkeypatch.setattr(ipc, "device_id", lambda _: "GPU-1")
    monkeypatch.setattr(ipc, "_check_peer", lambda *_: None)
    monkeypatch.setattr(cuda_runtime, "load", lambda: runtime)
    yield runtime
    ipc_memory.own.clear()


def bucket_of(sink: CudaIpcSink, weights: dict[str, torch.Tensor]) -> Bucket:
    assert all(sink.sharing.offer(meta_of(name, tensor), tensor) for name, tensor in weights.items())
    (bucket,) = sink.sharing.announcements()
    return bucket


def source_of(sink: CudaIpcSink, device_id: str) -> CudaIpcSource:
    (transfer,) = sink.transfers
    ipc_memory.own.clear()  # as in another process
    shared = msgspec.structs.replace(transfer, device_id=device_id, shared=True)
    return CudaIpcSource(shared, WorkerSite(0, Gpu()))  # type: ignore[arg-type]


def read(source: CudaIpcSource, bucket: Bucket) -> dict[str, torch.Tensor]:
    if source.sharing.in_place:
        return source.sharing.views(bucket).tensors
    segments, nbytes = packed_layout(bucket.segments)
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    return dict(unpack(segments, source.sharing.start_copy(bucket, buffer).wait(5.0, lambda: False)))


@pytest.fixture
def weights(simulated: CudaRuntime) -> dict[str, torch.Tensor]:
    """Tensors in two allocations of the trainer's."""
    one, two = (memory_as_tensor(simulated.allocate(8192)) for _ in range(2))
    tensors = {
        "a": one[:400].view(torch.float32).view(4, 25),
        "b": one[512:1024].view(torch.bfloat16).view(16, 16),
        "c": two[256 : 256 + 1000].view(torch.int64),
    }
    for number, tensor in enumerate(tensors.values()):
        tensor.view(-1).view(torch.uint8).fill_(number + 1)
    return tensors


@pytest.mark.parametrize("device_id", ["GPU-1", "GPU-2"])
def test_shared_tensors_are_the_trainers_own_memory_on_its_gpu(
    simulated: CudaRuntime, library: Path, weights: dict[str, torch.Tensor], device_id: str
) -> None:
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    bucket = bucket_of(sink, weights)
    assert list(bucket.digests) == digest.digests_of(weights.values())
    assert len(bucket.allocations) == 2
    opened = counter(library, "opened")
    source = source_of(sink, device_id)
    assert source.sharing.in_place == (device_id == "GPU-1")
    for _ in range(2):
        found = read(source, bucket)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            name: tensor.tolist() for name, tensor in weights.items()
        }
        assert counter(library, "opened") == opened + 3, "two allocations and the slots, each opened once"
        own = [found[name].data_ptr() == tensor.data_ptr() for name, tensor in weights.items()]
        assert own == [source.sharing.in_place] * 3
    if source.sharing.in_place:
        following = msgspec.structs.replace(bucket, stamp=bucket.stamp + 1)
        assert all(found[name] is tensor for name, tensor in read(source, following).items()), "made once"
        del following
    del found
    source.close()
    assert counter(library, "opened") == opened


@pytest.mark.parametrize(
    ("batch_tensors", "nbytes", "batches"),
    [
        (9, 1 << 20, ["abc"]),
        (2, 1 << 20, ["ab", "c"]),
        (9, 912, ["ab", "c"]),
        (9, 911, ["a", "b", "c"]),
        (9, 1, ["a", "b", "c"]),
    ],
)
def test_shared_tensors_are_announced_in_batches(
    simulated: CudaRuntime,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    batch_tensors: int,
    nbytes: int,
    batches: list[str],
) -> None:
    monkeypatch.setattr(ipc_sharing, "_BATCH_TENSORS", batch_tensors)
    monkeypatch.setattr(ipc_sharing, "_BATCH_BYTES", nbytes)
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    assert [one.nbytes for one in weights.values()] == [400, 512, 1000]
    assert all(sink.sharing.offer(meta_of(name, tensor), tensor) for name, tensor in weights.items())
    announced = ["".join(segment.tensor.name for segment in bucket.segments) for bucket in sink.sharing.announcements()]
    assert announced == batches


def test_allocations_stay_open_over_buckets_and_updates_until_they_are_shared_no_more(
    simulated: CudaRuntime, library: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc_sharing, "_BATCH_TENSORS", 1)
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    source = source_of(sink, "GPU-1")
    opened = counter(library, "opened")
    handles: list[bytes] = []
    opens: list[bytes] = []
    share, open_ = simulated.share, simulated.open
    monkeypatch.setattr(simulated, "share", lambda memory: handles.append(share(memory)) or handles[-1])
    monkeypatch.setattr(simulated, "open", lambda handle, size: opens.append(handle) or open_(handle, size))

    def update(*names: str) -> None:
        assert all(sink.sharing.offer(meta_of(name, weights[name]), weights[name]) for name in names)
        buckets = list(sink.sharing.announcements())
        assert len(buckets) == len(names)
        ipc_memory.own.clear()  # as in another process
        for bucket in buckets:
            assert list(read(source, bucket)) == [bucket.segments[0].tensor.name]
        sink.sharing.revoke()

    update("a", "b", "c")
    update("c", "a")
    assert counter(library, "opened") == opened + 2
    assert len(handles) == 2, "each asked for once"
    assert opens == handles, "and opened once"
    update("c")
    update("c")
    assert counter(library, "opened") == opened + 1, "nothing lies in the first any more"
    source.close()


class Stream:
    """A worker's stream of buckets that lie in the trainer's memory, and what it does in which order."""

    def __init__(self, sink: CudaIpcSink, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source = source_of(sink, "GPU-1")
        self.seen: list[str] = []
        self.reports: list[str] = []
        self._started = 0
        monkeypatch.setattr(digest, "digests_of_async", self._start)
        context = SimpleNamespace(
            rank=0,
            device=torch.device("cpu"),
            sources=SimpleNamespace(open=lambda *_: self.source, drop=lambda _: self.seen.append("close")),
        )
        self.update: Any = SimpleNamespace(
            context=context,
            spans=SpanRecorder(0),
            begin=SimpleNamespace(update="u", staging=SimpleNamespace(keep=False)),
            seconds_left=5.0,
            cancelled=threading.Event(),
            received={0: 0},
            stamps={},
            base_manifest="",
            add_source=lambda *_: True,
            add=lambda *_, **__: self.seen.append("add") or True,  # type: ignore[func-returns-value]
            vote=lambda _: self.seen.append("vote"),
            report=lambda step, error="", **_: self.reports.append(error or step),
        )

    def _start(self, tensors: list[torch.Tensor]) -> Any:
        number, self._started = self._started, self._started + 1
        self.seen.append(f"start {number}")

        def finish() -> list[int]:
            self.seen.append(f"finish {number}")
            return digest.digests_of(tensors)

        return finish

    def run(self, buckets: list[Bucket]) -> None:
        stream = SenderStream(self.update, 0, TRANSFER)
        for place, bucket in enumerate(buckets):
            stream.put(msgspec.structs.replace(bucket, index=place))
        stream.prepare(Prepare(epoch=0, update="u", buckets={0: len(buckets)}))
        stream.stop()
        stream._run()


def test_the_device_hashes_the_next_bucket_while_one_is_handled(
    simulated: CudaRuntime, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc_sharing, "_BATCH_TENSORS", 1)
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    assert all(sink.sharing.offer(meta_of(name, tensor), tensor) for name, tensor in weights.items())
    stream = Stream(sink, monkeypatch)
    stream.run(list(sink.sharing.announcements()))
    assert stream.seen[:5] == ["start 0", "start 1", "start 2", "finish 0", "add"]
    assert stream.seen[5:] == ["finish 1", "add", "finish 2", "add", "vote"]
    assert stream.update.received == {0: 3}
    stream.source.close()


def test_memory_that_the_device_reads_is_closed_after_that(
    simulated: CudaRuntime, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc_sharing, "_BATCH_TENSORS", 1)
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    assert all(sink.sharing.offer(meta_of(name, tensor), tensor) for name, tensor in weights.items())
    first, *others = sink.sharing.announcements()
    stream = Stream(sink, monkeypatch)
    stream.run([msgspec.structs.replace(first, digests=(0,)), *others])
    assert stream.seen[:4] == ["start 0", "start 1", "start 2", "finish 0"]
    assert sorted(stream.seen[4:-1]) == ["finish 1", "finish 2"]
    assert stream.seen[-1] == "close"
    assert "a arrived with other bytes than were sent" in stream.reports[-1]
    stream.source.close()


@pytest.mark.parametrize("ready_after", ["", "b", "c", "never"])
@pytest.mark.parametrize("copied", [False, True])
def test_what_is_hashed_is_announced_while_the_rest_is_offered(
    simulated: CudaRuntime,
    weights: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    ready_after: str,
    copied: bool,
) -> None:
    monkeypatch.setattr(ipc_sharing, "_BATCH_TENSORS", 1)
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    seen: list[str] = []
    offer = sink.sharing.offer
    monkeypatch.setattr(sink.sharing, "offer", lambda meta, one: seen.append(meta.name) or offer(meta, one))

    def announced(_: Sending, bucket: Bucket) -> Future[None]:
        seen.append(f"{bucket.update} {bucket.index}: {''.join(one.tensor.name for one in bucket.segments)}")
        done = Future[None]()
        done.set_result(None)
        return done

    monkeypatch.setattr(Sending, "_announce", announced)
    tensors = weights | ({"d": torch.ones(7), "e": weights["a"]} if copied else {})
    context: Any = SimpleNamespace(spans=SpanRecorder(0), left=5.0, closed=threading.Event())
    sending = Sending(context, {})
    storages = frozenset(one.untyped_storage().data_ptr() for one in weights.values())

    def ready() -> tuple[str, Contents] | None:
        return ("u", {}) if not ready_after or ready_after in seen else None

    pairs = [(meta_of(name, tensor), tensor) for name, tensor in tensors.items()]
    sending.split_shareable(sink, pairs, storages, ready)
    # One batch is always left for the device, and another one is not complete.
    first = ["a", "b", "c", *(["u 0: a"] if ready_after != "never" else [])]
    assert seen == first
    sending.send("u", sink, 1024)
    buckets = [one for one in seen if ":" in one]
    if copied:
        # Slots are numbered as buckets are, so none is announced while one is filled.
        assert [one[2:] for one in buckets[: len(first) - 3]] == ["0: a"] * (len(first) - 3)
        assert buckets[len(first) - 3] == f"u {len(first) - 3}: d"
    assert sorted("".join(one.rpartition(" ")[2] for one in buckets)) == sorted(tensors)
    assert [int(one[2]) for one in buckets] == list(range(len(tensors)))
    assert sorted(meta.name for meta, _ in sending.report.entries) == sorted(tensors)


def test_a_worker_sees_when_the_trainer_revokes_its_memory(
    simulated: CudaRuntime, weights: dict[str, torch.Tensor]
) -> None:
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    bucket = bucket_of(sink, weights)
    source = source_of(sink, "GPU-1")
    shown = source.sharing.stamp()
    assert int(shown) == bucket.stamp != 0
    assert sink.sharing.first_changed() is None
    weights["c"].add_(1)
    assert sink.sharing.first_changed() == "c"
    sink.sharing.revoke()
    assert int(shown) == 0
    assert sink.sharing.first_changed() is None
    assert bucket_of(sink, weights).stamp not in (0, bucket.stamp)
    source.close()


def test_a_tensor_that_cannot_be_shared_is_refused(simulated: CudaRuntime, weights: dict[str, torch.Tensor]) -> None:
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    assert sink.sharing.can_share(weights["a"])
    assert not sink.sharing.offer(meta_of("a", weights["a"][1:]), weights["a"][1:])
    assert list(sink.sharing.announcements()) == []
    assert not sink.sharing.can_share(weights["a"].t()), "not contiguous"
    assert not sink.sharing.can_share(weights["a"][1:]), "not on a row of the digest"
    assert not sink.sharing.can_share(torch.ones(64)), "not in an allocation that has a handle"
    assert not sink.sharing.can_share(weights["a"][:0])


def test_memory_outside_of_an_allocation_is_refused(simulated: CudaRuntime, weights: dict[str, torch.Tensor]) -> None:
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    bucket = bucket_of(sink, weights)
    far = msgspec.structs.replace(bucket.segments[0], offset=8192 - 256)
    for device_id in ("GPU-1", "GPU-2"):
        source = source_of(sink, device_id)
        with pytest.raises(ValueError, match="does not lie inside"):
            read(source, msgspec.structs.replace(bucket, segments=(far,)))
        source.close()


def test_idle_memory_is_closed_and_opened_again(
    simulated: CudaRuntime, library: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc_memory, "_IDLE_SECONDS", 0.2)
    sink = CudaIpcSink(1, Gpu(), 1024, 1024)  # type: ignore[arg-type]
    bucket = bucket_of(sink, weights)
    opened = counter(library, "opened")
    source = source_of(sink, "GPU-1")
    found = read(source, bucket)
    eventually(lambda: counter(library, "opened") == opened + 2)  # what is staged is in use
    del found
    assert counter(library, "opened") == opened
    assert read(source, bucket).keys() == weights.keys(), "it is opened again"
    source.close()
