"""Loads staged checkpoint tensors into the live model, in one of three ways, the first that can be used:

- **plan**: some batched copies, if ``recorder.py`` could prove that a load is nothing but copies.
- **shadow**: vLLM's loader builds the new weights beside generation before the vote (``shadow.py``), and the commit copies
  them. The load is recorded, so that the next update may have a plan.
- **reload**, by vLLM's reload (``Worker.reload_weights``). It rebuilds each layer as a fresh load would, processes it
  (quantised, prepacked) and copies it into the tensors that kernels and CUDA graphs hold, all inside the pause. It is used
  where no shadow can be built, and recorded too. Where vLLM's own reload is wrong, ``worker/hooks.py`` and the functions
  below correct it.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from ...process.collector import no_collection
from ...transport.base import Cancelled
from ...vllm_versions import forget_loading_layers
from .cpu_packing import ATTRIBUTE
from .plan import LoadPlan, PlanRun
from .proof import readable
from .recorder import Recorder, observe_packing
from .shadow import BuildOptions, NoShadow, Refused, Shadow, TapedShadow, build, obstacle, room
from .targets import NotPlanned
from .written import Written

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ...integrity.digest import Contents

logger = logging.getLogger("vllm.areal_vllm_ext")


class Loader:
    """Loads the weights of one worker.

    Attributes:
        made: paths of attributes, besides parameters and buffers, that the last load made of weights, as far as that is known.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self.made: tuple[str, ...] = ()
        self._plan: LoadPlan | None = None
        # Names, dtypes and shapes of the last attempt at a plan. The same ones would give the same plan, or none again.
        self._tried: dict[str, tuple[torch.dtype, torch.Size]] = {}
        # How the last tensors' shadows are made without a model, if they can be.
        self._taped: TapedShadow | None = None
        # The same of tensors for which a shadow cannot stand for the live model, and why.
        self._unshadowed: tuple[dict[str, tuple[torch.dtype, torch.Size]], str] = ({}, "")

    def serves(self) -> bool:
        """Return whether the engine has requests, which work on another thread slows down."""
        return bool(getattr(self._worker.model_runner, "requests", None))

    def shadow_room(self) -> int:
        """Return the bytes of the worker's device that a shadow needs beside what is staged there."""
        return room(self._worker)

    def begin_run(self) -> PlanRun | None:
        """Return a run of the load plan for an update that begins; None without a plan that fits the live model."""
        plan = self._plan
        if plan is not None and not plan.fits(self._worker.get_model()):
            logger.warning("areal_vllm_ext: the live weights have moved: the next load makes a new load plan")
            plan = None
            self.forget()
        return PlanRun(plan) if plan else None

    def fits(self, run: PlanRun) -> bool:
        """Return whether the run's plan is still the plan of the live model, tensor by tensor."""
        return run.plan is self._plan and run.plan.fits(self._worker.get_model())

    def fits_shadow(self, shadow: Shadow) -> bool:
        """Return whether the shadow was built for the live model as it is now, tensor by tensor."""
        return shadow.fits(self._worker.get_model())

    def forget(self) -> None:
        """Drop the plan, so that the next load records a new one."""
        self._plan, self._tried = None, {}

    def build_shadow(
        self, weights: Sequence[tuple[str, torch.Tensor]], contents: Contents, options: BuildOptions
    ) -> tuple[Shadow | None, str]:
        """Build the new weights beside generation. Safe on any thread.

        Args:
            weights: (name, tensor) in checkpoint format, complete.
            contents: their digests, by name.
            options: how.

        Returns:
            the shadow, and why there is none: the commit reloads then.

        Raises:
            Refused: the model does not take these weights.
        """
        kinds = _kinds(weights)
        if self._unshadowed[0] == kinds:
            return None, self._unshadowed[1]
        taped = (
            self._taped if kinds == self._tried and self._taped and self._taped.fits(self._worker.get_model()) else None
        )
        if taped is not None and taped.proven and not obstacle(self._worker, weights):
            try:
                with no_collection():
                    return taped.shadow(dict(weights), options), ""
            except (Cancelled, TimeoutError):
                raise
            except Exception:
                logger.warning("areal_vllm_ext: the tape of a load cannot be replayed", exc_info=True)
                self._taped = taped = None
        options = options._replace(recorded=kinds != self._tried, taped=taped)
        try:
            return build(self._worker, weights, contents, options), ""
        except NoShadow as reason:
            logger.warning("areal_vllm_ext: weights are loaded in the pause: %s", reason)
            if reason.lasts:
                self._unshadowed = kinds, str(reason)
            return None, str(reason)
        except (Refused, Cancelled, TimeoutError):
            raise
        except Exception as error:
            logger.warning("areal_vllm_ext: weights are loaded in the pause: no shadow could be built", exc_info=True)
            self._unshadowed = kinds, f"{type(error).__name__}: {error}"
            return None, self._unshadowed[1]

    def load_shadow(self, shadow: Shadow, weights: Sequence[tuple[str, torch.Tensor]]) -> Written | None:
        """Make a shadow that fits the live model live. Runs on the worker's own thread while its engine is paused.

        Args:
            shadow: of ``weights``.
            weights: (name, tensor) in checkpoint format.

        Returns:
            the live memory that was written, if a load plan knows it.
        """
        shadow.copy()
        self.made = shadow.made
        self._reset_caches()
        self._plan, self._taped, self._tried = shadow.plan, shadow.taped, _kinds(weights)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return shadow.written

    def fetched(self, made: Sequence[str]) -> None:
        """Note that the live weights are a peer's; ``made`` as of the peer's last load."""
        self.made = tuple(made)
        self._reset_caches()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def load(
        self,
        weights: Sequence[tuple[str, torch.Tensor]],
        run: PlanRun | None = None,
        digests: Mapping[str, int] | None = None,
        *,
        planned: bool = False,
    ) -> Written | None:
        """Load a complete set of checkpoint tensors. Runs on the worker's own thread while its engine is paused.

        Args:
            weights: (name, tensor) in checkpoint format, on any device.
            run: the plan's run to which they were added, if any.
            digests: of ``weights``, so that the live memory can be compared later.
            planned: whether ``run`` is complete and ``fits`` said yes just now, which takes too long to ask twice in a pause.

        Returns:
            the live memory that was written, if a load plan knows it.
        """
        written: Written | None = None
        if run is not None and run.complete and not planned:
            # Changed since the update began: the plan would write to memory that the model no longer uses.
            self.forget()
        if run is not None and planned:
            run.copy()
            self._reset_caches()
            written = run.written
        elif run is not None and run.partial:
            raise RuntimeError(
                "only a part of the weights was staged, and the load plan for it is gone: send all weights again"
            )
        elif self._worth_a_plan(weights):
            self._load_and_record(weights)
            if self._plan and digests and (copies := self._plan.copies_of(dict(weights))):
                written = copies.written(digests)
        else:
            self._load_layerwise(weights)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return written

    def _worth_a_plan(self, weights: Sequence[tuple[str, torch.Tensor]]) -> bool:
        tried, self._tried = self._tried, _kinds(weights)
        # EPLB moves experts between ranks, so a recorded place would be wrong.
        return tried != self._tried and not self._worker.vllm_config.parallel_config.enable_eplb

    def _load_and_record(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._plan = None
        model = self._worker.get_model()
        recorder = Recorder(model, readable(model), dict(weights))
        packing = observe_packing(recorder) if self._worker.device.type == "cpu" else contextlib.nullcontext()
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

    def _load_layerwise(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        try:
            self._worker.reload_weights(weights_iterator=iter(weights))
        except BaseException:
            leave_reload(self._worker.get_model())
            raise
        if self._worker.device.type == "cpu":
            repack_tied_layers(self._worker.get_model())

    def _reset_caches(self) -> None:
        """Drop what was computed with the old weights, as vLLM's reload does after its loading."""
        runner = self._worker.model_runner
        for name in ("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"):
            if reset := getattr(runner, name, None):
                reset()


def _kinds(weights: Sequence[tuple[str, torch.Tensor]]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in weights}


def leave_reload(model: torch.nn.Module) -> None:
    """Bring a model out of a reload that failed midway, so that the next reload can succeed. Its weights are mixed then.

    Bug: vLLM's reload leaves the layers that it had not finished on the meta device, with their weight loaders wrapped.
    Every later reload then fails, and only a restart helps. Checked on: vLLM 0.32.0.
    """
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)  # noqa: SLF001 - as vLLM's own end of a reload does
        info.reset()
    forget_loading_layers(layerwise)
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload  # noqa: SLF001


def repack_tied_layers(model: torch.nn.Module) -> None:
    """Pack again the weight of each layer that shares it with a layer before it.

    Bug: on a CPU, vLLM packs a layer's weight when it processes the layer. A tied ``lm_head`` gets no weights of its own in a
    reload, so vLLM's reload skips it. It then computes with the packed old embedding: silently other tokens.
    Only the weight counts: other layers share a bias (an MoE's router and its experts), and packing those a second time would
    corrupt them. Checked on: vLLM 0.32.0.
    """
    owners: set[int] = set()
    for layer in model.modules():
        if (weight := layer._parameters.get("weight")) is None:  # noqa: SLF001
            continue
        if id(weight) in owners and hasattr(layer, ATTRIBUTE):
            method: Any = layer.quant_method
            method.process_weights_after_loading(layer)
        owners.add(id(weight))
