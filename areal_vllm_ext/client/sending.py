"""One sender's part of an update: its tensors in buckets, each announced to the engines and put on its way."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import msgspec
import torch

from ..errors import ArealError, UpdateAborted
from ..observability.spans import DISABLED, SpanRecorder
from ..protocol import Bucket, EngineInfo, Segment, TensorMeta, Version
from ..transport.base import Cancelled
from ..transport.buckets import Bucket as FilledBucket
from ..transport.buckets import filled_buckets, nbytes_of
from ..transport.device import device_id

if TYPE_CHECKING:
    from ..control.link import Link
    from ..integrity.digest import Contents
    from ..transport.base import SharingSink, Sink, Work


class Sending:
    """The buckets of one sender.

    Attributes:
        buckets, nbytes: how much was sent.
        entries: each tensor with its digest; ``kept`` of them were not sent, because the engines have them.
    """

    def __init__(
        self,
        link: Link,
        loop: asyncio.AbstractEventLoop,
        engines: Mapping[str, tuple[EngineInfo, int]],
        version: Version,
        ends: float,
        sender: int = 0,
        spans: SpanRecorder = DISABLED,
    ) -> None:
        """
        Args:
            link: the connection to the engines.
            loop: the event loop of ``link``; not the calling thread's.
            engines: those that this sender sends to, by name, with their epochs.
            version: of the weights, for people.
            ends: when, by ``time.monotonic()``, it is given up.
            sender: its number in the update.
            spans: where to record what is done.
        """
        self._link, self._loop, self._engines = link, loop, engines
        self._version, self._ends, self._sender = version, ends, sender
        self._spans = spans
        self.buckets = 0
        self.nbytes = 0
        self.entries: list[tuple[TensorMeta, int]] = []
        self.kept = 0
        self._base: Contents = {}
        self._shared: list[tuple[TensorMeta, torch.Tensor]] = []
        self._travelling: Iterator[tuple[TensorMeta, torch.Tensor]] = iter(())
        self._lasting: frozenset[int] = frozenset()
        # Of each bucket: the engines' answers, and its bytes.
        self._announced: list[Future[None]] = []
        self._under_way: list[Work] = []
        self._location = 0

    def part(
        self,
        sink: Sink,
        pairs: Iterable[tuple[TensorMeta, torch.Tensor]],
        lasting: frozenset[int] = frozenset(),
    ) -> None:
        """Look, while the workers get ready, for what can be lent to them: up to the first tensor that has to travel.

        Args:
            sink: the sending end.
            pairs: the tensors; each is done with when the next is asked for.
            lasting: where storages begin that outlive the update: their tensors can be lent, or copied together.
        """
        self._shared, self._lasting = [], lasting
        travelling = without_shared(pairs, sink.sharing, lasting, self._shared) if sink.sharing else iter(pairs)
        self._travelling = itertools.chain(list(itertools.islice(travelling, 1)), travelling)

    @property
    def parted(self) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """What ``part`` was given, for another sink."""
        return itertools.chain(self._shared, self._travelling)

    def send(
        self,
        update: str,
        sink: Sink,
        bucket_bytes: int,
        turn: Callable[[], AbstractContextManager[None]] | None = None,
        base: Contents | None = None,
        *,
        keep_buffers: bool = False,
    ) -> None:
        """Send all that was given to ``part`` through ``sink``, which has met the workers; returns when every worker holds it.

        Args:
            update: the update's id.
            sink: the sending end.
            bucket_bytes: size of a bucket.
            turn: held while a bucket is on its way, where others must not be.
            base: what every engine has; tensors that are the same are not sent.
            keep_buffers: whether ``sink`` keeps its memory for the next update.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
            UpdateAborted: naming the engine that failed. TimeoutError, Cancelled: the bytes did not get through.
        """
        self._base = base or {}
        try:
            memory = functools.partial(self._memory, sink)
            buckets = filled_buckets(self._travelling, bucket_bytes, memory, self._lasting, sink.filled)
            for filled in self._spans.each("sending", "fill", buckets):
                if (bucket := self._described(update, sink, filled)) is not None:
                    self._start(sink, bucket, filled.filled, turn)
            if self._shared and sink.sharing:
                with self._spans.span("sending", "share"):
                    self._share(update, sink.sharing)
            with self._spans.span("sending", "wait until all is held"):
                for under_way in self._under_way[-sink.slots :]:
                    under_way.wait(max(self._left(), 0), self._failed)
                for announced in self._announced:
                    announced.result(timeout=max(self._left(), 0))
        except BaseException as error:
            for under_way in self._under_way[-sink.slots :]:
                under_way.cancel()
            if isinstance(error, Cancelled) and (refusal := self._refusal()) is not None:
                raise refusal from None
            raise
        if not keep_buffers:
            sink.release()

    def _memory(self, sink: Sink, nbytes: int) -> torch.Tensor:
        """For the next bucket. A slot is free when what lay in it has gone; where workers read it, when they have copied it."""
        if self.buckets >= sink.slots:
            with self._spans.span("sending", "wait for a slot"):
                if sink.announced_is_sent:
                    self._announced[-sink.slots].result(timeout=max(self._left(), 0))
                else:
                    self._under_way[-sink.slots].wait(max(self._left(), 0), self._failed)
        self._location, buffer = sink.buffer(self.buckets, nbytes)
        return buffer

    def _described(self, update: str, sink: Sink, filled: FilledBucket) -> Bucket | None:
        """The announcement of a bucket, whose bytes are there when this returns; None where the engines have all of it."""
        if sink.announced_is_sent and filled.filled.device.type != "cpu":
            torch.accelerator.synchronize(filled.filled.device)
        with self._spans.span("sending", f"digest {self.buckets}"):
            whole = filled.segments()
            segments, digests = self._changed(whole, filled.digests())
        if not segments:
            return None
        if len(segments) < len(whole):
            segments = filled.keep_only(segments)
        bucket = Bucket(
            epoch=0,
            update=update,
            index=self.buckets,
            segments=segments,
            digests=digests,
            nbytes=filled.nbytes,
            location=self._location,
        )
        self._count(bucket)
        return bucket

    def _start(
        self,
        sink: Sink,
        bucket: Bucket,
        filled: torch.Tensor,
        turn: Callable[[], AbstractContextManager[None]] | None,
    ) -> None:
        """Bring a bucket on its way. The workers are told of it now, so that they wait for it when its turn comes."""
        with turn() if turn else contextlib.nullcontext():
            self._announced.append(self._announce(bucket))
            if not sink.announced_is_sent:
                with self._spans.span("sending", f"start {bucket.index}"):
                    self._under_way.append(sink.start(filled, self._left(), self._failed))
                if turn:
                    self._under_way[-1].wait(self._left(), self._failed)

    def _failed(self) -> bool:
        return self._refusal() is not None or self._left() <= 0

    def _refusal(self) -> BaseException | None:
        """What an engine answered instead of taking a bucket, if one did."""
        errors = (future.exception() for future in tuple(self._announced) if future.done() and not future.cancelled())
        return next((error for error in errors if error is not None), None)

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _share(self, update: str, sharing: SharingSink) -> None:
        for bucket in sharing.announcements():
            segments, digests = self._changed(bucket.segments, bucket.digests)
            if segments:
                nbytes = sum(nbytes_of(segment.tensor) for segment in segments)
                numbered = msgspec.structs.replace(
                    bucket, update=update, index=self.buckets, segments=segments, digests=digests, nbytes=nbytes
                )
                self._count(numbered)
                self._announced.append(self._announce(numbered))

    def _changed(
        self, segments: tuple[Segment, ...], digests: Sequence[int]
    ) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
        """Those that the engines do not have."""
        entries = [(segment.tensor, value) for segment, value in zip(segments, digests, strict=True)]
        self.entries += entries
        if not self._base:
            return segments, tuple(digests)
        changed = [place for place, entry in enumerate(entries) if self._base.get(entry[0].name) != entry]
        self.kept += len(segments) - len(changed)
        return tuple(segments[place] for place in changed), tuple(digests[place] for place in changed)

    def _count(self, bucket: Bucket) -> None:
        self.buckets += 1
        self.nbytes += bucket.nbytes

    def _announce(self, bucket: Bucket) -> Future[None]:
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
        with self._spans.span("announced", f"announce {bucket.index}"):
            outcomes = await self._link.request_all(requests, max(self._left(), 0.05), until_error=True)
        for name, outcome in outcomes.items():
            if isinstance(outcome, ArealError):
                raise UpdateAborted(f"update to version {self._version}: {name}: {outcome}")


def without_shared(
    pairs: Iterable[tuple[TensorMeta, torch.Tensor]],
    sharing: SharingSink,
    lasting: frozenset[int],
    shared: list[tuple[TensorMeta, torch.Tensor]],
) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
    """Yield what has to travel. Tensors of the storages at ``lasting`` that can be shared in place go to ``shared``."""
    for meta, tensor in pairs:
        if tensor.untyped_storage().data_ptr() in lasting and sharing.offer(meta, tensor):
            shared.append((meta, tensor))
        else:
            yield meta, tensor


def choose_transport(asked: str, device: torch.device, engines: Iterable[EngineInfo], *, apart: bool = False) -> str:
    """The transport that ``auto`` means for tensors on ``device``; ``apart``: other GPUs cannot be reached by memory."""
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "broadcast"
    workers = {worker.device_id for engine in engines for worker in engine.workers}
    # NCCL has one rank a device: a worker on the trainer's own device is reached by memory. So is one on a GPU of this host
    # that can read the trainer's: a copy takes nothing from generation. Several would share what leaves the trainer's GPU;
    # NCCL's broadcast passes it on from worker to worker.
    if device_id(device) in workers:
        return "ipc"
    return "ipc" if len(workers) == 1 and workers <= near(device) and not apart else "broadcast"


def near(device: torch.device) -> set[str]:
    """The GPUs that this process sees and that can read the memory of ``device``, itself included."""
    every = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {device_id(other) for other in every if other == device or torch.cuda.can_device_access_peer(other, device)}
