"""Compares two models of one configuration, the live one and one that was just loaded: what of the second must be put where
in the first, so that the first serves the weights of the second.

Parameters and buffers are paired by name. What a load leaves elsewhere is found in the attributes of modules and of what they
hold: kernels, quantisation methods, their tensors and functions.
"""

from __future__ import annotations

import enum
import functools
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .cpu_packing import ATTRIBUTE
from .strides import storage_key

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.multiprocessing.reductions import StorageWeakRef

# What modules hold besides their weights, or only hold for others. ``lora_manager`` holds adapters.
_NOT_COMPARED = {
    "_parameters",
    "_buffers",
    "_modules",
    "_do_torchao_reload",
    "_original_do_torchao_reload",
    "lora_manager",
}
# Objects of these packages describe, communicate or time. They hold no weights.
_PACKAGES = (
    "vllm.config.",
    "vllm.distributed.",
    "vllm.transformers_utils.",
    "vllm.platforms.",
    "vllm.utils.",
    "transformers.",
    "torch.distributed.",
    "torch.cuda.",
    "torch._C.",
    "torch._ops.",
    "threading.",
    "_thread.",
    "logging.",
    "weakref.",
)
# Whole objects that can take another's place: kernels read them through the attribute at each call.
_ASSIGNED_ATTRIBUTES = {ATTRIBUTE}
_ASSIGNED_TYPES = {"CPUDNNLGEMMHandler"}
_DEPTH = 8
MISSING = object()


class NotTwins(Exception):
    """The second model cannot stand for the first; the message says why."""


class Leaf(NamedTuple):
    """A value that modules hold: its path, the object and key that hold it in the other model, and the other's value."""

    path: str
    value: Any
    owner: Any
    key: str
    other: Any


def plain_name(name: str) -> str:
    """Return a parameter's or module's name as it is without LoRA."""
    return name.replace(".base_layer.", ".").removesuffix(".base_layer")


def modules_by_name(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return each module by its name without LoRA; of a wrapped layer, the layer."""
    return {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def leaves(model: torch.nn.Module, other: torch.nn.Module | None = None) -> Iterator[Leaf]:
    """Yield what the modules of ``model`` hold besides parameters, buffers and modules, down to single values.

    Args:
        model: the model.
        other: its twin, in which the same values are looked up; values that both share are left out.
    """
    others = modules_by_name(other) if other is not None else {}
    own = modules_by_name(model)
    seen = set(map(id, own.values()))
    done: set[int] = set()
    for name, module in own.items():
        if id(module) in done or others.get(name) is module:
            continue  # shared with the twin, such as vLLM's rotary embeddings
        done.add(id(module))
        twin = others.get(name, MISSING)
        for key, value in list(vars(module).items()):
            if key not in _NOT_COMPARED:
                yield from _leaves(f"{name}.{key}", value, twin, key, _held(twin, key), seen, _DEPTH)


def _held(owner: Any, key: str) -> Any:
    return getattr(owner, "__dict__", {}).get(key, MISSING)


def _leaves(path: str, value: Any, owner: Any, key: str, other: Any, seen: set[int], depth: int) -> Iterator[Leaf]:
    if value is other or isinstance(value, (type, types.ModuleType, torch.dtype, torch.device)):
        return
    leaf = Leaf(path, value, owner, key, other)
    if is_assigned(leaf) or isinstance(value, torch.Tensor):
        yield leaf
        return
    if is_simple(value):
        yield leaf
        return
    if f"{type(value).__module__}.".startswith(_PACKAGES) or id(value) in seen:
        return
    seen.add(id(value))
    if not depth or _is_opaque(value):
        yield leaf
        return
    for inner, held in _inside(value):
        twin = dict(_inside(other)).get(inner, MISSING) if type(other) is type(value) else MISSING
        yield from _leaves(f"{path}.{inner}", held, other, inner, twin, seen, depth - 1)


def _is_opaque(value: Any) -> bool:
    """Return whether nothing tells what an object holds."""
    known = (dict, list, tuple, set, frozenset, range, slice, functools.partial, types.MethodType, types.FunctionType)
    if isinstance(value, (*known, types.BuiltinFunctionType, types.MethodWrapperType)):
        return False
    return not hasattr(value, "__dict__") and not any("__slots__" in vars(kind) for kind in type(value).__mro__[:-1])


def _inside(value: Any) -> list[tuple[str, Any]]:
    """Return what an object holds, by name."""
    if isinstance(value, dict):
        return [(str(key), one) for key, one in list(value.items())]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(str(place), one) for place, one in enumerate(value)]
    if isinstance(value, functools.partial):
        return [("func", value.func), *_inside(value.args), *_inside(value.keywords)]
    if isinstance(value, types.MethodType):
        return [("__self__", value.__self__), ("__func__", value.__func__)]
    if isinstance(value, types.BuiltinFunctionType):
        return []
    if isinstance(value, types.FunctionType):
        defaults = [(f"default {place}", one) for place, one in enumerate(value.__defaults__ or ())]
        return [*zip(value.__code__.co_freevars, map(_content, value.__closure__ or ()), strict=True), *defaults]
    held = dict(getattr(value, "__dict__", {}))
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    return [*held.items(), *((name, getattr(value, name)) for name in slots if hasattr(value, name))]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def is_assigned(leaf: Leaf) -> bool:
    """Return whether the whole object takes the place of the twin's."""
    return leaf.key in _ASSIGNED_ATTRIBUTES or type(leaf.value).__name__ in _ASSIGNED_TYPES


def is_simple(value: Any) -> bool:
    """Return whether values of this kind are compared by ``==``."""
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, enum.Enum, torch.Size))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that an object holds: those in a function's closure, for example."""
    for name, held in _inside(value):
        for leaf in _leaves(name, held, MISSING, name, MISSING, set(), _DEPTH):
            if isinstance(leaf.value, torch.Tensor):
                yield leaf.value


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same kind, shape and strides, so that one's bytes can replace the other's."""
    return (one.dtype, one.shape, one.stride(), one.device, one.layout) == (
        other.dtype,
        other.shape,
        other.stride(),
        other.device,
        other.layout,
    )


def ties(tensors: dict[str, torch.Tensor]) -> dict[StorageWeakRef, list[str]]:
    """Return the names of tensors by the storage that they lie in."""
    together: dict[StorageWeakRef, list[str]] = {}
    for name, tensor in tensors.items():
        together.setdefault(storage_key(tensor), []).append(name)
    return together
