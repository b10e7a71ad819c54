"""The functions of the CUDA runtime that torch does not offer, through ctypes on the library that torch has loaded."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_HANDLE_BYTES = 64
_ENABLE_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID
_COPY_KIND = 4  # cudaMemcpyDefault: between any two devices


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


class Memory:
    """Device memory that is freed with its last user: this object and the tensors made of it."""

    def __init__(self, address: int, nbytes: int, free: Callable[[], object]) -> None:
        self.address, self.nbytes = address, nbytes
        self._free = free
        # https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}

    def __del__(self) -> None:
        self._free()


class CudaRuntime:
    """The runtime's functions. They work on the current device."""

    def __init__(self, path: str, driver: str = "libcuda.so.1") -> None:
        """Load the library.

        Args:
            path: the library, or its name if the process has loaded it already.
            driver: the driver's library.

        Raises:
            RuntimeError: it cannot be loaded.
        """
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(f"the CUDA runtime cannot be loaded ({error}): use transport='shared_memory'") from None
        self._driver = driver
        self._call: dict[str, Any] = {}
        for name, argument_types in _FUNCTIONS.items():
            self._call[name] = library[name]
            self._call[name].argtypes, self._call[name].restype = argument_types, ctypes.c_int
        self._describe = library["cudaGetErrorString"]
        self._describe.argtypes, self._describe.restype = [ctypes.c_int], ctypes.c_char_p

    def allocate(self, nbytes: int) -> Memory:
        """Allocate device memory that can be shared."""
        address = ctypes.c_void_p()
        self._check("cudaMalloc", ctypes.byref(address), nbytes)
        return Memory(address.value or 0, nbytes, functools.partial(self._call["cudaFree"], address))

    def share(self, memory: Memory) -> bytes:
        """Return the handle by which another process can open ``memory``."""
        handle = _Handle()
        self._check("cudaIpcGetMemHandle", ctypes.byref(handle), memory.address)
        return bytes(handle)

    def open(self, handle: bytes, nbytes: int) -> Memory:
        """Open another process's memory."""
        if len(handle) != _HANDLE_BYTES:
            raise ValueError(f"a handle of CUDA memory has {_HANDLE_BYTES} bytes, not {len(handle)}")
        address = ctypes.c_void_p()
        self._check(
            "cudaIpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), _ENABLE_PEER_ACCESS
        )
        return Memory(address.value or 0, nbytes, functools.partial(self._call["cudaIpcCloseMemHandle"], address))

    def allocation(self, address: int) -> Memory:
        """Return the whole allocation that ``address`` lies in. The result does not own it."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        if self._address_range(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)):
            raise RuntimeError("cuMemGetAddressRange failed")
        return Memory(base.value, size.value, lambda: None)

    def allocation_id(self, address: int) -> int:
        """Return the number of the allocation at ``address``; this process never uses a number twice."""
        number = ctypes.c_ulonglong()
        if self._attribute(ctypes.byref(number), _BUFFER_ID, ctypes.c_uint64(address)):
            raise RuntimeError("cuPointerGetAttribute failed")
        return number.value

    @functools.cached_property
    def _address_range(self) -> Any:
        return ctypes.CDLL(self._driver).cuMemGetAddressRange_v2

    @functools.cached_property
    def _attribute(self) -> Any:
        return ctypes.CDLL(self._driver).cuPointerGetAttribute

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Start a copy on a CUDA stream."""
        self._check("cudaMemcpyAsync", to, source, nbytes, _COPY_KIND, stream)

    def _check(self, name: str, *arguments: Any) -> None:
        if result := self._call[name](*arguments):
            # Clear the error, because torch would report it for its own next call.
            self._call["cudaGetLastError"]()
            raise RuntimeError(f"{name}: {self._describe(result).decode(errors='replace')}")


@functools.cache
def load() -> CudaRuntime:
    """Return the CUDA runtime that torch uses.

    Raises:
        RuntimeError: there is none.
    """
    if torch.version.cuda is None:
        raise RuntimeError("transport 'ipc' needs a torch for CUDA: use transport='broadcast' or 'shared_memory'")
    return CudaRuntime(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
