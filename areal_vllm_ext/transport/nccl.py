"""NCCL with deadlines: a non-blocking communicator, through ctypes on the libnccl that torch has loaded.

Every call returns at once, perhaps with "in progress". ``settled`` says when it is done, and raises if it failed. So a caller
can stop waiting and abort: a peer that dies in the handshake or during a broadcast costs a deadline, not the process.

vLLM's pynccl cannot do this: it blocks in ``ncclCommInitRank``. torch's ProcessGroupNCCL ends the process when it aborts.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_UNDEFINED = -(2**31)
_UNIQUE_ID_BYTES = 128
# The first version with all fields of _Config and with non-blocking communicators that can be aborted in their handshake.
_OLDEST = 21800
# An abort takes some milliseconds. An abort that hangs (on a device that no longer answers) is left to its thread.
_ABORT_SECONDS = 2.0


class _Config(ctypes.Structure):
    """``ncclConfig_t`` as of 2.17. NCCL only appends fields, and uses defaults for those that a caller's version lacks.

    ``traffic_class`` came with 2.25 in place of padding. It is set here, so that no version reads a zero there.
    """

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("traffic_class", ctypes.c_int),
    )

    @classmethod
    def non_blocking(cls) -> _Config:
        others = [_UNDEFINED, _UNDEFINED, _UNDEFINED, None, _UNDEFINED, _UNDEFINED]
        return cls(ctypes.sizeof(cls), 0xCAFEBEEF, 21700, 0, *others)


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _UNIQUE_ID_BYTES),)


_Comm = ctypes.c_void_p
_FUNCTIONS: dict[str, list[Any]] = {
    "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
    "ncclCommInitRankConfig": [
        ctypes.POINTER(_Comm),
        ctypes.c_int,
        _UniqueId,
        ctypes.c_int,
        ctypes.POINTER(_Config),
    ],
    "ncclCommGetAsyncError": [_Comm, ctypes.POINTER(ctypes.c_int)],
    "ncclBroadcast": [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        _Comm,
        ctypes.c_void_p,
    ],
    "ncclCommAbort": [_Comm],
}


class Nccl:
    """NCCL's functions."""

    def __init__(self, path: str) -> None:
        """Load the library.

        Args:
            path: the library, or its name if the process has loaded it already.

        Raises:
            RuntimeError: it cannot be loaded, or its version is not supported.
        """
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(
                f"NCCL cannot be loaded ({error}): use transport='shared_memory' or a checkpoint"
            ) from None
        self._call: dict[str, Any] = {}
        for name, argument_types in _FUNCTIONS.items():
            # Indexing returns a new object, so no other code of the process changes its types.
            try:
                self._call[name] = library[name]
            except AttributeError:
                raise RuntimeError(f"{path} has no {name}: NCCL 2.18 or later is needed") from None
            self._call[name].argtypes, self._call[name].restype = argument_types, ctypes.c_int
        for name in ("ncclGetErrorString", "ncclGetLastError"):
            self._call[name] = library[name]
            self._call[name].restype = ctypes.c_char_p
        self._call["ncclGetErrorString"].argtypes = [ctypes.c_int]
        self._call["ncclGetLastError"].argtypes = [_Comm]
        version = ctypes.c_int()
        self.check(self._call["ncclGetVersion"](ctypes.byref(version)), "ncclGetVersion")
        if not _OLDEST <= version.value < 30000:
            raise RuntimeError(
                f"this NCCL's version code is {version.value}; 2.18 or a later 2.x is needed (21800 to 29999)"
            )

    def check(self, result: int, what: str) -> None:
        """Raise for a result that is neither success nor in progress."""
        if result not in (_SUCCESS, _IN_PROGRESS):
            meaning = self._call["ncclGetErrorString"](result).decode(errors="replace")
            # Its last warning, of any communicator of the process, says what it ran into (other versions, no route, ...).
            warning = (self._call["ncclGetLastError"](None) or b"").decode(errors="replace").strip()
            raise RuntimeError(f"{what}: {meaning}{f' ({warning})' if warning else ''}")

    def unique_id(self) -> str:
        """Return a new rendezvous in hexadecimal. This process must be rank 0 there."""
        made = _UniqueId()
        self.check(self._call["ncclGetUniqueId"](ctypes.byref(made)), "ncclGetUniqueId")
        return bytes(made).hex()

    def join(self, unique_id: str, rank: int, size: int) -> Communicator:
        """Start to join the other ranks at ``unique_id`` with the current device. Usable once it has ``settled``."""
        raw = bytes.fromhex(unique_id)
        if len(raw) != _UNIQUE_ID_BYTES:
            raise ValueError(f"NCCL's unique id has {_UNIQUE_ID_BYTES} bytes, not {len(raw)}")
        comm, config = _Comm(), _Config.non_blocking()
        result = self._call["ncclCommInitRankConfig"](
            ctypes.byref(comm), size, _UniqueId.from_buffer_copy(raw), rank, ctypes.byref(config)
        )
        if not comm.value:
            self.check(result, "NCCL cannot join the trainer's communicator")
        return Communicator(self._call, self.check, comm)


class Communicator:
    """One rank. Not safe to use from several threads at once."""

    def __init__(self, call: dict[str, Any], check: Any, comm: Any) -> None:
        self._call, self._check, self._comm = call, check, comm

    def settled(self) -> bool:
        """Return whether the last call is done (a broadcast: whether it is on its stream).

        Raises:
            RuntimeError: it failed here or at a peer.
        """
        state = ctypes.c_int()
        self._check(self._call["ncclCommGetAsyncError"](self._comm, ctypes.byref(state)), "NCCL")
        self._check(state.value, "NCCL")
        return state.value == _SUCCESS

    def broadcast(self, address: int, nbytes: int, stream: int) -> None:
        """Start to send (rank 0) or receive ``nbytes`` bytes at ``address`` of the device, on a CUDA stream."""
        result = self._call["ncclBroadcast"](address, address, nbytes, _UINT8, 0, self._comm, stream)
        self._check(result, "NCCL cannot broadcast")

    def abort(self) -> None:
        """End this rank at once. ncclCommDestroy would wait for the other ranks, and one may be dead."""
        comm, self._comm = self._comm, None
        if comm is None:
            return
        thread = threading.Thread(target=self._call["ncclCommAbort"], args=(comm,), name="areal-abort", daemon=True)
        thread.start()
        thread.join(_ABORT_SECONDS)


@functools.cache
def load() -> Nccl:
    """Return the process's NCCL: torch's, unless vLLM's VLLM_NCCL_SO_PATH names another.

    Raises:
        RuntimeError: there is none.
    """
    import torch

    name = "librccl.so.1" if torch.version.hip else "libnccl.so.2"
    return Nccl(os.environ.get("VLLM_NCCL_SO_PATH") or name)
