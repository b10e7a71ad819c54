"""Torch group: a trainer that knows nothing of this package is rank 0 of a torch process group, and broadcasts tensors.

The trainer announces names, dtypes and shapes by its own route (``integrations/``), and this end receives tensor after tensor
into a bucket. There is no trainer's end here: the trainer calls ``torch.distributed.broadcast``. It announces no digests, so
workers compute theirs, and the vote compares those of all workers with each other.

gloo runs in a process of its own (``gloo_process.py``), NCCL on this package's communicators with deadlines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .base import watch
from .buckets import nbytes_of
from .gloo_process import GlooGroup, Span, split_rendezvous

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from ..protocol import Bucket, TorchGroup
    from .base import Work, WorkerSite
    from .broadcast import NcclCommunicator


class Group(Protocol):
    """This worker's rank in the trainer's process group."""

    @property
    def device(self) -> torch.device: ...

    def start(
        self, buffer: torch.Tensor, spans: Sequence[Span], timeout: float, cancelled: Callable[[], bool]
    ) -> Work: ...

    def close(self) -> None: ...


class TorchGroupSource:
    """The worker's end. It stays in the group until it fails, or another group of this name is joined."""

    reusable = True
    unchecked = True
    sharing = None
    nbytes = 0

    def __init__(self, transfer: TorchGroup, site: WorkerSite, timeout: float, cancelled: threading.Event) -> None:
        """Join the trainer's process group within ``timeout`` seconds.

        Raises:
            Cancelled: the update was given up meanwhile.
            TimeoutError: it took longer.
            RuntimeError: the group cannot be joined.
        """
        self._group: Group
        if transfer.backend == "gloo":
            self._group = GlooGroup(transfer, transfer.ranks[site.rank], timeout, cancelled.is_set)
        else:
            self._group = NcclGroup(transfer, transfer.ranks[site.rank], site.device, timeout)

    @property
    def device(self) -> torch.device:
        return self._group.device

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        spans = [Span(segment.offset, nbytes_of(segment.tensor)) for segment in bucket.segments]
        return self._group.start(buffer, spans, timeout, cancelled)

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        self._group.close()


class NcclGroup:
    """A rank of a group of torch's NCCL backend, without that backend, which ends the process when it gives up."""

    def __init__(self, transfer: TorchGroup, rank: int, device: torch.device, timeout: float) -> None:
        """Join the trainer's store. NCCL itself connects at the first broadcast, as torch's backend does."""
        from datetime import timedelta

        from torch.distributed import TCPStore

        host, port = split_rendezvous(transfer.rendezvous)
        self.device = device
        self._transfer, self._rank = transfer, rank
        self._store = TCPStore(host, port, transfer.world_size, False, timeout=timedelta(seconds=timeout))
        self._communicator: NcclCommunicator | None = None

    def start(self, buffer: torch.Tensor, spans: Sequence[Span], timeout: float, cancelled: Callable[[], bool]) -> Work:
        communicator = self._communicator or self._connect(timeout, cancelled)
        works = [
            communicator.start(buffer[span.offset : span.offset + span.nbytes], timeout, cancelled) for span in spans
        ]
        return _All(buffer, works)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.close()

    def _connect(self, timeout: float, cancelled: Callable[[], bool]) -> NcclCommunicator:
        from .broadcast import NcclCommunicator

        # Where torch's NCCL backend of rank 0 leaves the id of a group's first communicator.
        key = f"{self._transfer.group}/{self._transfer.group}//cuda//0"
        watch(lambda: bool(self._store.check([key])), timeout, cancelled, "the trainer did not begin to broadcast")
        self._communicator = NcclCommunicator(
            self._store.get(key).hex(), self._rank, self._transfer.world_size, self.device, timeout, cancelled
        )
        return self._communicator


class _All:
    """Several broadcasts into one buffer. They arrive in order."""

    def __init__(self, buffer: torch.Tensor, works: Sequence[Work]) -> None:
        self._buffer, self._works = buffer, works

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        for work in self._works:
            work.wait(timeout, cancelled)
        return self._buffer

    def cancel(self) -> None:
        for work in self._works:
            work.cancel()
