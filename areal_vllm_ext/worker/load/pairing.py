"""Pairs what a load made in a second model with the live model: what a commit must copy where, and what it must assign.

Whatever could leave the live model with other weights than the second one's is an error: other names, layouts or ties, and
attributes that a load makes anew and that cannot take another's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import twins
from .proof import digests_by_name, readable
from .strides import storage_key
from .twins import Leaf, NotTwins
from .unloaded import Writes

if TYPE_CHECKING:
    from torch.multiprocessing.reductions import StorageWeakRef


class BeforeLoad:
    """What a model holds before it is loaded, and what is written to it from then on.

    Attributes:
        writes: a mode that is active while the model is loaded.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: not loaded yet.
        """
        self.writes = Writes(model)
        self._storages: set[StorageWeakRef] = {storage_key(tensor) for tensor in readable(model).values()}
        self._values = {leaf.path: leaf.value for leaf in twins.leaves(model)}

    def made(self, tensor: torch.Tensor) -> bool:
        """Return whether the load made or wrote ``tensor``, a parameter or buffer."""
        key = storage_key(tensor)
        return key not in self._storages or key in self.writes.elements

    def changed(self, leaf: Leaf) -> bool:
        """Return whether the load made or changed an attribute."""
        if leaf.path not in self._values:
            return True
        old, new = self._values[leaf.path], leaf.value
        if isinstance(new, torch.Tensor):
            return old is not new or storage_key(new) in self.writes.elements
        return old is not new and not (twins.is_simple(new) and _equal(old, new))


class Pairs:
    """What a commit copies and assigns.

    Attributes:
        copies: live tensors, each with the one whose bytes it gets.
        places: the place in ``copies`` of each parameter and buffer that is copied.
        assigned: objects of the second model that take the place of the live model's.
        digests: of the live parameters and buffers after the commit.
        aside: paths of attributes, besides parameters and buffers, that the load made of weights.
    """

    def __init__(self, model: torch.nn.Module, live: torch.nn.Module, before: BeforeLoad) -> None:
        """
        Args:
            model: loaded.
            live: the live model.
            before: of ``model``.

        Raises:
            NotTwins: copies and assignments would not make ``live`` what ``model`` is.
        """
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.places: dict[str, int] = {}
        self.assigned: list[Leaf] = []
        self.digests: dict[str, int] = {}
        self.aside: list[str] = []
        self._new, self._old, self._before = readable(model), readable(live), before
        self._pair_tensors()
        self._names = {storage_key(tensor): name for name, tensor in self._new.items()}
        self._live_names = {storage_key(tensor): name for name, tensor in self._old.items()}
        for leaf in twins.leaves(model, live):
            if before.changed(leaf):
                self._pair_attribute(leaf)

    def _pair_tensors(self) -> None:
        new, old = self._new, self._old
        if new.keys() != old.keys():
            raise NotTwins(f"a fresh load has other tensors than the live model: {min(new.keys() ^ old.keys())}")
        own = {name: tensor for name, tensor in new.items() if storage_key(tensor) != storage_key(old[name])}
        for name, tensor in own.items():
            if not twins.same_layout(tensor, old[name]):
                raise NotTwins(f"{name} has another dtype, shape or layout after a fresh load")
        full = {name: tensor for name, tensor in own.items() if tensor.numel()}
        if _together(full) != _together({name: old[name] for name in full}):
            raise NotTwins("other tensors share their memory after a fresh load")
        self.digests = digests_by_name(own)
        # What no load writes must be live already: it may be computed otherwise, or changed by somebody since.
        unmade = [name for name, tensor in full.items() if not self._before.made(tensor)]
        live = digests_by_name({name: tensor for name, tensor in old.items() if name in unmade or name not in own})
        for name in unmade:
            if live[name] != self.digests[name]:
                raise NotTwins(f"{name} is in no checkpoint, and another value than a fresh load gives it is live")
        self.digests |= live
        targets: dict[tuple[Any, ...], int] = {}
        for name in full.keys() - set(unmade):
            target = old[name]
            place = (storage_key(target), int(target.storage_offset()), tuple(target.shape), target.stride())
            if place not in targets:
                targets[place] = len(self.copies)
                self.copies.append((target, full[name]))
            self.places[name] = targets[place]

    def _pair_attribute(self, leaf: Leaf) -> None:
        if twins.is_assigned(leaf):
            self._pair_assigned(leaf)
        elif isinstance(leaf.value, torch.Tensor):
            self._pair_attribute_tensor(leaf, leaf.value)
        elif not twins.is_simple(leaf.value):
            raise NotTwins(f"{leaf.path} is made anew with each load")
        elif not _equal(leaf.value, leaf.other):
            raise NotTwins(f"{leaf.path} is {leaf.value!r} after a fresh load")

    def _pair_assigned(self, leaf: Leaf) -> None:
        if not hasattr(leaf.owner, "__dict__") or type(leaf.other) is not type(leaf.value):
            raise NotTwins(f"{leaf.path} is of another kind after a fresh load")
        self.assigned.append(leaf)
        self.aside.append(leaf.path)

    def _pair_attribute_tensor(self, leaf: Leaf, value: torch.Tensor) -> None:
        if value.is_meta or not value.numel():
            return
        other = leaf.other
        if (name := self._names.get(storage_key(value))) is not None:
            # A second name of a parameter. The live one must follow the live parameter.
            if not isinstance(other, torch.Tensor) or self._live_names.get(storage_key(other)) != name:
                raise NotTwins(f"{leaf.path} does not share the memory of {name} in the live model")
        elif not isinstance(other, torch.Tensor) or not twins.same_layout(value, other):
            raise NotTwins(f"{leaf.path} is made anew with each load")
        else:
            self.copies.append((other, value))
            if value.numel() > 1:  # not a default scale
                self.aside.append(leaf.path)


def _together(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    return sorted(sorted(names) for names in twins.ties(tensors).values())


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
