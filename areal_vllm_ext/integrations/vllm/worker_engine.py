"""The worker's backend ``areal`` of vLLM's ``WeightTransferEngineFactory``.

``--weight-transfer-config '{"backend": "areal"}'`` is for deployments whose trainer is ``ArealTrainerEngine``. Its updates
do not pass here. vLLM's own routes work too, and load a checkpoint directory: without a vote, and without a way back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from ...integrity.checkpoint import Checkpoint
from ...worker.load.loader import leave_reload, repack_tied_layers


@dataclasses.dataclass
class ArealWeightTransferInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: workers read files, and need not meet the trainer."""


@dataclasses.dataclass
class ArealWeightTransferUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What one update loads.

    Attributes:
        checkpoint: a Hugging Face checkpoint directory that every worker can read.
    """

    checkpoint: str

    def __post_init__(self) -> None:
        if not Path(str(self.checkpoint)).is_absolute():
            raise ValueError(f"checkpoint must be the absolute path of a directory, not {self.checkpoint!r}")


class ArealWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """Loads a checkpoint directory. A session that brings none changes nothing."""

    init_info_cls = ArealWeightTransferInitInfo
    update_info_cls = ArealWeightTransferUpdateInfo
    _began = False

    def init_transfer_engine(self, init_info: ArealWeightTransferInitInfo) -> None:
        """Do nothing: there is no one to meet."""

    def start_weight_update(self) -> None:
        """Take no weight away yet."""
        self._leave()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one checkpoint. vLLM's own method synchronises an accelerator that a CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ArealWeightTransferUpdateInfo) -> None:
        """Load a checkpoint's tensors layer by layer.

        Raises:
            NotACheckpoint: the directory holds none; nothing was changed.
        """
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with Checkpoint(update_info.checkpoint) as files:
            if not self._began:
                self._began = True
                initialize_layerwise_reload(self.model)
            try:
                self.model.load_weights(files.read())
            except BaseException:
                self._leave()
                raise

    def finish_weight_update(self) -> None:
        """Make the model whole."""
        if not self._began:
            return
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._began = False
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_tied_layers(self.model)

    def shutdown(self) -> None:
        """Release nothing: files are open during a load only."""

    def _leave(self) -> None:
        if self._began:
            self._began = False
            leave_reload(self.model)
