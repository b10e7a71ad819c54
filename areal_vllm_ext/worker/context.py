"""What all updates of one worker share."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from ..protocol import Weights
from ..transport.base import WorkerSite
from . import background
from .adapters.store import AdapterStore
from .drafts import Drafter
from .live_weights import LiveWeights
from .load.drafter import is_prefixed, prefixed, unprefixed
from .load.dry_load import DryModel
from .load.intake import Intake
from .load.loader import Loader
from .native_transfer import NativeTransfer
from .residency import Residency
from .sources import Sources
from .staging import StagingMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..protocol import DraftWeights, WorkerDone

logger = logging.getLogger("vllm.areal_vllm_ext")


class WorkerContext:
    """What all updates of one worker share.

    Attributes:
        rank: of the worker in its engine.
        device: where its model is.
        dtype: the dtype that the engine computes in.
        loader: loads staged weights into the live model.
        drafter: the model with which the engine drafts; None without one.
        live_weights: what the worker serves.
        residency: whether the live weights are in memory.
        native_transfer: loads by vLLM's own weight transfer.
        memory: where updates stage.
        sources: the worker's ends of its trainers' connections.
        adapters: the LoRA adapters that the worker serves.
        dry_model: refuses what the model does not take, where ``intake`` does not know it.
        learned: done when ``intake`` is known.
        report: sends the outcome of a step to the engine's endpoint.
    """

    def __init__(self, worker: Any, report: Callable[[WorkerDone], None]) -> None:
        model_config = worker.vllm_config.model_config
        self._worker = worker
        self.rank: int = worker.rank
        self.device = torch.device(worker.device)
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.loader = Loader(worker)
        self.drafter = Drafter.of(worker)
        self.residency = Residency(worker)
        self.live_weights = LiveWeights(
            worker,
            self.residency,
            (model_config.model, model_config.revision),
            self.drafter.worker if self.drafter is not None else None,
        )
        self.native_transfer = NativeTransfer(worker, self.live_weights, self.residency)
        self.memory = StagingMemory(self.device)
        self.residency.on_sleep = self._before_sleep
        self.sources = Sources(WorkerSite(self.rank, self.device))
        self.adapters = AdapterStore(worker)
        self.report = report
        self.dry_model = DryModel.of(worker)
        self.learned: Future[Intake] = Future()
        background.run(self._learn, (model_config.model, model_config.revision), model_config)

    @property
    def model(self) -> torch.nn.Module:
        """The live model, and its drafter."""
        return self.live_weights.model

    @property
    def made(self) -> list[str]:
        """Paths of attributes, besides parameters and buffers, that the last loads made of weights."""
        drafter = self.drafter
        return [*self.loader.made, *(prefixed(path) for path in (drafter.loader.made if drafter is not None else ()))]

    def fetched(self, made: Sequence[str]) -> None:
        """Note that the live weights are a peer's; ``made`` as of the peer's last loads."""
        self.loader.fetched([path for path in made if not is_prefixed(path)])
        if self.drafter is not None:
            self.drafter.loader.fetched([unprefixed(path) for path in made if is_prefixed(path)])
            self.drafter.discarded = ""

    def _before_sleep(self, level: int) -> None:
        self.live_weights.forget_base(lost=level > 1)
        if level > 1:
            self.adapters.forget_device()
            if self.drafter is not None:
                self.drafter.discarded = "vLLM's sleep level 2 discarded the drafter's weights"
        self.memory.give_back_now()

    @functools.cached_property
    def intake(self) -> Intake:
        """What the model takes. Waits until it is known: milliseconds after start-up, or seconds for 20,000 tensors."""
        return self.learned.result()

    def _learn(self, model: tuple[str, str | None], config: Any) -> None:
        try:
            intake = Intake.of(model, config, self.dry_model)
        except Exception as error:
            logger.warning("areal_vllm_ext: not known what the model takes", exc_info=True)
            intake = Intake(Weights(tensors=(), error=f"{type(error).__name__}: {error}"))
        intake.weights = msgspec.structs.replace(intake.weights, draft=self._learn_draft())
        if intake.known:
            self.dry_model = None  # no longer needed
        self.learned.set_result(intake)

    def _learn_draft(self) -> DraftWeights | None:
        try:
            return self.drafter.learn() if self.drafter is not None else None
        except Exception:
            logger.warning("areal_vllm_ext: not known what the drafter takes", exc_info=True)
            return None
