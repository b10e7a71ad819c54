"""Checkpoints: the names, shapes and dtypes in safetensors headers, read without reading the tensors."""

from __future__ import annotations

import difflib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..errors import NotACheckpoint
from ..protocol import TensorMeta

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping

# safetensors' names of dtypes (its README, "Format") and torch's.
_DTYPES = {
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
# Dtypes in which an engine may compute, and so may take a tensor instead of the checkpoint's dtype.
FLOATS = frozenset({"float64", "float32", "bfloat16", "float16"})
_LONGEST_HEADER = 100 << 20  # safetensors' own limit


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def files(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the safetensors files of a Hugging Face checkpoint directory, as its index names them.

    Raises:
        NotACheckpoint: there are none, or a file that the index names is missing.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise NotACheckpoint(f"{folder} is not a directory (on this node)")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise NotACheckpoint(f"{index} is no safetensors index: {error}") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise NotACheckpoint(f"{folder}: {missing[0]}, which the index names, is missing")
        return [folder / name for name in names]
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not found:
        raise NotACheckpoint(f"{folder} holds no *.safetensors file: it is not a checkpoint that engines can load")
    return found


def read_header(file: Path) -> Iterator[TensorMeta]:
    """Yield the tensors of one safetensors file.

    Raises:
        NotACheckpoint: it is truncated, or no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                raise NotACheckpoint(f"{file} is not a safetensors file")
            header = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
        size = file.stat().st_size - 8 - length
    except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise NotACheckpoint(f"{file} cannot be read as safetensors: {error}") from None
    for name, entry in entries.items():
        if entry.data_offsets[1] > size:
            raise NotACheckpoint(
                f"{file} is truncated: {name} lies beyond its end; wait until it is completely written"
            )
        if entry.dtype not in _DTYPES:
            raise NotACheckpoint(f"{file}: {name} has dtype {entry.dtype}, which is not supported")
        yield TensorMeta(name, _DTYPES[entry.dtype], entry.shape)


def folder(model: str, revision: str | None = None) -> str:
    """Return a checkpoint's directory: ``model`` itself, or a hub model's directory in the local cache.

    Raises:
        NotACheckpoint: there is neither.
    """
    if Path(model).is_dir():
        return model
    try:
        from huggingface_hub import snapshot_download

        cached: str = snapshot_download(model, revision=revision, local_files_only=True)
    except Exception as error:
        raise NotACheckpoint(f"{model} is neither a directory nor in the local hub cache: {error}") from None
    return cached


def describe(model: str, revision: str | None = None) -> list[TensorMeta]:
    """Return the tensors of a checkpoint directory, or of a hub model in the local cache.

    Raises:
        NotACheckpoint: there is no complete safetensors checkpoint.
    """
    return [tensor for file in files(folder(model, revision)) for tensor in read_header(file)]


def contents(directory: str | os.PathLike[str]) -> dict[str, tuple[TensorMeta, int]]:
    """Return each tensor of a checkpoint directory with the digest of its bytes. This reads all of it.

    Raises:
        NotACheckpoint: it is none, or truncated.
    """
    from safetensors import safe_open

    from . import digest

    known: dict[str, tuple[TensorMeta, int]] = {}
    for file in files(directory):
        metas = list(read_header(file))
        with safe_open(file, framework="pt") as tensors:
            values = digest.digests_of(tensors.get_tensor(meta.name) for meta in metas)
        known.update({meta.name: (meta, value) for meta, value in zip(metas, values, strict=True)})
    return known


def mismatch_reason(tensor: TensorMeta, expected: Mapping[str, TensorMeta], dtypes: Iterable[str]) -> str | None:
    """Return why engines whose checkpoint is ``expected`` cannot load ``tensor``; None if they can.

    Args:
        tensor: the tensor to be sent.
        expected: the checkpoint's tensors by name.
        dtypes: dtypes that the engines accept in place of a floating-point dtype of the checkpoint, such as the one that
            they compute in. A quantized tensor (int8, float8) is accepted in its own dtype only.
    """
    if (known := expected.get(tensor.name)) is None:
        near = difflib.get_close_matches(tensor.name, expected, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{tensor.name} is not a weight of the engines' checkpoint ({len(expected)} tensors){hint}"
    if tensor.shape != known.shape:
        return f"{tensor.name} has shape {list(tensor.shape)}, the engines' checkpoint {list(known.shape)}"
    if tensor.dtype != known.dtype and not (known.dtype in FLOATS and tensor.dtype in dtypes):
        castable = known.dtype in FLOATS and tensor.dtype in FLOATS
        hint = "send with dtype='auto'" if castable else f"send it as {known.dtype}"
        return f"{tensor.name} has dtype {tensor.dtype}, the engines' checkpoint {known.dtype}: {hint}"
    return None


def missing_reason(sent: Iterable[str], expected: Mapping[str, TensorMeta]) -> str | None:
    """Return a message that names ``expected`` tensors that were not sent; None if all were."""
    absent = sorted(set(expected) - set(sent))
    if not absent:
        return None
    more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
    return f"{len(absent)} of {len(expected)} tensors are missing: {', '.join(absent[:3])}{more}"
