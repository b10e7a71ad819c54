"""Disk: every worker reads a Hugging Face checkpoint directory into host memory while its engine generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..integrity.checkpoint import Checkpoint
from .base import Cancelled
from .buckets import total_bytes

if TYPE_CHECKING:
    import threading
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

    def __init__(self, transfer: Disk, cancelled: threading.Event) -> None:
        """Open the checkpoint.

        Args:
            transfer: its directory.
            cancelled: set when the update is given up.

        Raises:
            NotACheckpoint: the directory holds no complete checkpoint, or two.
        """
        self._checkpoint, self._cancelled = Checkpoint(transfer.path), cancelled
        self.nbytes = total_bytes(self._checkpoint.tensors.values())

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        raise ValueError("an update from disk has no buckets")

    def load_all(self) -> Iterator[tuple[str, torch.Tensor]]:
        for named in self._checkpoint.read():
            if self._cancelled.is_set():
                raise Cancelled
            yield named

    def close(self) -> None:
        self._checkpoint.close()
