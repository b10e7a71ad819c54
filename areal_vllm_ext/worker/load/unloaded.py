"""Which parameters a load leaves without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .strides import storage_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.multiprocessing.reductions import StorageWeakRef


def load_and_find_unloaded(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Load ``weights`` by the model's own loaders, and return the parameters to which nothing was written.

    Parameters of one element are left out: they are defaults, such as the scales of a KV cache.
    """
    before = {name: storage_key(parameter) for name, parameter in model.named_parameters()}
    with _Writes() as writes:
        model.load_weights(iter(weights))
    # A loader may also give a parameter other memory.
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() > 1 and (key := storage_key(parameter)) == before.get(name) and key not in writes.storages
    ]


def described(unloaded: list[str]) -> str:
    """Return one line that names the first of these parameters."""
    more = f" and {len(unloaded) - 3} more" if len(unloaded) > 3 else ""
    return f"{len(unloaded)} parameters of the model get no weights: {', '.join(unloaded[:3])}{more}"


class _Writes(TorchDispatchMode):
    """Records to which storages operators write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for argument, value in zip(func._schema.arguments, args, strict=False):  # noqa: SLF001
            if isinstance(value, torch.Tensor) and argument.alias_info is not None and argument.alias_info.is_write:
                self.storages.add(storage_key(value))
        return result
