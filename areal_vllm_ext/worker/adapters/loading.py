"""Makes vLLM's model of a LoRA adapter out of peft's tensors and configuration, without a file.

It does what vLLM's ``WorkerLoRAManager._load_adapter`` does with a directory. It also checks what vLLM would only find when a
request first uses the adapter, where an error ends the engine.
"""

from __future__ import annotations

import copy
import json
import traceback
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...protocol import TensorMeta


class Unusable(ValueError):
    """vLLM cannot serve the adapter; the message says why."""


def load(
    manager: Any, config: str, tensors: dict[str, torch.Tensor], base_shape: Callable[[str], tuple[int, ...] | None]
) -> Any:
    """Return vLLM's ``LoRAModel`` of an adapter, in host memory. Touches nothing that requests use.

    Args:
        manager: the worker's ``lora_manager``.
        config: peft's configuration, in JSON.
        tensors: peft's tensors, which stay as they are.
        base_shape: returns the shape of a tensor of the base weights, or None if it is not known.

    Raises:
        Unusable: vLLM cannot serve it.
    """
    from vllm.lora.peft_helper import PEFTHelper

    settings = json.loads(config)
    kind = str(settings.get("peft_type") or "LORA").rpartition(".")[2]
    if kind.upper() != "LORA":
        raise Unusable(f"it is a {kind} adapter, and vLLM serves LoRA only")
    try:
        helper = PEFTHelper.from_dict(settings | {"vllm_max_position_embeddings": manager.max_position_embeddings})
        helper.validate_legal(manager.lora_config)
    except (ValueError, TypeError) as error:
        raise Unusable(str(error)) from None
    adapters, model = manager._adapter_manager, manager._adapter_manager.model  # noqa: SLF001 - as vLLM's own loading does
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    rename = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper
    skipped = getattr(model, "lora_skip_prefixes", None)
    _check_modules(manager, helper, list(tensors), rename, skipped)
    _check_pairs(helper, tensors, base_shape)
    try:
        lora = manager._lora_model_cls.from_lora_tensors(  # noqa: SLF001
            lora_model_id=1,  # until it is committed
            tensors=_local(adapters, _own(tensors)),
            peft_helper=helper,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=rename,
            skip_prefixes=skipped,
        )
        for name in ("_validate_moe_lora_format", "_validate_modules_to_save", "_validate_token_classification_lora"):
            if check := getattr(adapters, name, None):
                check(lora)
        for layer in lora.loras.values():
            layer.optimize()  # scales lora_b here, so that no later step writes to the tensors
        _try(adapters, lora)
    except (ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
        # vLLM asserts some things without a word.
        cause = str(error) or f"in {traceback.extract_tb(error.__traceback__)[-1].name}"
        raise Unusable(f"vLLM does not take it: {type(error).__name__}: {cause}") from error
    return lora


def fresh(lora: Any, number: int) -> Any:
    """Return a copy of a ``LoRAModel`` that vLLM may repack. The tensors are shared; nothing writes to them."""
    copied = lora.clone(number)
    copied.loras = {name: copy.copy(layer) for name, layer in lora.loras.items()}
    return copied


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of which vLLM may scale all but lora_A, which it only reads."""
    return {name: tensor if ".lora_A." in name else tensor.clone() for name, tensor in tensors.items()}


def _local(adapters: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors without those of experts that other ranks have."""
    spec = getattr(adapters, "moe_ep_load_spec", None)
    if spec is None:
        return tensors
    from vllm.lora.lora_model import _is_remote_expert_key

    return {name: tensor for name, tensor in tensors.items() if not _is_remote_expert_key(name, spec)}


def _check_modules(manager: Any, helper: Any, names: list[str], rename: Any, skipped: list[str] | None) -> None:
    """Raise Unusable if the adapter changes a module that has none in vLLM. vLLM would ignore it."""
    from vllm.lora.utils import is_base_embedding_weights, parse_fine_tuned_lora_name

    adapters = manager._adapter_manager  # noqa: SLF001
    known = set[str]()
    for module in adapters.supported_lora_modules:
        known.update(adapters.packed_modules_mapping.get(module, [module]))
        if module == "experts":
            known.add(module)
    served = known
    if getattr(manager.lora_config, "target_modules", None) is not None:
        wrapped = {name.rpartition(".")[2] for name in adapters.modules}
        served = {part for name in wrapped for part in (*adapters.packed_modules_mapping.get(name, ()), name)}
    for name in names:
        if is_base_embedding_weights(name) or "base_layer" in name:
            continue
        if skipped and manager._lora_model_cls._should_skip_module(name, skipped):  # noqa: SLF001
            continue
        try:
            module, _ = parse_fine_tuned_lora_name(name, rename)
        except ValueError as error:
            raise Unusable(str(error)) from None
        last = module.rpartition(".")[2]
        expert = module[module.find(".experts") + 1 :] if ".experts" in module else ""
        if (expert or last) in served or (not expert and last in (helper.modules_to_save or ())):
            continue
        if (expert or last) in known:
            raise Unusable(f"it changes {module}, which this engine's --lora-target-modules leave out")
        raise Unusable(
            f"it changes {module}, for which vLLM has no LoRA in this model; target {', '.join(sorted(served))}"
        )


def _check_pairs(
    helper: Any, tensors: Mapping[str, torch.Tensor], base_shape: Callable[[str], tuple[int, ...] | None]
) -> None:
    """Raise Unusable unless each lora_A has its lora_B, and both fit each other and the base weight."""
    if not tensors:
        raise Unusable("it has no tensors")
    for name, tensor in tensors.items():
        for one, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_B.weight", ".lora_A.weight")):
            if name.endswith(one) and name.removesuffix(one) + other not in tensors:
                raise Unusable(f"{name} came without {name.removesuffix(one) + other}")
        if not name.endswith(".lora_A.weight") or tensor.dim() != 2:
            continue
        path = name.removesuffix(".lora_A.weight")
        if ".experts" in path:
            continue
        module = path.removeprefix("base_model.model.")
        a, b = tuple(tensor.shape), tuple(tensors[f"{path}.lora_B.weight"].shape)
        # vLLM before 0.32 has one rank for all modules.
        rank = helper.get_rank_and_scaling(module)[0] if hasattr(helper, "get_rank_and_scaling") else helper.r
        if len(b) != 2 or not a[0] == b[1] == rank:
            raise Unusable(f"{module} has lora_A {a} and lora_B {b}, and its configuration says rank {rank}")
        base = base_shape(f"{module}.weight")
        if base is not None and len(base) == 2 and base != (b[0], a[1]):
            raise Unusable(f"{module} has lora_A {a} and lora_B {b}, which do not fit its weight {base}")


def _try(adapters: Any, lora: Any) -> None:
    """Put the adapter into copies of the layers without memory, as vLLM does when a request first uses it."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    trial = fresh(lora, lora.id)
    adapters._create_merged_loras_inplace(trial)  # noqa: SLF001
    applied = 0
    for name, module in adapters.modules.items():
        weights = adapters._get_lora_layer_weights(trial, name)  # noqa: SLF001
        if not weights:
            continue
        applied += 1
        if not isinstance(module, BaseLinearLayerWithLoRA):
            continue
        layer: Any = copy.copy(module)
        layer.lora_a_stacked = _without_memory(module.lora_a_stacked)
        layer.lora_b_stacked = _without_memory(module.lora_b_stacked)
        layer.set_lora(0, _without_memory(weights.lora_a), _without_memory(weights.lora_b))
    if not applied and not getattr(lora, "modules_to_save", None) and _has_all_layers(adapters):
        raise ValueError(f"none of its modules is in this model: {next(iter(lora.loras), 'it has none')}")


def _has_all_layers(adapters: Any) -> bool:
    """Return whether this worker has the whole model: no other pipeline or expert rank has a part."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().world_size == 1) and getattr(adapters, "moe_ep_load_spec", None) is None


def _without_memory(tensors: Any) -> Any:
    if isinstance(tensors, (tuple, list)):
        return type(tensors)(_without_memory(one) for one in tensors)
    return tensors.to("meta") if isinstance(tensors, torch.Tensor) else tensors


def shape_in(known: Mapping[str, TensorMeta], find: Callable[[str], str]) -> Callable[[str], tuple[int, ...] | None]:
    """Return a function from a name to the shape of that base weight; None where it is not known."""

    def shape(name: str) -> tuple[int, ...] | None:
        meta = known.get(find(name)) if known else None
        return meta.shape if meta is not None and meta.dtype in ("float32", "bfloat16", "float16") else None

    return shape
