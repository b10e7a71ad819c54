"""How bytes get from the trainer to the workers: one file a transport, both of its ends in it.

A worker opens a ``Source`` for an update's ``Transfer``; a trainer opens a ``Sink``. Both are kept from one update to the
next while they work, and closed after the first failure, so that the next update builds new ones.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from ..protocol import Broadcast, Bucket, CudaIpc, Disk, SharedMemory, Transfer

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    import torch

    from ..worker.receiver import Receiver
    from . import buckets


class Cancelled(Exception):
    """The update was given up while its bytes were on the way."""


def watch(done: Callable[[], bool], timeout: float, cancelled: Callable[[], bool]) -> None:
    """Wait until ``done()``.

    Raises:
        Cancelled: ``cancelled()`` became true. TimeoutError: it took longer than ``timeout`` seconds.
    """
    ends = time.monotonic() + timeout
    pause = 2e-5
    while not done():
        if cancelled():
            raise Cancelled
        if time.monotonic() > ends:
            raise TimeoutError(f"the other side was silent for {timeout:.1f} s")
        time.sleep(pause)
        # Seen at most a tenth later than it was there: an engine that generates pays for each look.
        pause = min(pause * 1.1, 1e-3)


class UnderWay(Protocol):
    """A bucket's bytes on their way."""

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        """The buffer, once all of it is there (or gone, at the trainer's end).

        Raises:
            Cancelled: ``cancelled()`` became true. TimeoutError: it took longer than ``timeout`` seconds.
        """
        ...

    def abandon(self) -> None:
        """Nobody waits for it any more; whatever still writes there does no harm."""
        ...


class Arrived:
    """Bytes that are there already."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        return self._buffer

    def abandon(self) -> None: ...


class Source(Protocol):
    """The worker's end.

    Attributes:
        reusable: whether it can serve another update.
        unchecked: whether the trainer could not look at the values (so the worker must).
        shared: whether the tensors stay where they are, in the trainer's memory, until the commit.
        nbytes: of all weights, where this end knows it; else 0.
    """

    reusable: bool
    unchecked: bool
    shared: bool
    nbytes: int

    @property
    def device(self) -> torch.device:
        """Where buckets arrive."""
        ...

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> UnderWay:
        """Have one bucket come into ``buffer``: ``bucket.nbytes`` of ``uint8`` on ``device``. Several may be under way at once;
        they arrive in the order in which they were started.

        Raises:
            Cancelled: ``cancelled()`` became true. TimeoutError: the sender was silent for ``timeout`` seconds.
        """
        ...

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        """What this transport brings without buckets."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """The trainer's end.

    Attributes:
        transfers: what each engine is told, in the order of the engines.
        bucket_bytes: size of a bucket; a larger tensor gets a bucket of its own.
        slots: how many buckets can be on the way at once.
        announced_is_sent: whether workers read a bucket as soon as they hear of it (so it must be complete by then).
        filled: buckets of the last update whose buffers were not released, by number.
    """

    bucket_bytes: int
    slots: int
    announced_is_sent: bool
    filled: dict[int, buckets.Bucket]

    @property
    def transfers(self) -> Sequence[Transfer]: ...

    def meet(self, opening: Future[None]) -> None:
        """Connect to the workers; ``opening`` is done when all have connected, or has the error of one that could not."""
        ...

    def buffer(self, index: int, nbytes: int) -> tuple[int, torch.Tensor]:
        """Location (see ``protocol.Bucket``) and memory for bucket ``index``: ``nbytes`` of ``uint8``."""
        ...

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> UnderWay:
        """Bring a filled ``buffer``, which was announced to the engines, on its way.

        Raises:
            Cancelled: ``cancelled()`` became true. TimeoutError: it took longer than ``timeout`` seconds.
        """
        ...

    def release(self) -> None:
        """All is sent: free the buffers, keep the connections."""
        ...

    def close(self) -> None: ...


def open_source(transfer: Transfer, receiver: Receiver, timeout: float, cancelled: threading.Event) -> Source:
    """The worker's end of ``transfer``."""
    match transfer:
        case Broadcast():
            from .broadcast import BroadcastSource

            return BroadcastSource(transfer, receiver, timeout, cancelled)
        case SharedMemory():
            from .shared_memory import SharedMemorySource

            return SharedMemorySource(transfer, receiver.device)
        case CudaIpc():
            from .ipc import CudaIpcSource

            return CudaIpcSource(transfer, receiver)
        case Disk():
            from .disk import DiskSource

            return DiskSource(transfer)
