"""The tensors of a trainer's module, under the names with which its model is saved.

A wrapper (``torch.compile``, DDP, FSDP, activation checkpointing, a value head) adds a part to the names, which is taken off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..errors import InvalidWeights
from ..integrity.hugging_face import checkpoint_format
from . import adapters, zero3
from .names import VALUE_HEAD, say_left_out, without_wrappers

Named = tuple[str, torch.Tensor]

# What modules keep beside their tensors (``torch.nn.Module.get_extra_state``); no part of a checkpoint.
_EXTRA_STATE = "_extra_state"


def is_sharded(part: Any) -> bool:
    """Return whether gathering the full tensor is a collective."""
    return hasattr(part, "full_tensor")


def gathered(parts: Iterable[Named]) -> Iterator[Named]:
    """Yield full tensors, one at a time."""
    part: Any
    for name, part in parts:
        full: torch.Tensor = part.full_tensor() if is_sharded(part) else part
        yield name, full.detach() if full.requires_grad else full


def parts_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a module as this rank holds them, under the names with which its model is saved."""
    outer, model = _unwrapped(module)
    inner = adapters.without_peft(model)
    if not adapters.has_adapters(inner):
        return _saved(inner, _state(outer))
    if outer is not model:
        raise InvalidWeights(
            "adapters inside of FSDP1 cannot be merged one layer at a time: "
            "call send(fsdp.module) inside `with FullyShardedDataParallel.summon_full_params(fsdp)`, or use FSDP2"
        )
    merged = adapters.merged_state(inner)
    return _saved(inner, {name: part for name, part in merged.items() if not name.endswith(_EXTRA_STATE)})


def _saved(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return ``state`` under the names with which ``model`` is saved."""
    try:
        return checkpoint_format(model, state)
    except (AttributeError, TypeError):
        # Tensors that are made later are to be split (fused experts), so all of them are made now, in memory for the model.
        deferred = (adapters.Merged, zero3.Partitioned)
        made = {name: one.full_tensor().detach() if isinstance(one, deferred) else one for name, one in state.items()}
        return checkpoint_format(model, made)


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    if zero3.is_partitioned(module):
        gathering = zero3.Gathering()
        tensors = [(name, gathering.part(tensor)) for name, tensor in module.state_dict(keep_vars=True).items()]
    else:
        tensors = list(module.state_dict().items())
    return {without_wrappers(name): tensor for name, tensor in tensors if not name.endswith(_EXTRA_STATE)}


def _unwrapped(module: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the module to ask for its tensors, and the model inside of all wrappers."""
    asked = module
    while (wrapped := _wrapped(module)) is not None:
        # FSDP1 gathers in its own ``state_dict``, so the module inside of it is not asked.
        if asked is module and not _is_fsdp1(module):
            asked = wrapped
        module = wrapped
    return asked, module


def _wrapped(module: torch.nn.Module) -> torch.nn.Module | None:
    """Return the module inside of a wrapper; None if ``module`` is no wrapper."""
    inside: dict[str, Any] = dict(module.named_children())
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    if isinstance(module, parallel) or any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__):
        return inside["module"]  # type: ignore[no-any-return]
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if name in inside:
            return inside[name]  # type: ignore[no-any-return]
    if VALUE_HEAD in inside and "pretrained_model" in inside:
        say_left_out(VALUE_HEAD)
        return inside["pretrained_model"]  # type: ignore[no-any-return]
    return None


def _is_fsdp1(module: torch.nn.Module) -> bool:
    return "_fsdp_wrapped_module" in module._modules  # noqa: SLF001 - named_children skips what is there twice
