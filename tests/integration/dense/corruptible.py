"""A worker whose memory can be damaged on purpose: the extension of the engines of this folder."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from areal_vllm_ext.worker import WorkerExtension

_FOLDER = "AREAL_TEST_DAMAGE"


class CorruptibleWorker(WorkerExtension):
    """Flips a bit of the tensor that is named in the file of its DP rank, and takes the file away.

    Its own methods are for ``group.call``.
    """

    def areal_attach(self: Any, endpoint: str, token: str) -> None:
        super().areal_attach(endpoint, token)  # type: ignore[safe-super]
        order = Path(os.environ[_FOLDER]) / str(self.vllm_config.parallel_config.data_parallel_index)
        threading.Thread(target=_watch, args=(self, order), daemon=True).start()

    def describe(self: Any, *arguments: Any) -> dict[str, Any]:
        return {"rank": self.rank, "pid": os.getpid(), "arguments": arguments}

    def fail(self, message: str) -> None:
        raise ValueError(message)

    def block(self, seconds: float) -> None:
        time.sleep(seconds)


def _watch(worker: Any, order: Path) -> None:
    while True:
        if order.exists():
            tensors = dict(worker.get_model().named_parameters())
            tensors[order.read_text()].detach().view(-1).view(torch.uint8)[7] ^= 16
            order.unlink()
        time.sleep(0.05)
