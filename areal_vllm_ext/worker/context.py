"""What all updates of one worker share."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NotACheckpoint
from ..integrity import checkpoint
from ..transport.base import WorkerSite
from .live_weights import LiveWeights
from .load.dry_load import DryModel
from .load.loader import Loader
from .residency import Residency
from .sources import Sources
from .staging import StagingMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..protocol import TensorMeta, WorkerDone

logger = logging.getLogger("vllm.areal_vllm_ext")


class WorkerContext:
    """What all updates of one worker share.

    Attributes:
        rank: of the worker in its engine.
        device: where its model is.
        dtype: the dtype that the engine computes in.
        loader: loads staged weights into the live model.
        live_weights: what the worker serves.
        residency: whether the live weights are in memory.
        memory: where updates stage.
        sources: the worker's ends of its trainers' connections.
        dry_model: tells what the model takes, where the checkpoint does not.
        report: sends the outcome of a step to the engine's endpoint.
    """

    def __init__(self, worker: Any, report: Callable[[WorkerDone], None]) -> None:
        model_config = worker.vllm_config.model_config
        self._model: tuple[str, str | None] = (model_config.model, model_config.revision)
        self.rank: int = worker.rank
        self.device = torch.device(worker.device)
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.loader = Loader(worker)
        self.residency = Residency(worker)
        self.live_weights = LiveWeights(worker, self.residency, self._model)
        self.memory = StagingMemory(self.device)
        self.sources = Sources(WorkerSite(self.rank, self.device))
        self.report = report
        self.dry_model = DryModel.of(worker) if self.expected is None else None

    @functools.cached_property
    def expected(self) -> dict[str, TensorMeta] | None:
        """The tensors of the checkpoint that this engine was started from; None if they are not known."""
        try:
            return {tensor.name: tensor for tensor in checkpoint.describe(*self._model)}
        except NotACheckpoint as error:
            logger.warning("areal_vllm_ext: dtypes of incoming weights cannot be checked: %s", error)
            return None
