"""CUDA IPC without a GPU: what is passed to C, whose memory ends when, and who is told to use another transport.

That the bytes arrive on a GPU is shown by benchmarks/gpu_smoke.py.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from areal_vllm_ext.protocol import CudaIpc
from areal_vllm_ext.transport import ipc
from areal_vllm_ext.transport.ipc import CudaIpcSink, CudaIpcSource, CudaRuntime

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
    return CudaRuntime(str(library))


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


def test_a_failure_is_told_and_left_to_nobody_else(runtime: CudaRuntime, library: Path) -> None:
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


# Who is told to use another transport

TRANSFER = CudaIpc(host=ipc.host_id(), device_id="GPU-1", handle=bytes(64), nbytes=8)


def receiver(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


def test_a_worker_without_a_gpu() -> None:
    with pytest.raises(RuntimeError, match="this worker runs on cpu: use transport='broadcast'"):
        CudaIpcSource(TRANSFER, receiver("cpu"))


def test_a_worker_on_another_host() -> None:
    other = CudaIpc(host="another", device_id="GPU-1", handle=bytes(64), nbytes=8)
    with pytest.raises(RuntimeError, match="on another host: use transport='broadcast'"):
        CudaIpcSource(other, receiver("cuda:0"))


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
