"""Where a load without memory writes each incoming tensor: to which parameters of a model on the meta device."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .strides import StridedSlice, slice_of, storage_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.multiprocessing.reductions import StorageWeakRef

    from ...protocol import TensorMeta


class Place(NamedTuple):
    """A slice of a parameter or buffer. No slice: a loader used the tensor's value, or kept the tensor."""

    target: str
    slice: StridedSlice | None = None


# By incoming tensor, the places that it is written to. Empty for a tensor that the model ignores.
Places = dict[str, frozenset[Place]]


def places_of(model: Any, metas: Iterable[TensorMeta]) -> Places:
    """Load tensors without values by the model's own loaders, and return where each is written.

    Args:
        model: on the meta device.
        metas: the tensors, in checkpoint format.

    Raises:
        Exception: as the model's loaders do, for a name or a shape that they do not take.
    """
    metas = list(metas)
    before = {storage_key(tensor): name for name, tensor in _tensors_of(model)}
    followed = _Provenance(before)
    alive: dict[str, weakref.ref[torch.Tensor]] = {}

    def incoming() -> Iterator[tuple[str, torch.Tensor]]:
        for meta in metas:
            tensor = followed.incoming(meta)
            alive[meta.name] = weakref.ref(tensor)
            yield meta.name, tensor
            del tensor

    with followed:
        model.load_weights(incoming())
    places = {meta.name: set(followed.places.get(meta.name, ())) for meta in metas}
    for name, tensor in _tensors_of(model):
        if (key := storage_key(tensor)) not in before:  # the loader gave the parameter other memory
            for source in followed.sources.get(key, ()):
                places[source].add(Place(name, slice_of(tensor)))
    for name, reference in alive.items():
        if not places[name] and reference() is not None:
            places[name].add(Place("kept"))
    return {name: frozenset(found) for name, found in places.items()}


def _tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


class _Provenance(TorchDispatchMode):
    """Follows incoming tensors through the operators of a load.

    Attributes:
        places: by incoming tensor, where it was written.
        sources: by temporary storage, the incoming tensors that are in it.
    """

    def __init__(self, targets: dict[StorageWeakRef, str]) -> None:
        """
        Args:
            targets: the parameters and buffers of the model, by storage.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: dict[str, set[Place]] = {}
        self.sources: dict[StorageWeakRef, frozenset[str]] = {}
        self._targets = targets

    def incoming(self, meta: TensorMeta) -> torch.Tensor:
        """Return a tensor of this shape and dtype. One of a single element has a value, which loaders of scales read."""
        dtype: torch.dtype = getattr(torch, meta.dtype)
        single = all(size == 1 for size in meta.shape)
        tensor = torch.empty(meta.shape, dtype=dtype, device="cpu" if single else "meta")
        if single:
            tensor.fill_(1)
        self.sources[storage_key(tensor)] = frozenset([meta.name])
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(_flat((args, kwargs)))
        names = frozenset().union(*(self.sources.get(storage_key(tensor), frozenset()) for tensor in given))
        if not names:
            return result
        outputs = list(_flat((result,)))
        if not outputs:  # the value itself, as by .item()
            self._note(names, Place("value"))
        written = [
            tensor
            for argument, value in zip(func._schema.arguments, args, strict=False)  # noqa: SLF001
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _flat((value,))
        ]
        for tensor in written:
            if (target := self._targets.get(storage_key(tensor))) is not None:
                self._note(names, Place(target, slice_of(tensor)))
        for tensor in (*written, *outputs):
            if (key := storage_key(tensor)) not in self._targets:
                self.sources[key] = self.sources.get(key, frozenset()) | names
        return result

    def _note(self, names: frozenset[str], place: Place) -> None:
        for name in names:
            self.places.setdefault(name, set()).add(place)


def _flat(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
