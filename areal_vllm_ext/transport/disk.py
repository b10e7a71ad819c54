"""Disk: every worker reads a Hugging Face checkpoint directory, into host memory, while it generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..integrity import checkpoint
from .buckets import total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..protocol import Bucket, Disk
    from .base import Work


class DiskSource:
    """The worker's end. The trainer's end is the directory."""

    reusable = False
    unchecked = True
    sharing = None
    device = torch.device("cpu")

    def __init__(self, transfer: Disk) -> None:
        """Look the directory through.

        Raises:
            NotACheckpoint: where it is none, or cut off.
        """
        self._files = checkpoint.files(transfer.path)
        tensors = [tensor for file in self._files for tensor in checkpoint.read_header(file)]
        self.nbytes = total_bytes(tensors)

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        raise ValueError("an update from disk has no buckets")

    def load_all(self) -> Iterator[tuple[str, torch.Tensor]]:
        from safetensors import safe_open

        for file in self._files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no dict: it has no iterator
                    # A copy: what lies in a mapped file changes when somebody writes to the file.
                    yield name, tensors.get_tensor(name).clone()

    def close(self) -> None:
        pass
