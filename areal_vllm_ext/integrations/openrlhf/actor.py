"""What takes the place of two methods of OpenRLHF's ``ActorPPOTrainer``. Nothing here imports OpenRLHF."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ...errors import SettingsError
from ..syncs import Syncs, SyncSettings, warn_unless_tested

_REPLACED = ("_init_vllm_sync_group", "broadcast_to_vllm")


def replace(trainer: Any, settings: dict[str, Any]) -> None:
    """Replace the methods of the class ``trainer``.

    Args:
        trainer: OpenRLHF's ``ActorPPOTrainer``.
        settings: see ``SyncSettings``.

    Raises:
        ImportError: this OpenRLHF has no such methods.
    """
    warn_unless_tested("openrlhf", "0.11.2")
    if missing := [name for name in _REPLACED if not hasattr(trainer, name)]:
        raise ImportError(
            f"OpenRLHF: its ActorPPOTrainer has no {', '.join(missing)}; use OpenRLHF 0.11, which was tested"
        )

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
            several = dist.is_initialized() and dist.get_world_size() > 1
            syncs = self._areal_syncs = Syncs(SyncSettings(**settings), dist.group.WORLD if several else None)
        torch.cuda.empty_cache()
        syncs.send(self.actor.model)
        torch.cuda.empty_cache()

    trainer._init_vllm_sync_group = _init_vllm_sync_group  # noqa: SLF001 - OpenRLHF has no other place
    trainer.broadcast_to_vllm = broadcast_to_vllm
