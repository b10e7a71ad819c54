"""A load of incoming tensors into a model without memory, to find out before the vote whether the live model takes them.

vLLM's loaders run as in a reload, and copy to parameters on the meta device. ``intake.py`` learns with it at start-up what the
model takes. Where that is not possible, each new set of tensors is loaded before its vote.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from .apart import apart, initialized, model_config_of
from .drafter import DrafterWorker, OwnPart
from .proof import tie_as
from .unloaded import described, load_and_find_unloaded

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger("vllm.areal_vllm_ext")


class DryModel:
    """A second model on the meta device. It takes what the live model takes."""

    def __init__(self, model: Any, *, complete: bool) -> None:
        """
        Args:
            model: on the meta device.
            complete: whether each of its parameters must get weights. Quantised models have parameters that get none.
        """
        self._model, self._complete = model, complete
        # The set of tensors that was accepted last: the same one is accepted again without a load.
        self._accepted: frozenset[tuple[str, torch.dtype, torch.Size]] = frozenset()

    @property
    def modules(self) -> list[Any]:
        """The models that are loaded from one checkpoint."""
        return [self._model]

    @classmethod
    def of(cls, worker: Any) -> DryModel | None:
        """Build one for the model of ``worker``; None if vLLM cannot build it without memory.

        To be called on the worker's own thread before it computes.
        """
        try:
            with apart(worker.vllm_config) as config:
                model = initialized(config, torch.device("meta"))
            tie_as(model, worker.get_model())
            loads: Any = OwnPart(model, worker) if isinstance(worker, DrafterWorker) else model
        except Exception:
            logger.warning(
                "areal_vllm_ext: names of incoming weights cannot be checked by a load without memory", exc_info=True
            )
            return None
        return cls(loads, complete=model_config_of(config).quantization is None)

    def refusal(self, weights: Mapping[str, torch.Tensor]) -> str | None:
        """Return why the model does not take ``weights`` as all of its weights; None if it does. Safe on any thread."""
        tensors = frozenset((name, tensor.dtype, tensor.shape) for name, tensor in weights.items())
        if tensors == self._accepted:
            return None
        try:
            unloaded = load_and_find_unloaded(self._model, weights.items())
        except Exception as error:
            logger.info("areal_vllm_ext: a load without memory failed", exc_info=True)
            return f"the model does not take these weights: {type(error).__name__}: {error}"
        if self._complete and unloaded:
            return f"{described(unloaded)}; send all weights"
        self._accepted = tensors
        return None
