"""The handles of vLLM's IPC trainer engine as values that msgpack carries. Both ends are here, and no pickle.

``torch.multiprocessing.reductions.reduce_tensor`` gives the arguments of ``rebuild_cuda_tensor``: numbers, bytes, a dtype and
two classes. The last two kinds become names out of a fixed table.
"""

from __future__ import annotations

from typing import Any

import torch

_KEY = "areal_torch"
_CLASSES: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "Parameter": torch.nn.Parameter,
    "UntypedStorage": torch.UntypedStorage,
    "TypedStorage": torch.storage.TypedStorage,
}
_NAMES = {known: name for name, known in _CLASSES.items()}


def to_plain(value: Any) -> Any:
    """Return ``value`` with dtypes and classes of torch replaced by their names.

    Raises:
        TypeError: a value is of a kind that handles do not have.
    """
    if isinstance(value, dict):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(one) for one in value]
    if isinstance(value, torch.dtype):
        return {_KEY: str(value).removeprefix("torch.")}
    if isinstance(value, type) and value in _NAMES:
        return {_KEY: _NAMES[value]}
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(f"msgpack cannot carry {type(value).__name__} in an update of vLLM's trainer engine")


def from_plain(value: Any) -> Any:
    """Return what ``to_plain`` was given; tuples come back as lists.

    Raises:
        ValueError: a name is not in the table.
    """
    if isinstance(value, list):
        return [from_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    if _KEY not in value:
        return {key: from_plain(one) for key, one in value.items()}
    name = value[_KEY]
    found = _CLASSES.get(name) if isinstance(name, str) else None
    found = found or (getattr(torch, name, None) if isinstance(name, str) else None)
    if found is None or not (isinstance(found, torch.dtype) or name in _CLASSES):
        raise ValueError(f"{name!r} is no dtype and no class that a handle has")
    return found
