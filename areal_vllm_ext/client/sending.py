"""One sender's part of an update: its tensors in buckets, each announced to the engines and put on its way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import msgspec
import torch

from ..errors import ArealError, InvalidWeights, UpdateAborted
from ..protocol import Bucket, EngineInfo, TensorMeta, Version
from ..spans import OFF, Spans
from ..transport.buckets import filled_buckets, not_finite
from ..transport.ipc import CudaIpcSink, device_id

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ..transport import Sink
    from .group import AsyncEngineGroup


class Sending:
    """The buckets of one sender.

    Attributes:
        begun: whether an engine may have heard of a bucket.
        buckets, nbytes: how much was sent.
        entries: what was sent: each tensor with its digest.
    """

    def __init__(
        self,
        group: AsyncEngineGroup,
        loop: asyncio.AbstractEventLoop,
        engines: Mapping[str, tuple[EngineInfo, int]],
        version: Version,
        ends: float,
        sender: int = 0,
        spans: Spans = OFF,
    ) -> None:
        """
        Args:
            group: whose connection is used.
            loop: the event loop of ``group``; not the calling thread's.
            engines: those that this sender sends to, by name, with their epochs.
            version: of the weights, for people.
            ends: when, by ``time.monotonic()``, it is given up.
            sender: its number in the update.
            spans: where to record what is done.
        """
        self._group, self._loop, self._engines = group, loop, engines
        self._version, self._ends, self._sender = version, ends, sender
        self._spans = spans
        self.begun = False
        self.buckets = 0
        self.nbytes = 0
        self.entries: list[tuple[TensorMeta, int]] = []

    def send(
        self,
        update: str,
        sink: Sink,
        pairs: Iterator[tuple[TensorMeta, torch.Tensor]],
        bucket_bytes: int,
        turn: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        lasting: frozenset[int] = frozenset(),
    ) -> None:
        """Send all of ``pairs`` through ``sink``, which has met the workers; returns when every worker holds them.

        Args:
            update: the update's id.
            sink: the sending end.
            pairs: the tensors; each is done with when the next is asked for.
            bucket_bytes: size of a bucket.
            turn: held while a bucket is on its way.
            lasting: where storages begin that outlive the update: their tensors can be lent to the workers.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
            UpdateAborted: naming the engine that failed. TimeoutError, Cancelled: the bytes did not get through.
        """
        announced: list[Future[None]] = []

        def failed() -> bool:
            return any(future.done() and future.exception() is not None for future in announced) or self._left() <= 0

        location = 0

        def memory(nbytes: int) -> torch.Tensor:
            nonlocal location
            # A slot is free again when the workers have copied what lay in it some buckets ago.
            if len(announced) >= sink.slots:
                with self._spans.during("sending", "wait for a slot"):
                    announced[-sink.slots].result(timeout=max(self._left(), 0))
            location, buffer = sink.buffer(self.buckets, nbytes)
            return buffer

        lent: list[tuple[TensorMeta, torch.Tensor]] = []
        travelling = without_lent(pairs, sink, lasting, lent) if isinstance(sink, CudaIpcSink) else pairs
        buckets = filled_buckets(travelling, bucket_bytes, memory)
        for filled in self._spans.each("sending", "fill", buckets):
            if name := filled.not_finite():
                raise InvalidWeights(f"{name} holds NaN or infinite values")
            if sink.announced_is_sent and filled.filled.device.type != "cpu":
                torch.accelerator.synchronize(filled.filled.device)
            with self._spans.during("sending", f"digest {self.buckets}"):
                segments = filled.segments()
            bucket = Bucket(
                epoch=0,
                update=update,
                index=self.buckets,
                nbytes=filled.nbytes,
                segments=segments,
                location=location,
            )
            with turn(), self._spans.during("sending", f"push {bucket.index}"):
                announced.append(self._announced(bucket))
                sink.push(filled.filled, self._left(), failed)
        if lent and isinstance(sink, CudaIpcSink):
            announced += self._lend(update, sink, lent)
        with self._spans.during("sending", "wait until all is held"):
            for future in announced:
                future.result(timeout=max(self._left(), 0))
        sink.release()

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _lend(
        self, update: str, sink: CudaIpcSink, tensors: list[tuple[TensorMeta, torch.Tensor]]
    ) -> Iterator[Future[None]]:
        if name := not_finite((meta.name, tensor) for meta, tensor in tensors):
            raise InvalidWeights(f"{name} holds NaN or infinite values")
        for bucket in sink.lend(tensors):
            yield self._announced(msgspec.structs.replace(bucket, update=update, index=self.buckets))

    def _announced(self, bucket: Bucket) -> Future[None]:
        self.entries += [(segment.tensor, segment.digest) for segment in bucket.segments]
        self.buckets += 1
        self.nbytes += bucket.nbytes
        self.begun = True
        return asyncio.run_coroutine_threadsafe(self.announce(bucket), self._loop)

    async def announce(self, bucket: Bucket) -> None:
        """Tell every engine of a bucket; returns when every worker holds it.

        Raises:
            UpdateAborted: naming the engine that failed.
        """

        # One message for all engines of an epoch is encoded once: it names every tensor.
        own = {
            epoch: msgspec.structs.replace(bucket, epoch=epoch, sender=self._sender)
            for epoch in {epoch for _, epoch in self._engines.values()}
        }
        requests = {name: (engine.address, own[epoch]) for name, (engine, epoch) in self._engines.items()}
        with self._spans.during("announced", f"announce {bucket.index}"):
            outcomes = await self._group.request_all(requests, max(self._left(), 0.05), until_error=True)
        for name, outcome in outcomes.items():
            if isinstance(outcome, ArealError):
                raise UpdateAborted(f"update to version {self._version}: {name}: {outcome}")


def without_lent(
    pairs: Iterator[tuple[TensorMeta, torch.Tensor]],
    sink: CudaIpcSink,
    lasting: frozenset[int],
    lent: list[tuple[TensorMeta, torch.Tensor]],
) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
    """What has to travel; what ``sink`` can lend of the storages that begin at ``lasting`` is put into ``lent``."""
    for meta, tensor in pairs:
        if tensor.untyped_storage().data_ptr() in lasting and sink.can_lend(tensor):
            lent.append((meta, tensor))
        else:
            yield meta, tensor


def choose_transport(asked: str, device: torch.device, engines: Iterable[EngineInfo]) -> str:
    """The transport that ``auto`` means for tensors on ``device``."""
    if asked != "auto":
        return asked
    # NCCL has one rank a device: a worker on the trainer's own device is reached by memory.
    if device.type == "cuda":
        own = device_id(device)
        if any(worker.device_id == own for engine in engines for worker in engine.workers):
            return "ipc"
    return "broadcast"
