"""``Sending``: one sender's part of an update. It fills buckets, announces each to the engines, and starts its transfer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import msgspec
import torch

from ..errors import ArealError, UpdateAborted
from ..protocol import Bucket, EngineInfo, Segment, TensorMeta
from ..transport.base import Cancelled, PeerLost
from ..transport.buckets import Bucket as FilledBucket
from ..transport.buckets import filled_buckets, nbytes_of

if TYPE_CHECKING:
    from ..integrity.digest import Contents
    from ..transport.base import SharingSink, Sink, Work
    from .context import UpdateContext

    Lock = Callable[[], AbstractContextManager[None]]

# Announcements end at the update's deadline by themselves, with an error that names the engine. Wait this long for it.
_GRACE_SECONDS = 0.5
# A worker that fails closes its connection, and says why over the control connection. Wait this long for it.
_CAUSE_SECONDS = 1.0


class SendReport(msgspec.Struct):
    """What a sender has sent.

    Attributes:
        buckets: how many.
        nbytes: their size.
        entries: each of the sender's tensors, with its digest.
        unchanged: how many of the tensors were not sent, because every engine has them.
    """

    buckets: int
    nbytes: int
    entries: list[tuple[TensorMeta, int]]
    unchanged: int


class Sending:
    """The buckets of one sender.

    Attributes:
        report: what has been sent so far.
    """

    def __init__(
        self,
        context: UpdateContext,
        engines: Mapping[str, tuple[EngineInfo, int]],
        sender: int = 0,
        *,
        first: int = 0,
        adapter: str = "",
        draft: bool = False,
    ) -> None:
        """
        Args:
            context: of the update. Its event loop must not be the calling thread's.
            engines: the engines to send to, by name, with their epochs.
            sender: this sender's number in the update.
            first: how many buckets this sender has sent before.
            adapter: whose tensors these are; empty for base weights.
            draft: whether they are the drafter's.
        """
        self._first, self._adapter, self._draft = first, adapter, draft
        self.report = SendReport(0, 0, [], 0)
        self._context, self._engines, self._sender = context, engines, sender
        self._spans = context.spans
        self._base: Contents = {}
        self._shared: list[tuple[TensorMeta, torch.Tensor]] = []
        self._copied: Iterator[tuple[TensorMeta, torch.Tensor]] = iter(())
        self._persistent: frozenset[int] = frozenset()
        self._ready: Callable[[], tuple[str, Contents] | None] = lambda: None
        # By bucket: the engines' answers, and the transfer.
        self._announced: list[Future[None]] = []
        self._in_flight: list[Work] = []
        self._location = 0
        # What the first engine that failed has answered.
        self._problem = ""

    def split_shareable(
        self,
        sink: Sink,
        pairs: Iterable[tuple[TensorMeta, torch.Tensor]],
        persistent: frozenset[int] = frozenset(),
        ready: Callable[[], tuple[str, Contents] | None] = lambda: None,
    ) -> None:
        """While the workers connect, collect tensors that can be shared in place, up to the first one that must be copied.

        Those that are hashed by the time the workers are ready are announced from here.

        Args:
            sink: the sending end.
            pairs: the tensors. A tensor is no longer used when the next one is taken.
            persistent: addresses of the storages that outlive the update: their tensors can be shared, or copied together.
            ready: returns the update's id and what every engine has, when the workers are ready to receive.
        """
        self._shared, self._persistent, self._ready = [], persistent, ready
        copied = self._not_shared(pairs, sink.sharing) if sink.sharing else iter(pairs)
        self._copied = itertools.chain(list(itertools.islice(copied, 1)), copied)
        # From now on buckets are filled, and a bucket that is announced meanwhile would take the number of its slot.
        self._ready = lambda: None

    def _not_shared(
        self, pairs: Iterable[tuple[TensorMeta, torch.Tensor]], sharing: SharingSink
    ) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """Yield what must be copied; collect what ``sharing`` takes of the persistent storages."""
        for meta, tensor in pairs:
            if tensor.untyped_storage().data_ptr() in self._persistent and sharing.offer(meta, tensor):
                self._shared.append((meta, tensor))
                if (found := self._ready()) is not None and (bucket := sharing.next_announcement()) is not None:
                    update, self._base = found
                    self._announce_one(update, bucket)
            else:
                yield meta, tensor

    @property
    def all_tensors(self) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """All tensors that ``split_shareable`` was given, for another sink."""
        return itertools.chain(self._shared, self._copied)

    def send(
        self,
        update: str,
        sink: Sink,
        bucket_bytes: int,
        lock: Lock | None = None,
        base: Contents | None = None,
        *,
        keep_buffers: bool = False,
    ) -> None:
        """Send all tensors that ``split_shareable`` was given; returns when every worker holds them.

        Args:
            update: the update's id.
            sink: the sending end, connected to the workers.
            bucket_bytes: size of a bucket.
            lock: held while a bucket is in flight, if other senders must not send at the same time.
            base: what every engine has; equal tensors are not sent.
            keep_buffers: whether ``sink`` keeps its memory for the next update.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
            UpdateAborted: an engine failed, which the message names, or the time is over.
        """
        self._base = base or {}
        try:
            self._send_copied(update, sink, bucket_bytes, lock)
            if self._shared and sink.sharing:
                with self._spans.span("sending", "share"):
                    self._announce_shared(update, sink.sharing)
            with self._spans.span("sending", "wait until all is held"):
                for work in self._in_flight[-sink.slots :]:
                    work.wait(self._left(), self._failed)
                for announced in self._announced:
                    announced.result(timeout=self._left() + _GRACE_SECONDS)
        except BaseException as error:
            refusal = self._refusal_behind(error)
            for work in self._in_flight[-sink.slots :]:
                work.cancel()
            if refusal is not None:
                raise refusal from None
            over = self._context.closed.is_set() or self._context.left <= 0
            if isinstance(error, (Cancelled, TimeoutError, FutureTimeout)) or (
                over and isinstance(error, UpdateAborted)
            ):
                raise UpdateAborted(self._context.given_up(self._progress(error))) from error
            raise
        if not keep_buffers:
            sink.release()

    def _send_copied(self, update: str, sink: Sink, bucket_bytes: int, lock: Lock | None) -> None:
        memory = functools.partial(self._memory, sink)
        buckets = filled_buckets(self._copied, bucket_bytes, memory, self._persistent, sink.filled)
        for filled in self._spans.each("sending", "fill", buckets):
            if self._context.left <= 0:
                late = -self._context.left
                raise TimeoutError(
                    f"the source of the tensors took that long: the next ones came {late:.1f} s after it"
                )
            if (bucket := self._described(update, sink, filled)) is not None:
                self._start(sink, bucket, filled.filled, lock)

    def _memory(self, sink: Sink, nbytes: int) -> torch.Tensor:
        """Return memory for the next bucket.

        A slot is free when its previous bucket has been sent or, for shared slots, when every worker has copied it.
        """
        if len(self._announced) >= sink.slots:
            with self._spans.span("sending", "wait for a slot"):
                if sink.announced_is_sent:
                    self._announced[-sink.slots].result(timeout=self._left() + _GRACE_SECONDS)
                else:
                    self._in_flight[-sink.slots].wait(self._left(), self._failed)
        self._location, buffer = sink.buffer(self._first + self.report.buckets, nbytes)
        return buffer

    def _described(self, update: str, sink: Sink, filled: FilledBucket) -> Bucket | None:
        """Return the announcement of a bucket, complete in memory; None if the engines have all of its tensors."""
        if sink.announced_is_sent and filled.filled.device.type != "cpu":
            torch.accelerator.synchronize(filled.filled.device)
        with self._spans.span("sending", f"digest {self.report.buckets}"):
            all_segments = filled.segments()
            segments, digests = self._changed(all_segments, filled.digests())
        if not segments:
            return None
        if len(segments) < len(all_segments):
            segments = filled.keep_only(segments)
        return self._numbered(
            Bucket(
                epoch=0,
                update=update,
                index=0,
                segments=segments,
                digests=digests,
                nbytes=filled.nbytes,
                location=self._location,
            )
        )

    def _start(self, sink: Sink, bucket: Bucket, filled: torch.Tensor, lock: Lock | None) -> None:
        """Announce a bucket, so that the workers wait for it, and start its transfer."""
        with lock() if lock else contextlib.nullcontext():
            self._announced.append(self._announce(bucket))
            if not sink.announced_is_sent:
                with self._spans.span("sending", f"start {bucket.index}"):
                    self._in_flight.append(sink.start(filled, self._context.left, self._failed))
                if lock:
                    self._in_flight[-1].wait(self._left(), self._failed)

    def _announce_shared(self, update: str, sharing: SharingSink) -> None:
        for bucket in sharing.announcements():
            self._announce_one(update, bucket)

    def _announce_one(self, update: str, bucket: Bucket) -> None:
        """Announce those shared tensors of a bucket that the engines do not have."""
        segments, digests = self._changed(bucket.segments, bucket.digests)
        if segments:
            nbytes = sum(nbytes_of(segment.tensor) for segment in segments)
            changed = msgspec.structs.replace(bucket, update=update, segments=segments, digests=digests, nbytes=nbytes)
            self._announced.append(self._announce(self._numbered(changed)))

    def _changed(
        self, segments: tuple[Segment, ...], digests: Sequence[int]
    ) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
        """Return the segments, with their digests, that the engines do not have."""
        entries = [(segment.tensor, value) for segment, value in zip(segments, digests, strict=True)]
        self.report.entries += entries
        if not self._base:
            return segments, tuple(digests)
        changed = [place for place, entry in enumerate(entries) if self._base.get(entry[0].name) != entry]
        self.report.unchanged += len(segments) - len(changed)
        return tuple(segments[place] for place in changed), tuple(digests[place] for place in changed)

    def _numbered(self, bucket: Bucket) -> Bucket:
        """Return ``bucket`` with the next index, and count it."""
        numbered = msgspec.structs.replace(
            bucket, index=self._first + self.report.buckets, adapter=self._adapter, draft=self._draft
        )
        self.report.buckets += 1
        self.report.nbytes += bucket.nbytes
        return numbered

    def _announce(self, bucket: Bucket) -> Future[None]:
        if self._context.closed.is_set():
            raise Cancelled
        return asyncio.run_coroutine_threadsafe(self.announce(bucket), self._context.loop)

    async def announce(self, bucket: Bucket) -> None:
        """Announce a bucket to every engine; returns when every worker holds it.

        Raises:
            UpdateAborted: an engine failed; the message names it.
        """
        # Engines of one epoch get the same message, which is encoded once: it names every tensor.
        messages = {
            epoch: msgspec.structs.replace(bucket, epoch=epoch, sender=self._sender)
            for epoch in {epoch for _, epoch in self._engines.values()}
        }
        requests = {name: (engine.address, messages[epoch]) for name, (engine, epoch) in self._engines.items()}
        with self._spans.span("announced", f"announce {bucket.index}"):
            timeout = max(self._context.left, 0.05)
            outcomes = await self._context.link.request_all(requests, timeout, until_error=True)
        for name, outcome in outcomes.items():
            if isinstance(outcome, ArealError):
                self._problem = self._problem or f"{name}: {outcome}"
                raise UpdateAborted(self._context.given_up(f"{name}: {outcome}"))

    def _progress(self, error: BaseException) -> str:
        """Say why the bytes did not get through, and how far they got."""
        if self._context.closed.is_set():
            cause = "its block was left while it was sending"
        elif self._context.left <= 0:
            detail = f" ({error})" if str(error) and not isinstance(error, UpdateAborted) else ""
            cause = f"its timeout of {self._context.options.timeout:g} s was over while tensors were being sent{detail}"
        else:
            cause = str(error) or type(error).__name__
        if self._context.left <= 0:
            # Requests that were sent before end at the deadline too, and name the engine that does not answer.
            concurrent.futures.wait(self._announced, _GRACE_SECONDS, return_when=concurrent.futures.FIRST_EXCEPTION)
        arrived = sum(one.done() and not one.cancelled() and one.exception() is None for one in self._announced)
        problem = f"; {self._problem}" if self._problem else ""
        return f"{cause}: {arrived} of {len(self._announced)} announced buckets have arrived at every engine{problem}"

    def _failed(self) -> bool:
        return self._context.closed.is_set() or self._refusal() is not None

    def _refusal(self) -> BaseException | None:
        """Return the error of an engine that did not take a bucket; None if there is none."""
        errors = (future.exception() for future in tuple(self._announced) if future.done() and not future.cancelled())
        return next((error for error in errors if error is not None), None)

    def _refusal_behind(self, error: BaseException) -> BaseException | None:
        """Return the error of an engine that explains why a transfer ended with ``error``; None if there is none."""
        if self._context.closed.is_set() or self._context.left <= 0 or not isinstance(error, (Cancelled, PeerLost)):
            return None
        if isinstance(error, PeerLost):
            seconds = min(_CAUSE_SECONDS, self._left())
            concurrent.futures.wait(self._announced, seconds, return_when=concurrent.futures.FIRST_EXCEPTION)
        return self._refusal()

    def _left(self) -> float:
        return max(self._context.left, 0.0)
