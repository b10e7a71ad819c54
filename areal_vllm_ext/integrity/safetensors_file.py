"""A safetensors file that is opened once and read by position, so that it stays the same file while it is read.

A mapped file would show whatever is written to it meanwhile, and would end the process if the file got shorter.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from typing import TYPE_CHECKING

import msgspec

from ..errors import NotACheckpoint
from ..protocol import TensorMeta

if TYPE_CHECKING:
    from pathlib import Path

    import torch

# safetensors' names of dtypes (its README, "Format") and torch's.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LONGEST_HEADER = 100 << 20  # safetensors' own limit
# At most this many bytes go into one call: Linux reads no more than 2 GiB at once.
_READ_BYTES = 1 << 30


def read_file(path: Path) -> bytes:
    """Return the bytes of a small file. Nothing else is read: not a pipe, which would block, nor a device, which has no end.

    Raises:
        OSError: it cannot be read, or is no regular file of that size.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LONGEST_HEADER:
            raise OSError(f"it is no regular file of at most {_LONGEST_HEADER >> 20} MiB")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(_LONGEST_HEADER)
    finally:
        os.close(descriptor)


def _dtype(meta: TensorMeta) -> torch.dtype:
    import torch  # late: an engine core asks for directories that may not exist, and needs no tensor

    dtype: torch.dtype = getattr(torch, meta.dtype)
    return dtype


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """An open safetensors file.

    Attributes:
        path: its name.
        tensors: the tensors in it, by name.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            NotACheckpoint: it cannot be read, is truncated, or is no safetensors file.
        """
        self.path = path
        self._descriptor = -1
        try:
            # Not blocking, because the name may be a pipe's.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self._entries = self._read_header(os.fstat(self._descriptor))
        except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            self.close()
            raise NotACheckpoint(f"{path} cannot be read as safetensors: {error}") from None
        except NotACheckpoint:
            self.close()
            raise
        self.tensors = {name: meta for name, (meta, _) in self._entries.items()}

    def _read_header(self, found: os.stat_result) -> dict[str, tuple[TensorMeta, int]]:
        """Return each tensor with its position in the file."""
        if not stat.S_ISREG(found.st_mode):
            raise NotACheckpoint(f"{self.path} is not a file")
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        if length > _LONGEST_HEADER:
            raise NotACheckpoint(f"{self.path} is not a safetensors file")
        if 8 + length > found.st_size:
            raise NotACheckpoint(f"{self.path} is truncated within its header; wait until it is completely written")
        header = msgspec.json.decode(os.pread(self._descriptor, length, 8), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {}
        for name, raw in header.items():
            entry = msgspec.json.decode(raw, type=_Entry)
            if entry.dtype not in DTYPES:
                raise NotACheckpoint(f"{self.path}: {name} has dtype {entry.dtype}, which is not supported")
            meta = TensorMeta(name, DTYPES[entry.dtype], entry.shape)
            start, end = entry.data_offsets
            if min(start, end, *entry.shape) < 0 or end - start != math.prod(entry.shape) * _dtype(meta).itemsize:
                raise NotACheckpoint(f"{self.path}: {name} does not have the size of its shape and dtype")
            if 8 + length + end > found.st_size:
                raise NotACheckpoint(
                    f"{self.path} is truncated: {name} lies beyond its end; wait until it is completely written"
                )
            entries[name] = meta, 8 + length + start
        return entries

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Raises:
            NotACheckpoint: the file has become shorter, or cannot be read.
        """
        meta, position = self._entries[name]
        import torch

        dtype = _dtype(meta)
        tensor = torch.empty(math.prod(meta.shape) * dtype.itemsize, dtype=torch.uint8)
        left = memoryview(tensor.numpy())  # type: ignore[arg-type]
        while left:
            try:
                count = os.preadv(self._descriptor, [left[:_READ_BYTES]], position)
            except OSError as error:
                raise NotACheckpoint(f"{self.path}: {name} cannot be read: {error}") from None
            if not count:
                raise NotACheckpoint(f"{self.path} became shorter while it was read")
            left, position = left[count:], position + count
        return tensor.view(dtype).view(meta.shape)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
