"""Proves that a reload gave what a fresh load gives. A second model is built as vLLM's loader builds one, from the same
staged tensors, and every parameter and buffer of the live model must have its bytes.

A backend may keep a weight where nothing can read it (oneDNN's packed copy on a CPU, behind an emptied parameter). Such a
layer must give the same answers, bit for bit, as its twin in the fresh model.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import torch

from ...integrity import digest
from ..memory import free_bytes
from .apart import apart, load_into, new_model
from .cpu_packing import ATTRIBUTE
from .strides import in_memory_order
from .unloaded import described, load_and_find_unloaded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger("vllm.areal_vllm_ext")

# Room for a fresh model and for the temporary memory of its loading, as a multiple of the model's size.
_ROOM_FACTOR = 1.3
# How long to wait for the build of an update that was given up.
_WAIT_SECONDS = 10.0
# Unit vectors that a packed layer is given at once.
_PROBES = 128


class ProofFailed(RuntimeError):
    """The live model is not what a fresh load of the same tensors gives."""


def prove(worker: Any, weights: Sequence[tuple[str, torch.Tensor]], live: Mapping[str, int]) -> str:
    """Compare the live model with a fresh load of ``weights``, which were just loaded into it.

    Args:
        worker: vLLM's worker; its engine is paused.
        weights: (name, tensor) in checkpoint format.
        live: digests of the live model, by ``digests_of_model``.

    Returns:
        why it could not be proven (no room, vLLM cannot build a second model); empty if it is proven.

    Raises:
        ProofFailed: naming the parameters and layers that are wrong.
    """
    if reason := obstacle(worker, weights):
        return reason
    fresh: torch.nn.Module | None = None
    unloaded: list[str] = []
    try:
        fresh = fresh_model(worker, weights, unloaded)
        wrong = different(live, digests_of_model(fresh))
        wrong += different(packed_digests(worker.get_model()), packed_digests(fresh))
    except Exception as error:
        logger.warning("areal_vllm_ext: the weights cannot be compared with a fresh load", exc_info=True)
        return f"a fresh load for comparison failed ({type(error).__name__}: {error})"
    finally:
        fresh = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ProofFailed(
            f"{len(wrong)} tensors are not what a fresh load of the same weights gives: {', '.join(wrong[:5])}{more}; "
            + _cause([name for name in unloaded if any(_is_of(name, one) for one in wrong)])
        )
    return ""


def _is_of(parameter: str, wrong: str) -> bool:
    """Return whether ``wrong`` (a tensor, or a layer whose weight lies packed) is ``parameter``."""
    return wrong in (parameter, f"{parameter.rpartition('.')[0]} (packed)")


def _cause(unloaded: list[str]) -> str:
    """Return what a failed proof comes from, and what to do."""
    if unloaded:
        return f"what was sent is not complete ({described(unloaded)}): send all weights"
    from vllm.version import __version__ as vllm_version

    return (
        f"vLLM {vllm_version}, or the corrections that areal_vllm_ext makes to it, reload this model wrongly: restart the "
        "engine from the checkpoint, and report it to areal_vllm_ext"
    )


def obstacle(worker: Any, weights: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Return why ``prove`` cannot be tried now; empty if it can."""
    if worker.vllm_config.parallel_config.enable_eplb:
        return "experts move between the ranks (EPLB), so a fresh load has others"
    needed = int(_ROOM_FACTOR * max(_size(worker.get_model()), _size_of(weights) if worker.device.type == "cpu" else 0))
    free = free_bytes(worker.device)
    if needed > free:
        return f"no room on {worker.device} for a second model: {needed >> 20} MiB needed, {free >> 20} MiB free"
    return ""


def fresh_model(worker: Any, weights: Sequence[tuple[str, torch.Tensor]], unloaded: list[str]) -> torch.nn.Module:
    """Build a second model from ``weights``, apart from the live one. ``unloaded`` gets parameters without all weights."""

    def load(model: Any) -> None:
        partly: list[str] = []
        unloaded.extend(load_and_find_unloaded(model, weights, partly))
        unloaded.extend(partly)

    with apart(worker.vllm_config, timeout=_WAIT_SECONDS) as config:
        fresh = new_model(config, worker.device)
        tie_as(fresh, worker.get_model())
        load_into(fresh, config, worker.device, load)
    return fresh


