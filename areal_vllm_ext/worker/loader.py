"""Puts staged checkpoint tensors into the live model.

Loading is vLLM's layerwise reload (``Worker.reload_weights``): each layer is rebuilt as a fresh load would build it,
processed (quantised, prepacked) and copied into the tensors that kernels and CUDA graphs hold. Where vLLM's own reload is
wrong, ``engine_core/hooks.py`` corrects it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable


def load(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Load a complete set of checkpoint tensors.

    Args:
        worker: the vLLM worker; its engine is paused.
        weights: (name, tensor) in checkpoint format, on any device.
    """
    try:
        worker.reload_weights(weights_iterator=weights)
    except BaseException:
        leave_reload(worker.get_model())
        raise
    if worker.device.type == "cpu":
        repack_tied_layers(worker.get_model())
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def leave_reload(model: torch.nn.Module) -> None:
    """Bring a model out of a reload that failed midway, so that the next one can succeed. Its weights are mixed then.

    Bug: vLLM's reload leaves the layers that it had not finished on the meta device, with their weight loaders wrapped;
    every later reload fails, and the engine can only be restarted. Checked on: vLLM 0.32.0.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)  # noqa: SLF001 - as vLLM's own end of a reload does
        info.reset()
    layerwise.LOADING_LAYERS.clear()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload  # noqa: SLF001


def repack_tied_layers(model: torch.nn.Module) -> None:
    """Process again the layers that share their weight with one loaded before them.

    Bug: on CPU a layer's weight is prepacked when it is processed. A tied ``lm_head`` gets no weights of its own in a
    reload, so vLLM's reload leaves it alone, and it goes on computing with the packed old embedding: silently other
    tokens. Checked on: vLLM 0.32.0.
    """
    owners: set[int] = set()
    for layer in model.modules():
        shared = [id(parameter) in owners for parameter in layer.parameters(recurse=False)]
        owners.update(id(parameter) for parameter in layer.parameters(recurse=False))
        if any(shared) and (method := getattr(layer, "quant_method", None)) is not None:
            method.process_weights_after_loading(layer)
