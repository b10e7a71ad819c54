"""Disk: every worker reads a Hugging Face checkpoint directory into host memory while its engine generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..integrity.checkpoint import Checkpoint
from .buckets import total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..protocol import Bucket, Disk
    from .base import Work


class DiskSource:
    """The worker's end. The trainer's end is the directory.

    Its files are opened here, at the begin of the update, and read at the vote. If the directory has changed in between, the
    vote is a no. Workers that find different files hold different digests, so their votes differ.
    """

    reusable = False
    unchecked = True
    sharing = None
    device = torch.device("cpu")

    def __init__(self, transfer: Disk) -> None:
        """Open the checkpoint.

        Raises:
            NotACheckpoint: the directory holds no complete checkpoint, or two.
        """
        self._checkpoint = Checkpoint(transfer.path)
        self.nbytes = total_bytes(self._checkpoint.tensors.values())

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        raise ValueError("an update from disk has no buckets")

    def load_all(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._checkpoint.read()

    def close(self) -> None:
        self._checkpoint.close()
