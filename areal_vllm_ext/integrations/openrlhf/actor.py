"""What takes the place of two methods of OpenRLHF's ``ActorPPOTrainer``. Nothing here imports OpenRLHF."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import SettingsError
from ..syncs import Syncs, SyncSettings, check_has, warn_unless_tested

_TESTED = ("openrlhf", "0.11.2")
_REPLACED = ("_init_vllm_sync_group", "broadcast_to_vllm")


def replace(trainer: Any, settings: dict[str, Any]) -> None:
    """Replace the methods of the class ``trainer``.

    Args:
        trainer: OpenRLHF's ``ActorPPOTrainer``.
        settings: see ``SyncSettings``.

    Raises:
        ImportError: this OpenRLHF has no such methods.
    """
    warn_unless_tested(*_TESTED)
    check_has(trainer, _REPLACED, *_TESTED)

    def _init_vllm_sync_group(self: Any, backend: str) -> None:
        """Do nothing: the trainer and the engines need no group."""

    def broadcast_to_vllm(self: Any) -> None:
        """Move every engine to the actor's weights, or none. Called on every rank.

        Raises:
            ArealError: see docs/transactions.md.
        """
        if getattr(self.strategy.args.ds, "tensor_parallel_size", 1) > 1:
            raise SettingsError(
                "ds.tensor_parallel_size is above 1: areal-vllm-ext does not gather DeepSpeed's tensor parallelism; use ZeRO"
            )
        if (syncs := getattr(self, "_areal_syncs", None)) is None:
            syncs = self._areal_syncs = Syncs.of_all_ranks(SyncSettings(**settings))
        torch.cuda.empty_cache()
        syncs.send(self.actor.model)
        torch.cuda.empty_cache()

    trainer._init_vllm_sync_group = _init_vllm_sync_group  # noqa: SLF001 - OpenRLHF has no other place
    trainer.broadcast_to_vllm = broadcast_to_vllm
