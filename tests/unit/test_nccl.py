"""NCCL on a simulated library: what C is called with, and that every wait ends."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from areal_vllm_ext.transport.base import Cancelled, watch
from areal_vllm_ext.transport.broadcast import BroadcastSink
from areal_vllm_ext.transport.nccl import Nccl

compiler = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(compiler is None, reason="needs a C compiler")


def build(folder: Path, version: int) -> Path:
    library = folder / f"libnccl-{version}.so"
    source = Path(__file__).with_name("simulated_nccl.c")
    assert compiler
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Werror", f"-DVERSION={version}", "-o", library, source], check=True
    )
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nccl"), 22907)


@pytest.fixture
def nccl(library: Path) -> Nccl:
    return Nccl(str(library))


def alive(library: Path) -> int:
    return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "alive").value


def unique_id(nccl: Nccl, behaviour: str) -> str:
    return behaviour.encode().hex() + nccl.unique_id()[2:]


def never() -> bool:
    return False


def test_a_handshake_is_done_after_some_polls_and_can_be_ended(nccl: Nccl, library: Path) -> None:
    comm = nccl.join(nccl.unique_id(), 1, 3)
    assert not comm.settled()
    watch(comm.settled, 1.0, never)
    assert alive(library) == 1
    comm.abort()
    comm.abort()
    assert alive(library) == 0


def test_a_broadcast_passes_bytes_of_the_device_on_a_stream(nccl: Nccl, library: Path) -> None:
    comm = nccl.join(nccl.unique_id(), 0, 2)
    watch(comm.settled, 1.0, never)
    comm.broadcast(0x7F0000001000, (1 << 32) + 8, 0x55AA0000F00D)
    assert not comm.settled(), "it is in progress: not yet on its stream"
    watch(comm.settled, 1.0, never)
    seen = ctypes.CDLL(str(library))
    assert ctypes.c_void_p.in_dll(seen, "last_address").value == 0x7F0000001000
    assert ctypes.c_size_t.in_dll(seen, "last_count").value == (1 << 32) + 8
    assert ctypes.c_void_p.in_dll(seen, "last_stream").value == 0x55AA0000F00D
    assert ctypes.c_int.in_dll(seen, "last_type").value == 1  # bytes
    assert ctypes.c_int.in_dll(seen, "last_root").value == 0
    comm.abort()


def test_a_handshake_that_hangs_ends_by_its_deadline(nccl: Nccl) -> None:
    comm = nccl.join(unique_id(nccl, "h"), 0, 2)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        watch(comm.settled, 0.3, never)
    assert 0.3 <= time.monotonic() - started < 0.8
    comm.abort()


def test_a_handshake_that_hangs_can_be_given_up_at_once(nccl: Nccl) -> None:
    comm = nccl.join(unique_id(nccl, "h"), 0, 2)
    cancelled = threading.Event()
    threading.Timer(0.1, cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        watch(comm.settled, 20.0, cancelled.is_set)
    assert time.monotonic() - started < 0.8
    comm.abort()


@pytest.mark.parametrize("behaviour", ["d", "b"])
def test_a_peer_that_dies_is_an_error_and_not_a_wait(nccl: Nccl, behaviour: str) -> None:
    comm = nccl.join(unique_id(nccl, behaviour), 0, 2)
    started = time.monotonic()
    if behaviour == "b":
        watch(comm.settled, 1.0, never)
        comm.broadcast(4096, 1, 0)
    with pytest.raises(RuntimeError, match=r"NCCL: remote error \(peer 1 has hung up\)"):
        watch(comm.settled, 20.0, never)
    assert time.monotonic() - started < 1.0
    comm.abort()


def test_a_join_that_is_refused_says_why(nccl: Nccl) -> None:
    with pytest.raises(RuntimeError, match="cannot join the trainer's communicator: invalid argument"):
        nccl.join(nccl.unique_id(), 5, 2)
    with pytest.raises(ValueError, match="has 128 bytes, not 2"):
        nccl.join("abcd", 0, 2)


@pytest.mark.parametrize("version", [21703, 2604, 30000])
def test_a_version_that_is_not_known_is_refused(tmp_path: Path, version: int) -> None:
    with pytest.raises(RuntimeError, match=rf"version code is {version}; 2\.18 or a later 2\.x"):
        Nccl(str(build(tmp_path, version)))


def test_a_library_that_is_not_there_or_is_not_nccl_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"NCCL cannot be loaded .*transport='shared_memory'"):
        Nccl("libnccl-that-is-nowhere.so")
    with pytest.raises(RuntimeError, match="has no ncclGetVersion"):
        Nccl("libc.so.6")


# The trainer's end


@pytest.fixture
def behaviour(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """torch's CUDA without a GPU, and how communicators of the library behave."""
    chosen = {"behaviour": "o"}
    nothing: Any = SimpleNamespace(
        wait_stream=lambda _: None, record=lambda _: None, query=lambda: False, cuda_stream=0x55AA
    )
    monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nothing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    simulated = SimpleNamespace(
        join=nccl.join, unique_id=lambda made=nccl.unique_id: chosen["behaviour"].encode().hex() + made()[2:]
    )
    monkeypatch.setattr("areal_vllm_ext.transport.nccl.load", lambda: simulated)
    return chosen


def sink_of(timeout: float) -> BroadcastSink:
    engines = {"engine a": [0, 1], "engine b": [0]}
    return BroadcastSink("nccl", engines, "127.0.0.1", torch.device("cuda", 0), 1024, timeout)


def opened() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def test_a_worker_that_cannot_join_ends_the_trainers_wait_at_once(behaviour: dict[str, str], library: Path) -> None:
    behaviour["behaviour"] = "h"
    sink = sink_of(20.0)
    opening: Future[None] = Future()
    threading.Timer(0.1, opening.set_exception, (RuntimeError("engine b has no room"),)).start()
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="engine b has no room"):
        sink.connect(opening)
    assert time.monotonic() - started < 1.0
    sink.close()
    assert alive(library) == 0


def test_ranks_that_do_not_join_in_time_are_said(behaviour: dict[str, str], library: Path) -> None:
    behaviour["behaviour"] = "h"
    sink = sink_of(0.3)
    with pytest.raises(TimeoutError, match=r"not all of 4 ranks joined NCCL's communicator within 0\.3 s"):
        sink.connect(Future())
    sink.close()
    assert alive(library) == 0


def test_bytes_that_do_not_get_through_are_said_and_end_the_communicator(
    behaviour: dict[str, str], library: Path
) -> None:
    sink = sink_of(5.0)
    sink.connect(opened())
    assert [transfer.established for transfer in sink.transfers] == [True, True]
    work = sink.start(torch.zeros(700, dtype=torch.uint8), 1.0, never)
    with pytest.raises(TimeoutError, match=r"700 bytes were not through NCCL within 0\.3 s"):
        work.wait(0.3, never)
    assert alive(library) == 0
    sink.close()
