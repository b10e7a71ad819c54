"""Records the load of a shadow, and makes a load plan for the live model of it.

A fresh load writes where a reload does not: into new parameters that are then replaced, or processed in place. So what is
live is known only after the load, by the names that the model has then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .cpu_packing import ATTRIBUTE
from .plan import LoadPlan, ModelFingerprint
from .proof import readable
from .recorder import Recorder
from .strides import slice_of
from .targets import LiveTarget, NotPlanned
from .twins import modules_by_name, ties

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class ShadowRecorder(Recorder):
    """Watches the load of a shadow; then ``plan_for(...)``."""

    def __init__(self, shadow: torch.nn.Module, staged: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            shadow: not loaded yet.
            staged: the incoming tensors; contiguous.
        """
        super().__init__(shadow, readable(shadow), staged)
        for storage in self._storages.values():
            storage.names = ()

    def plan_for(self, live: torch.nn.Module, aside: Iterable[str]) -> LoadPlan:
        """Make a plan for the live model, and prove it on the shadow. Call it after the load.

        Args:
            live: the live model. It gets what the shadow holds before the plan is used.
            aside: the paths of attributes that the load made, besides parameters and buffers.

        Raises:
            NotPlanned: the load cannot be replayed.
        """
        if self._reason:
            raise NotPlanned(self._reason)
        self._live = readable(self._model)
        for key, names in ties(dict(self._live)).items():
            if (storage := self._storages.get(key)) is not None:
                storage.names = tuple(names)
        self._check_temporary_storages()
        packed = {
            f"{name}.{ATTRIBUTE}": layer
            for name, layer in modules_by_name(self._model).items()
            if id(layer) in self._packings
        }
        if other := [path for path in aside if path not in packed]:
            raise NotPlanned(f"{other[0]} is made anew with each load")
        layers = modules_by_name(live)
        packings = []
        for path, layer in packed.items():
            self._check_packing(packing := self._packings[id(layer)])
            packing.layer = layers[path.removesuffix(f".{ATTRIBUTE}")]
            packings.append(packing)
        tensors = readable(live)
        targets = []
        for storage in self._storages.values():
            if storage.names and storage.copies:
                LiveTarget(self._flat(storage), storage).check(
                    {name: self._live[name] for name in storage.names}, self._staged
                )
                targets.append(LiveTarget(self._flat_of(tensors, storage.names), storage))
        return LoadPlan(targets, self._staged, ModelFingerprint(live), tuple(packings))

    def _flat_of(self, live: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
        """Return the live storage that answers to the shadow's of these tensors, as one tensor."""
        for name in names:
            if slice_of(live[name]) != slice_of(self._live[name]):
                raise NotPlanned(f"{name} lies elsewhere in its memory than after a fresh load")
        tensor = live[names[0]]
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
