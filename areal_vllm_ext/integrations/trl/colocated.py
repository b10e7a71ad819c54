"""TRL's colocated mode: the ``LLM`` of each rank is an engine. Nothing here imports TRL."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..syncs import Syncs, SyncSettings

_THEIRS = "_areal_theirs"


def replace(generation: Any, settings: SyncSettings) -> None:
    """Replace ``sync_weights`` of the class ``generation``, for the mode ``colocate`` only.

    Args:
        generation: TRL's ``VLLMGeneration``.
        settings: see there; ``engines`` is one for each rank, or for each of TRL's tensor-parallel groups, by default.
    """
    theirs = getattr(generation.sync_weights, _THEIRS, generation.sync_weights)

    def sync_weights(self: Any) -> None:
        """Move the ``LLM`` of every rank to the model's weights, or none. Called on every rank.

        Raises:
            ArealError: see docs/transactions.md.
        """
        if self.mode != "colocate":
            theirs(self)
            return
        if self.enable_sleep_mode:
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        if (syncs := getattr(self, "_areal_syncs", None)) is None:
            count = self.accelerator.num_processes // self.tensor_parallel_size
            syncs = Syncs.of_all_ranks(dataclasses.replace(settings, engines=settings.engines or count))
            self._areal_syncs = syncs
        syncs.send(self._iter_named_params())

    setattr(sync_weights, _THEIRS, theirs)
    generation.sync_weights = sync_weights
