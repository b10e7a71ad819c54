"""CUDA IPC: trainer and workers on one host, the best when on one GPU. Two slots of device memory: the trainer fills one
while the workers copy the other, each into staging of its own.

The slots are allocated apart (``cudaMalloc``), not by torch: a handle names a whole allocation, torch's are parts of larger
ones that it uses again, and with expandable segments they have no handle at all.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..protocol import Bucket, CudaIpc
from . import watch

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from ..worker.receiver import Receiver

_HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_COPY_KIND = 4  # cudaMemcpyDefault: from device to device, wherever each is


def device_id(device: torch.device) -> str:
    """A name of the device that trainer and worker agree on: the GPU's UUID, or ``cpu``.

    Never its index: ``CUDA_VISIBLE_DEVICES`` gives one GPU another index in each process.
    """
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def host_id() -> str:
    """A name of this host that all containers on it agree on: its kernel's boot id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


_FUNCTIONS: dict[str, list[Any]] = {
    "cudaMalloc": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t],
    "cudaFree": [ctypes.c_void_p],
    "cudaIpcGetMemHandle": [ctypes.POINTER(_Handle), ctypes.c_void_p],
    "cudaIpcOpenMemHandle": [ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint],
    "cudaIpcCloseMemHandle": [ctypes.c_void_p],
    "cudaMemcpyAsync": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p],
    "cudaGetLastError": [],
}


class CudaRuntime:
    """The functions of the CUDA runtime that torch does not offer. They work on the current device."""

    def __init__(self, path: str) -> None:
        """
        Args:
            path: the library, or its name where the process has loaded it already.

        Raises:
            RuntimeError: it cannot be loaded.
        """
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(f"the CUDA runtime cannot be loaded ({error}): use transport='shared_memory'") from None
        self._call: dict[str, Any] = {}
        for name, argument_types in _FUNCTIONS.items():
            self._call[name] = library[name]
            self._call[name].argtypes, self._call[name].restype = argument_types, ctypes.c_int
        self._describe = library["cudaGetErrorString"]
        self._describe.argtypes, self._describe.restype = [ctypes.c_int], ctypes.c_char_p

    def allocate(self, nbytes: int) -> Memory:
        """Device memory that can be shared."""
        address = ctypes.c_void_p()
        self._check("cudaMalloc", ctypes.byref(address), nbytes)
        return Memory(address.value or 0, nbytes, functools.partial(self._call["cudaFree"], address))

    def share(self, memory: Memory) -> bytes:
        """The handle by which another process can open ``memory``."""
        handle = _Handle()
        self._check("cudaIpcGetMemHandle", ctypes.byref(handle), memory.address)
        return bytes(handle)

    def open(self, handle: bytes, nbytes: int) -> Memory:
        """Memory of another process."""
        if len(handle) != _HANDLE_BYTES:
            raise ValueError(f"a handle of CUDA memory has {_HANDLE_BYTES} bytes, not {len(handle)}")
        address = ctypes.c_void_p()
        self._check(
            "cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), _ENABLE_PEER_ACCESS
        )
        return Memory(address.value or 0, nbytes, functools.partial(self._call["cudaIpcCloseMemHandle"], address))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Begin to copy, on a CUDA stream."""
        self._check("cudaMemcpyAsync", to, source, nbytes, _COPY_KIND, stream)

    def _check(self, name: str, *arguments: Any) -> None:
        if result := self._call[name](*arguments):
            # Taken, so that torch does not find it at its next call and blame that one.
            self._call["cudaGetLastError"]()
            raise RuntimeError(f"{name}: {self._describe(result).decode(errors='replace')}")


class Memory:
    """Device memory that ends with its last user: this object and the tensors made of it."""

    def __init__(self, address: int, nbytes: int, free: Callable[[], object]) -> None:
        self.address, self.nbytes = address, nbytes
        self._free = free
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}

    def __del__(self) -> None:
        self._free()


@functools.cache
def load() -> CudaRuntime:
    """The CUDA runtime that torch uses.

    Raises:
        RuntimeError: there is none.
    """
    if torch.version.cuda is None:
        raise RuntimeError("transport 'ipc' needs a torch for CUDA: use transport='broadcast' or 'shared_memory'")
    return CudaRuntime(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")


# What this process shares, by handle: CUDA refuses to open it here, where a worker of an in-process engine needs it.
_own: dict[bytes, Memory] = {}


class CudaIpcSource:
    """The worker's end."""

    # Opened for each update: what is kept open keeps a dead trainer's device memory.
    reusable = False
    unchecked = False
    nbytes = 0

    def __init__(self, transfer: CudaIpc, receiver: Receiver) -> None:
        """Open the trainer's memory.

        Raises:
            RuntimeError: this worker cannot reach it.
        """
        self._device = receiver.device
        if self._device.type != "cuda":
            raise RuntimeError(
                f"transport 'ipc' brings weights to GPUs, and this worker runs on {self._device}: use transport='broadcast'"
            )
        if transfer.host != host_id():
            raise RuntimeError("the trainer is on another host: use transport='broadcast'")
        if transfer.device_id != device_id(self._device):
            _check_peer(self._device, transfer.device_id)
        self._runtime = load()
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream(self._device)
            try:
                opened = _own.get(transfer.handle) or self._runtime.open(transfer.handle, transfer.nbytes)
            except RuntimeError as error:
                raise RuntimeError(
                    f"the trainer's memory on GPU {transfer.device_id} cannot be opened ({error}): is the trainer gone, in "
                    "a container of its own, or without peer access? Else use transport='broadcast' or 'shared_memory'"
                ) from None
        self._memory: Memory | None = opened

    def receive(self, bucket: Bucket, timeout: float, cancelled: threading.Event) -> torch.Tensor:
        assert self._memory is not None
        if min(bucket.location, bucket.nbytes) < 0 or bucket.location + bucket.nbytes > self._memory.nbytes:
            raise ValueError("the bucket does not lie inside the trainer's memory")
        with torch.cuda.device(self._device):
            buffer = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
            buffer.record_stream(self._stream)  # an update that is given up frees it while the copy runs
            self._stream.wait_stream(torch.cuda.current_stream())
            source = self._memory.address + bucket.location
            self._runtime.copy(buffer.data_ptr(), source, bucket.nbytes, self._stream.cuda_stream)
            done = torch.cuda.Event()
            done.record(self._stream)
            watch(done.query, timeout, cancelled.is_set)
        return buffer

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        # Not under a copy that still runs: a GPU that reads memory that is gone is of no use to its engine any more.
        self._stream.synchronize()
        self._memory = None


