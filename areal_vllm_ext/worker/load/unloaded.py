"""Which parameters a load leaves without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .strides import storage_key

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.multiprocessing.reductions import StorageWeakRef


def load_and_find_unloaded(
    model: Any, weights: Iterable[tuple[str, torch.Tensor]], partly: list[str] | None = None
) -> list[str]:
    """Load ``weights`` by the model's own loaders, and return the parameters to which nothing was written.

    Parameters of one element are left out: they are defaults, such as the scales of a KV cache.

    Args:
        model: the model.
        weights: (name, tensor) in checkpoint format.
        partly: gets the parameters that were written in part, because tensors are missing or the rest is padding.
    """
    writes = Writes(model)
    with writes:
        model.load_weights(iter(weights))
    return writes.unloaded(partly)


def described(unloaded: list[str]) -> str:
    """Return one line that names the first of these parameters."""
    more = f" and {len(unloaded) - 3} more" if len(unloaded) > 3 else ""
    return f"{len(unloaded)} parameters of the model lack weights: {', '.join(unloaded[:3])}{more}"


class Writes(TorchDispatchMode):
    """Counts the elements that operators write to each storage.

    Attributes:
        elements: how many elements were written, by storage.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: not loaded yet.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements: dict[StorageWeakRef, int] = {}
        self._model = model
        self._before = {name: storage_key(parameter) for name, parameter in model.named_parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    key = storage_key(tensor)
                    self.elements[key] = self.elements.get(key, 0) + tensor.numel()
        return result

    def unloaded(self, partly: list[str] | None = None) -> list[str]:
        """Return the parameters to which nothing was written; ``partly`` gets those that were written in part."""
        unloaded = []
        for name, parameter in self._model.named_parameters():
            key = storage_key(parameter)
            if parameter.numel() <= 1 or name not in self._before or key != self._before[name]:
                continue  # a default, or the loader gave it other memory
            if (written := self.elements.get(key, 0)) == 0:
                unloaded.append(name)
            elif written < parameter.numel() and partly is not None:
                partly.append(name)
        return unloaded
