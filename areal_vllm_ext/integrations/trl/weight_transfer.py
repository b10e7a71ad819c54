"""``ArealWeightTransfer`` for ``AsyncGRPOTrainer(weight_transfer=...)``. It imports nothing of TRL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import RequestError
from ..syncs import Syncs, SyncSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


class ArealWeightTransfer:
    """Satisfies TRL's ``WeightTransferProtocol``. Used in the trainer's main process."""

    def __init__(self, directory: str = "", **settings: Any) -> None:
        """
        Args:
            directory: the directory's address (default: AREAL_VLLM_DIRECTORY, else port 29700 of this host).
            settings: see ``SyncSettings``.
        """
        self._settings = SyncSettings(directory=directory, **settings)
        self._syncs: Syncs | None = None

    def init_weight_transfer(self) -> None:
        """Find every engine.

        Raises:
            EnginesMissing: an engine did not come up; the message names it.
        """
        if self._syncs is None:
            self._syncs = Syncs(self._settings)

    def pause(self) -> None:
        """Do nothing: engines generate while the weights travel, and an update pauses them for its commit only."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Move every engine to these weights, or none.

        Raises:
            ArealError: see docs/transactions.md. ``iterator`` was walked to its end, so that no other rank hangs.
        """
        if self._syncs is None:
            raise RequestError("state", "the engines were not looked for: call init_weight_transfer() first")
        self._syncs.send(iterator)

    def resume(self) -> None:
        """Do nothing: an update has resumed the engines that ran before it."""

    def destroy(self) -> None:
        """Close the connections. Engines keep running."""
        if self._syncs is not None:
            self._syncs.close()
            self._syncs = None
