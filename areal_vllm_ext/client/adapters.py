"""A model with adapters (peft), as it is after they were merged. The trainer's own tensors are not touched.

Merging into the base weights and taking the adapter off again would change them, because floating-point sums are rounded. So
each layer that has an adapter is copied when its tensors are sent, one layer at a time, and the copy is merged.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidWeights
from . import zero3
from .names import without_wrappers

if TYPE_CHECKING:
    from collections.abc import Iterator


class Merged:
    """A tensor of a layer with an adapter, which is merged when it is sent (``full_tensor``).

    Attributes:
        base: the tensor without the adapter, which has the same shape and dtype.
    """

    def __init__(self, merger: _Merger, layer: torch.nn.Module, name: str, base: torch.Tensor) -> None:
        """
        Args:
            merger: merges ``layer``.
            layer: has the tensor.
            name: of the tensor in the layer without its adapter.
            base: the tensor without the adapter.
        """
        self._merger, self._layer, self._name, self.base = merger, layer, name, base

    @property
    def shape(self) -> torch.Size:
        return getattr(self.base, "ds_shape", self.base.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def full_tensor(self) -> torch.Tensor:
        """Return the merged tensor. Gathering a sharded one is a collective."""
        merged: Any = self._merger.tensors_of(self._layer)[self._name]
        return merged.full_tensor() if hasattr(merged, "full_tensor") else merged  # type: ignore[no-any-return]


class _Merger:
    """Merges copies of layers, and keeps the tensors of one layer until the next is asked for."""

    def __init__(self) -> None:
        self._layer: torch.nn.Module | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def tensors_of(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        if self._layer is not layer:
            self._layer, self._tensors = layer, {}
            with (
                zero3.gathered_parameters(layer.parameters())
                if zero3.is_partitioned(layer)
                else contextlib.nullcontext()
            ):
                copied = copy.deepcopy(layer)
            self._tensors = _taken_off(copied, merge=True).state_dict()
        return self._tensors


def has_adapters(model: torch.nn.Module) -> bool:
    """Return whether peft has put adapters into a model."""
    return "peft" in sys.modules and next(_adapted(model), None) is not None


def without_peft(model: Any) -> torch.nn.Module:
    """Return the model in which a PeftModel has put its adapters; a model that is no PeftModel itself.

    Raises:
        InvalidWeights: an adapter cannot be merged.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model  # type: ignore[no-any-return]
    tuner = model.base_model
    kind = model.peft_config[model.active_adapter].peft_type
    if not hasattr(tuner, "_check_merge_allowed"):
        raise InvalidWeights(
            f"the PeftModel's adapter ({kind}) is no change of weights, so it cannot be merged: give send(...) the base model"
        )
    try:
        tuner._check_merge_allowed()  # noqa: SLF001 - as merge_and_unload does
    except ValueError as error:
        raise InvalidWeights(f"the PeftModel's adapter ({kind}) cannot be merged: {error}") from None
    return tuner.model  # type: ignore[no-any-return]


def merged_state(model: torch.nn.Module) -> dict[str, Any]:
    """Return the tensors of a model with adapters as they are after ``merge_and_unload``. They are merged when they are sent.

    Raises:
        InvalidWeights: two layers with adapters share a tensor, to which each would add its own.
    """
    adapted = {without_wrappers(path): layer for path, layer in _adapted(model)}
    gathering = zero3.Gathering()
    named = [(without_wrappers(name), tensor) for name, tensor in model.state_dict(keep_vars=True).items()]
    state: dict[str, Any] = {
        name: gathering.part(tensor)
        for name, tensor in named
        if not any(name.startswith(f"{path}.") for path in adapted)
    }
    merger, owners = _Merger(), dict[int, str]()
    for path, layer in adapted.items():
        for inner, tensor in _taken_off(layer, merge=False).state_dict(keep_vars=True).items():
            name = without_wrappers(f"{path}.{inner}")
            if (other := owners.setdefault(id(tensor), name)) != name:
                raise InvalidWeights(
                    f"{name} and {other} are one tensor with two adapters: "
                    "send a copy of the model after merge_and_unload()"
                )
            state[name] = Merged(merger, layer, inner, tensor)
    return state


def _adapted(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield, by path, each module that peft has put around one of the model's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    outer = ""
    for path, module in model.named_modules():
        inside = outer and path.startswith(outer)
        if not inside and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            outer = f"{path}."
            yield path, module


def _taken_off(layer: Any, *, merge: bool) -> torch.nn.Module:
    """Return the module that peft has put ``layer`` around, as peft's own ``merge_and_unload`` or ``unload`` does."""
    inner: torch.nn.Module
    if hasattr(layer, "unload_and_optionally_merge_module"):
        inner = layer.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
        return inner
    if merge:
        layer.merge(safe_merge=False, adapter_names=None)
    inner = layer.get_base_layer()
    return inner
