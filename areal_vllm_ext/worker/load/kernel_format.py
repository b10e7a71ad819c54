"""The live model as its kernels read it: all that a worker of equal layout needs to serve the same weights, unconverted.

- Parameters and buffers, each place in memory once.
- Attributes that a load made of weights (MLA's projections). Which ones these are is known where a shadow was loaded.
- On a CPU, weights that vLLM has packed for oneDNN. No tensor shows them, so the layer is asked: it answers a unit vector with
  a column of the weight, without rounding. Two threads must not use one oneDNN handle, so that is done between two steps.

Tensors and numbers elsewhere in the model are not sent. They must be equal, or the fetch is refused.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...integrity import digest
from ...integrity.digest_torch import as_bytes
from ...protocol import TensorMeta
from ...transport.buckets import meta_of
from . import twins
from .cpu_packing import ATTRIBUTE, pack
from .proof import is_handed_over, readable
from .strides import storage_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ...protocol.peer_messages import HeldKind

# Parts of a path that hold what generation computes.
_COMPUTED = {"kv_cache", "kv_caches", "ssm_state", "conv_state", "workspace"}
# Multiplications of one call that reads packed weights: some milliseconds between two steps.
_MOST_PRODUCTS = 1 << 28


class NotReadable(RuntimeError):
    """The weights of this model cannot be read as kernels read them; the message says why."""


class Part(NamedTuple):
    """One tensor of a model: its kind, and the tensor, or the layer whose packed weight it is."""

    kind: HeldKind
    meta: TensorMeta
    tensor: torch.Tensor | None
    layer: Any = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.meta.shape).numel() * dtype_of(self.meta).itemsize


def dtype_of(meta: TensorMeta) -> torch.dtype:
    """Return the dtype that ``meta`` names."""
    dtype: torch.dtype = getattr(torch, meta.dtype)
    return dtype


def parts(model: torch.nn.Module, made: Collection[str]) -> dict[str, Part]:
    """Return all parts of ``model`` by name.

    Args:
        model: the live model.
        made: paths of attributes that a load makes of weights.

    Raises:
        NotReadable: a kernel keeps a weight that nothing shows.
    """
    found: dict[str, Part] = {}
    places = set()
    for name, tensor in readable(model).items():
        place = (storage_key(tensor), int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place not in places:
            places.add(place)
            found[name] = Part("tensor", meta_of(name, tensor), tensor)
    layers = {
        id(layer): name for name, layer in reversed(twins.modules_by_name(model).items())
    }  # of two names, the first
    for name, layer in twins.modules_by_name(model).items():
        if is_handed_over(layer):
            raise NotReadable(f"a kernel has taken the weight of {name}, and shows it to nobody")
        if is_packed(layer) and layers[id(layer)] == name:
            dtype = str(_packed_dtype(layer)).removeprefix("torch.")
            meta = TensorMeta(f"{name} (packed)", dtype, packed_shape(layer))
            found[meta.name] = Part("packed", meta, None, layer)
    for path, value in _attributes(model):
        if isinstance(value, torch.Tensor) and path in made:
            found[path] = Part("attribute", meta_of(path, value), value)
    return found


def elsewhere(model: torch.nn.Module, made: Collection[str]) -> dict[str, int]:
    """Return digests of the tensors and numbers in ``model`` that are neither weights nor ``made`` of them, by path."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, int] = {}
    for path, value in _attributes(model):
        if isinstance(value, torch.Tensor):
            if path not in made:
                tensors[path] = value
        else:
            packed = hashlib.blake2b(struct.pack("<d", value), digest_size=8).digest()
            values[path] = int.from_bytes(packed, "little")
    return values | dict(zip(tensors, digest.digests_of(tensors.values()), strict=True))


def _attributes(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor | float]]:
    weights = {storage_key(tensor) for tensor in readable(model).values()}
    for leaf in twins.leaves(model):
        if _COMPUTED.intersection(leaf.path.split(".")) or twins.is_assigned(leaf):
            continue
        if isinstance(leaf.value, torch.Tensor):
            if leaf.value.numel() and not leaf.value.is_meta and storage_key(leaf.value) not in weights:
                yield leaf.path, leaf.value
        elif isinstance(leaf.value, float):
            yield leaf.path, leaf.value


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a live tensor in row-major order: its own memory where it is contiguous, else a copy."""
    return as_bytes(tensor.detach()).view(-1)


# Packed weights


def is_packed(layer: Any) -> bool:
    """Return whether a layer computes with a weight that no tensor shows."""
    linear = getattr(layer, ATTRIBUTE, None)
    return linear is not None and linear is not torch.nn.functional.linear


def packed_shape(layer: Any) -> tuple[int, int]:
    """Return columns and rows of a packed weight. It is read, and sent, column by column."""
    weight = layer.weight
    if weight is not None and weight.numel():
        return int(weight.shape[1]), int(weight.shape[0])
    columns = getattr(layer, "input_size_per_partition", None) or layer.input_size
    rows = getattr(layer, "output_size_per_partition", None) or layer.output_size
    return int(columns), int(rows)


def _packed_dtype(layer: Any) -> torch.dtype:
    dtype: torch.dtype = layer.params_dtype if layer.weight is None else layer.weight.dtype
    return dtype


def columns_at_once(layer: Any) -> int:
    """Return how many columns a call between two steps reads."""
    columns, rows = packed_shape(layer)
    return max(1, min(columns, _MOST_PRODUCTS // (columns * rows)))


def read_columns(layer: Any, start: int, count: int) -> torch.Tensor:
    """Return columns of a packed weight, one in each row. Only between two steps of the engine."""
    columns, _ = packed_shape(layer)
    inputs = torch.zeros(count, columns, dtype=_packed_dtype(layer))
    inputs[range(count), range(start, start + count)] = 1
    with torch.inference_mode():
        read: torch.Tensor = layer.quant_method.apply(layer, inputs)
    return read


def pack_columns(columns: torch.Tensor) -> Any:
    """Return the function that computes with a weight of these columns. Safe on any thread."""
    return pack(columns.t().contiguous())
