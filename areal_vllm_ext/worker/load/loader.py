"""Puts staged checkpoint tensors into the live model, in one of two ways:

- **layerwise**, vLLM's reload (``Worker.reload_weights``): each layer is rebuilt as a fresh load would build it, processed
  (quantised, prepacked) and copied into the tensors that kernels and CUDA graphs hold. Always available. Where vLLM's own
  reload is wrong, ``worker/hooks.py`` corrects it.
- **planned**, where ``plan.py`` could prove that a layerwise load is nothing but copies: a few batched ones.

The first load is layerwise, and recorded; so is one of other tensors than the plan knows.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from .packing import noted as packings_noted
from .plan import BoundPlan, NotPlanned, Plan, Recorder
from .proof import readable

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logging.getLogger("vllm.areal_vllm_ext")


class Loader:
    """Loads the weights of one worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._plan: Plan | None = None
        # Names, dtypes and shapes on which a plan was tried last: the same ones would give the same plan, or none.
        self._tried: dict[str, tuple[torch.dtype, torch.Size]] = {}

    def bind(self) -> BoundPlan | None:
        """For an update that begins: what its tensors are added to as they come. None where there is no plan."""
        plan = self._plan
        if plan is not None and not plan.fits(self._worker.get_model()):
            logger.warning("areal_vllm_ext: the live weights have moved: their load plan is made anew")
            plan = None
            self.forget()
        return BoundPlan(plan) if plan else None

    def forget(self) -> None:
        """Make the plan anew with the next load."""
        self._plan, self._tried = None, {}

    def load(
        self, weights: Iterable[tuple[str, torch.Tensor]], bound: BoundPlan | None = None
    ) -> dict[str, torch.Tensor]:
        """Load a complete set of checkpoint tensors. On the worker's own thread, while its engine is paused.

        Args:
            weights: (name, tensor) in checkpoint format, on any device; a list where they are staged.
            bound: a plan that they were added to, if any.

        Returns:
            where a plan copied an incoming tensor whole into one run of live memory: that run, which must have its digest.
        """
        copied: dict[str, torch.Tensor] = {}
        if bound is not None and bound.complete and bound.plan is self._plan:
            bound.copy()
            self._forget_old_weights()
            copied = bound.plan.whole
        elif bound is not None and bound.part:
            raise RuntimeError("not all weights were staged, and the load plan that does with these is gone")
        elif isinstance(weights, list) and self._worth_a_plan(dict(weights)):
            self._load_and_record(weights)
        else:
            self._load_layerwise(weights)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return copied

    def _worth_a_plan(self, staged: dict[str, torch.Tensor]) -> bool:
        tried, self._tried = self._tried, {name: (tensor.dtype, tensor.shape) for name, tensor in staged.items()}
        # Experts that move between the ranks (EPLB) are not where they were recorded.
        return tried != self._tried and not self._worker.vllm_config.parallel_config.enable_eplb

    def _load_and_record(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self._plan = None
        model = self._worker.get_model()
        recorder = Recorder(model, readable(model), dict(weights))
        packing = packings_noted(recorder) if self._worker.device.type == "cpu" else contextlib.nullcontext()
        with recorder, packing:
            self._load_layerwise(weights)
        try:
            self._plan = recorder.plan()
        except NotPlanned as reason:
            logger.info("areal_vllm_ext: weights are loaded layer by layer: %s", reason)
        except Exception:
            logger.warning("areal_vllm_ext: no load plan could be made", exc_info=True)
        else:
            logger.info("areal_vllm_ext: further updates are copied as planned, %d MiB", self._plan.nbytes >> 20)

    def _load_layerwise(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        try:
            self._worker.reload_weights(weights_iterator=iter(weights))
        except BaseException:
            leave_reload(self._worker.get_model())
            raise
        if self._worker.device.type == "cpu":
            repack_tied_layers(self._worker.get_model())

    def _forget_old_weights(self) -> None:
        """What vLLM's reload does beside loading: drop what was computed with the old weights."""
        runner = self._worker.model_runner
        for name in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):
            if reset := getattr(runner, name, None):
                reset()


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
