"""The names under which a Hugging Face model saves its tensors, which are not always those that its modules have."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def checkpoint_format(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``state`` under the names that ``save_pretrained`` writes; unchanged unless the module is Hugging Face's."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return state
    if not isinstance(module, PreTrainedModel):
        return state
    converted: dict[str, torch.Tensor] = revert_weight_conversion(module, without_ties(module, state))
    return converted


def without_ties(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``state`` without the second names of tied weights, as ``save_pretrained`` does. Broken ties stay."""
    ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    return {
        name: tensor
        for name, tensor in state.items()
        if not ((source := state.get(ties.get(name, ""))) is not None and identity(source) == identity(tensor))
    }


def identity(tensor: Any) -> tuple[object, ...]:
    """Return what two names of one tensor have in common. A tensor that is merged later is known by its ``base``."""
    tensor = getattr(tensor, "base", tensor)
    if (number := getattr(tensor, "ds_id", None)) is not None:  # partitioned by ZeRO, so it has no memory to compare
        return (number,)
    if hasattr(tensor, "to_local"):  # a DTensor: compare this rank's shards, because gathering would be a collective
        tensor = tensor.to_local()
    if tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def described(config: Any) -> str:
    """Return a Hugging Face configuration as text from which ``model_of`` makes its model; empty if it cannot be written."""
    try:
        text: str = config.to_json_string()
    except Exception:
        return ""
    return text


def _number(held: dict[str, Any]) -> Any:
    """Return the number that transformers writes as ``{"__float__": "Infinity"}``, because JSON has none."""
    return float(held["__float__"]) if held.keys() == {"__float__"} else held


@functools.lru_cache(maxsize=2)
def model_of(description: str) -> torch.nn.Module | None:
    """Return the model of ``described``, on the meta device; None if this process' transformers does not have it."""
    try:
        import transformers

        options = json.loads(description, object_hook=_number)
        return without_memory(transformers.AutoConfig.for_model(options.pop("model_type"), **options))
    except Exception:
        return None


def without_memory(config: Any) -> torch.nn.Module | None:
    """Return the model of a Hugging Face configuration on the meta device; None if transformers has no class for it."""
    import torch
    import transformers

    kind = next((getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()), None)
    if kind is None:
        return None
    with torch.device("meta"):
        model: torch.nn.Module = kind(config)
    return model
