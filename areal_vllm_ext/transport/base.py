"""What every transport has: a source at the worker, a sink at the trainer, and work that is in flight between them.

A worker opens a ``Source`` for an update's ``Transfer``; a trainer opens a ``Sink``. Both are kept for the next update while
they work. Both are closed after their first failure, so the next update opens new ones.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    import torch

    from ..protocol import Bucket, TensorMeta, Transfer
    from . import buckets


class Cancelled(Exception):
    """The update was given up while its bytes were in flight."""


class PeerLost(RuntimeError):
    """The connection to a peer broke. The peer may say why over the control connection."""


class WorkerSite(NamedTuple):
    """Where a worker is, as far as transports need to know.

    Attributes:
        rank: its rank inside the engine.
        device: where its model is.
    """

    rank: int
    device: torch.device


def watch(
    done: Callable[[], bool], timeout: float, cancelled: Callable[[], bool], late: str = "it was not done"
) -> None:
    """Poll until ``done()``.

    Args:
        done: what is waited for.
        timeout: seconds.
        cancelled: whether to give up.
        late: what has not happened when the time is over, for the message.

    Raises:
        Cancelled: ``cancelled()`` became true.
        TimeoutError: it took longer than ``timeout`` seconds.
    """
    ends = time.monotonic() + timeout
    pause = 2e-5
    while not done():
        if cancelled():
            raise Cancelled
        if time.monotonic() > ends:
            raise TimeoutError(f"{late} within {timeout:.1f} s")
        time.sleep(pause)
        # Back off by 10 % per poll: completion is seen at most 10 % late, and each poll costs the generating engine time.
        pause = min(pause * 1.1, 1e-3)


class Work(Protocol):
    """A bucket whose bytes are in flight."""

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        """Return the buffer once all of its bytes have arrived (at the trainer: have left).

        Raises:
            Cancelled: ``cancelled()`` became true.
            TimeoutError: it took longer than ``timeout`` seconds.
            PeerLost: the connection to a peer broke.
        """
        ...

    def cancel(self) -> None:
        """Give the transfer up. Whatever still writes into the buffer does no harm."""
        ...


class CompletedWork:
    """A bucket whose bytes had arrived when the transfer was started."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        return self._buffer

    def cancel(self) -> None: ...


class Source(Protocol):
    """The worker's end.

    Attributes:
        reusable: whether it can serve another update.
        unchecked: whether the trainer checked nothing. So the worker checks the values for NaN and infinity, and computes the
            digests of what arrives; the vote compares them with those of the other workers.
        nbytes: size of all weights if this end knows it, else 0.
    """

    reusable: bool
    unchecked: bool
    nbytes: int

    @property
    def sharing(self) -> SharingSource | None:
        """How this end reads tensors in the trainer's own memory; None if this transport cannot."""
        ...

    @property
    def device(self) -> torch.device:
        """Where buckets arrive."""
        ...

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        """Start to receive a bucket into ``buffer``: ``bucket.nbytes`` of ``uint8`` on ``device``.

        Several can be in flight at once. They arrive in the order in which they were started.

        Raises:
            Cancelled: ``cancelled()`` became true.
            TimeoutError: the sender was silent for ``timeout`` seconds.
        """
        ...

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Read what this transport brings without buckets."""
        ...

    def close(self) -> None: ...


class SharingSource(Protocol):
    """The worker's end of zero-copy."""

    @property
    def in_place(self) -> bool:
        """Whether the worker stages the trainer's memory itself instead of a copy."""
        ...

    def views(self, bucket: Bucket) -> buckets.UnpackedBucket:
        """Return a bucket's tensors in the trainer's own memory.

        Raises:
            RuntimeError: the memory cannot be opened.
            ValueError: a tensor does not lie inside it.
        """
        ...

    def start_copy(self, bucket: Bucket, buffer: torch.Tensor) -> Work:
        """Start to copy a bucket's tensors into ``buffer``. Raises as ``views`` does."""
        ...

    def stamp(self) -> torch.Tensor:
        """Return one int64 that equals ``bucket.stamp`` until the trainer revokes its memory."""
        ...


class Sink(Protocol):
    """The trainer's end.

    Attributes:
        transfers: what each engine has to know to open its end, in the order of the engines.
        bucket_bytes: size of a bucket; a larger tensor gets a bucket of its own.
        slots: how many buckets can be in flight at once.
        announced_is_sent: whether workers read a bucket as soon as it is announced, so that it must be complete by then.
        filled: buckets of the last update whose buffers were not released, by number.
    """

    bucket_bytes: int
    slots: int
    announced_is_sent: bool
    filled: dict[int, buckets.Bucket]

    @property
    def sharing(self) -> SharingSink | None:
        """How this end shares tensors in place; None if this transport cannot."""
        ...

    @property
    def transfers(self) -> Sequence[Transfer]: ...

    def connect(self, opening: Future[None]) -> None:
        """Connect to the workers.

        Args:
            opening: done when all workers have connected, or has the error of one that could not.
        """
        ...

    def buffer(self, index: int, nbytes: int) -> tuple[int, torch.Tensor]:
        """Return location (see ``protocol.Bucket``) and memory (``nbytes`` of ``uint8``) for bucket ``index``."""
        ...

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        """Start to send a filled ``buffer``, which was announced to the engines.

        Raises:
            Cancelled: ``cancelled()`` became true.
            TimeoutError: it took longer than ``timeout`` seconds.
        """
        ...

    def release(self) -> None:
        """Free the buffers after all is sent. Keep the connections."""
        ...

    def close(self) -> None: ...


class SharingSink(Protocol):
    """The trainer's end of zero-copy: workers read tensors where they live in the trainer.

    Attributes:
        batch_bytes: size of one announcement's tensors, if they are smaller than that.
    """

    batch_bytes: int

    @property
    def transfers(self) -> Sequence[Transfer]:
        """``Sink.transfers`` for an update that shares what it can."""
        ...

    def offer(self, meta: TensorMeta, tensor: torch.Tensor) -> bool:
        """Share ``tensor`` if workers can read it where it is. It must not change until ``revoke``."""
        ...

    def next_announcement(self) -> Bucket | None:
        """Return the announcement of the oldest batch of shared tensors, if others can be hashed meanwhile.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
        """
        ...

    def announcements(self) -> Iterator[Bucket]:
        """Yield announcements of all shared tensors that ``next_announcement`` has not returned.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
        """
        ...

    def first_changed(self) -> str | None:
        """Return the name of a shared tensor that was written to since it was offered."""
        ...

    def revoke(self) -> None:
        """End the sharing. A worker that loads later learns it from its stamp."""
        ...