def tie_as(model: torch.nn.Module, live: torch.nn.Module) -> None:
    """Give parameters of ``model`` the second names that they have in ``live``.

    vLLM does not tie an ``lm_head`` that the checkpoint holds as well. It ties it after the load, if the values are equal
    (``maybe_retie_word_embeddings``). An update need not hold it then, so that a second model must be tied before its load.
    """
    first = {id(parameter): name for name, parameter in live.named_parameters()}
    own = dict(model.named_parameters())
    for name, parameter in live.named_parameters(remove_duplicate=False):
        if name != first[id(parameter)] and name in own and first[id(parameter)] in own:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner).register_parameter(attribute, own[first[id(parameter)]])


def readable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter and buffer by name, tied ones under each of their names; names are those without LoRA."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors
        if not isinstance(tensor, torch.nn.UninitializedParameter) and not tensor.is_meta
    }


def parameter_names(model: torch.nn.Module) -> list[str]:
    """Return the names that ``readable`` gives to parameters."""
    return [name.replace(".base_layer.", ".") for name, _ in model.named_parameters(remove_duplicate=False)]


def digests_of_model(model: torch.nn.Module) -> dict[str, int]:
    """Return the digest of each ``readable`` tensor."""
    return digests_by_name(readable(model))


def digests_by_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the digest of each tensor as it lies in memory, so they can be compared with tensors of the same layout."""
    values = digest.digests_of(map(in_memory_order, tensors.values()))
    return dict(zip(tensors, values, strict=True))


def packed_digests(model: torch.nn.Module) -> dict[str, int]:
    """Return digests of what layers compute whose weights lie packed, where no parameter shows them.

    Each layer gets the unit vectors, which it answers with its own weights, without rounding. So the digest is the same on
    every machine. Never call it beside a running model, because two threads must not use one oneDNN handle.
    """
    answers: dict[str, int] = {}
    for name, layer in model.named_modules():
        linear = getattr(layer, ATTRIBUTE, None)
        packed = linear is not None and linear is not torch.nn.functional.linear
        if not packed and not is_handed_over(layer):
            continue
        weight = layer.weight
        if weight is not None and weight.numel():
            columns, dtype = weight.shape[1], weight.dtype
        else:
            columns = getattr(layer, "input_size_per_partition", layer.input_size)
            dtype = layer.params_dtype if weight is None else weight.dtype
        parts = []
        for start in range(0, columns, _PROBES):
            count = min(_PROBES, columns - start)
            inputs = torch.zeros(count, columns, dtype=dtype)
            inputs[range(count), range(start, start + count)] = 1
            parts.append(layer.quant_method.apply(layer, inputs))
        key = f"{name} (packed)".replace(".base_layer ", " ")
        answers[key] = digest.digests_of([torch.cat(parts)])[0]
    return answers


def is_handed_over(layer: Any) -> bool:
    """Return whether a kernel took the weight of this linear layer, and left none (8-bit weights on a CPU)."""
    no_weight = layer._parameters.get("weight", layer) is None  # noqa: SLF001
    return no_weight and hasattr(layer, "quant_method") and hasattr(layer, "params_dtype")


def packed_functions(model: torch.nn.Module) -> dict[str, object]:
    """Return, by layer, the function that computes with its packed weight."""
    return {
        f"{name} (packed)".replace(".base_layer ", " "): linear
        for name, layer in model.named_modules()
        if (linear := getattr(layer, ATTRIBUTE, None)) is not None and linear is not torch.nn.functional.linear
    }


def different(live: Mapping[str, int], fresh: Mapping[str, int]) -> list[str]:
    """Return the names in ``fresh`` whose digest ``live`` lacks or has otherwise."""
    return [name for name, value in fresh.items() if live.get(name) != value]


def _size(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in {id(one): one for one in readable(model).values()}.values())


def _size_of(weights: Sequence[tuple[str, torch.Tensor]]) -> int:
    return sum(tensor.nbytes for _, tensor in weights)