def _check_peer(device: torch.device, other: str) -> None:
    """Refuse a GPU that ``device`` cannot read. One that is not visible to this process is not known, and tried."""
    for index in range(torch.cuda.device_count()):
        if device_id(torch.device("cuda", index)) == other and not torch.cuda.can_device_access_peer(device, index):
            raise RuntimeError(
                f"this worker's {device} cannot read the memory of the trainer's GPU {other}: use transport='broadcast'"
            )


class CudaIpcSink:
    """The trainer's end."""

    slots = 2
    announced_is_sent = True

    def __init__(self, engines: int, device: torch.device, bucket_bytes: int, slot_bytes: int) -> None:
        """Allocate the slots; they are kept from one update to the next.

        Args:
            engines: how many engines will be told of them.
            device: the trainer's device.
            bucket_bytes: size of a bucket.
            slot_bytes: the largest bucket, which a large tensor has for itself.

        Raises:
            RuntimeError: the device is no GPU, or has no room.
        """
        if device.type != "cuda":
            raise RuntimeError(
                f"transport 'ipc' sends from a GPU, and these weights are on {device}: use 'shared_memory'"
            )
        runtime = load()
        with torch.cuda.device(device):
            torch.cuda.empty_cache()  # what torch keeps in reserve is room too
            try:
                memory = runtime.allocate(self.slots * slot_bytes)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{device} has no room for two slots of {slot_bytes >> 20} MiB ({error}): use a smaller bucket_mib"
                ) from None
            self._handle = runtime.share(memory)
            self._memory: torch.Tensor | None = torch.as_tensor(memory, device=device)
        _own[self._handle] = memory
        transfer = CudaIpc(host=host_id(), device_id=device_id(device), handle=self._handle, nbytes=memory.nbytes)
        self.transfers = [transfer] * engines
        self.bucket_bytes = bucket_bytes
        self._slot_bytes = slot_bytes

    def meet(self, opening: Future[None]) -> None:
        opening.result()

    def buffer(self, index: int, nbytes: int) -> tuple[int, torch.Tensor]:
        assert self._memory is not None
        if nbytes > self._slot_bytes:
            raise RuntimeError(f"a tensor of {nbytes >> 20} MiB is larger than every tensor of the engines' checkpoint")
        start = (index % self.slots) * self._slot_bytes
        return start, self._memory[start : start + nbytes]

    def push(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> None:
        """Nothing to do: announced is sent."""

    def release(self) -> None:
        """The memory is kept: workers have it open until they have switched."""

    def close(self) -> None:
        _own.pop(self._handle, None)
        self._memory = None
