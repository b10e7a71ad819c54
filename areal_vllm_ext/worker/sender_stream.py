"""What one sender brings to an update: buckets, received in order on a thread of their own.

Everything that can block happens on that thread: joining a communicator, receiving, reading files. If the sender dies, the
thread ends by the update's deadline, and neither the worker nor another sender nor the next update waits for it.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
from typing import TYPE_CHECKING, NamedTuple

from .. import errors
from ..integrity import digest
from ..process.collector import no_collection
from ..protocol import Bucket, Prepare, TorchGroup
from ..transport.base import Cancelled
from ..transport.buckets import UnpackedBucket, first_corrupt, first_different, packed_layout, unpack
from . import background
from .staged_update import IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..protocol import Segment, Transfer
    from ..transport.base import Source, Work
    from .staged_update import StagedUpdate

logger = logging.getLogger("vllm.areal_vllm_ext")

# In place of an order: a bucket in flight needs attention first.
_NO_ORDER = object()


class InFlightBucket(NamedTuple):
    """A bucket being received.

    ``segments`` is its layout. ``work`` is the pending transfer, None if the data is already in place. ``unpacked`` is the
    bucket of an earlier update in the same buffer, if any. ``digests`` waits for the digests of data that is in place: the
    device takes those of one bucket while Python handles the one before.
    """

    order: Bucket
    segments: tuple[Segment, ...]
    unpacked: UnpackedBucket | None
    work: Work | None
    digests: Callable[[], list[int]] | None = None


class ArrivedBucket(NamedTuple):
    """A bucket whose bytes are here, not checked yet.

    ``received`` is what they arrived in; None if they were in place. Then ``digests`` waits for their digests.
    """

    order: Bucket
    unpacked: UnpackedBucket
    received: torch.Tensor | None
    digests: Callable[[], list[int]] | None


class SenderStream:
    """Receives what one sender sends in one update."""

    def __init__(self, update: StagedUpdate, number: int, transfer: Transfer) -> None:
        self._update, self._number, self._transfer = update, number, transfer
        self._track = f"worker {update.context.rank}, from sender {number}"  # of its spans
        self._step = "begin"  # the step in progress, for error messages
        self._orders: queue.SimpleQueue[Bucket | Prepare | None] = queue.SimpleQueue()
        self._in_flight: collections.deque[InFlightBucket] = collections.deque()
        self._arrived: ArrivedBucket | None = None
        # Reorder buffer: announcements that came early, and the index of the next bucket on the wire.
        self._early: dict[int, Bucket] = {}
        self._next_index = 0

    def start(self) -> None:
        name = f"areal-receive-{self._update.begin.update[:8]}-{self._number}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, bucket: Bucket) -> None:
        """Queue an announcement, in the order of the bytes on the wire.

        After a lost connection, announcements arrive in any order.
        """
        if bucket.index >= self._next_index:
            self._early[bucket.index] = bucket
        while (following := self._early.pop(self._next_index, None)) is not None:
            self._next_index += 1
            self._orders.put(following)

    def prepare(self, order: Prepare) -> None:
        """Vote when all buckets so far are staged."""
        self._orders.put(order)

    def stop(self) -> None:
        """End the thread after the orders so far."""
        self._orders.put(None)

    # The thread

    def _run(self) -> None:
        with background.on_side_stream(self._update.context.device):
            self._serve()

    def _serve(self) -> None:
        update, sources = self._update, self._update.context.sources
        source: Source | None = None
        try:
            with update.spans.span(self._track, "open"):
                senders = len(update.received)
                source = sources.open(self._transfer, update.seconds_left, update.cancelled, senders)
                is_last = update.add_source(self._number, source)
            if is_last:
                update.report("begin", manifest=update.base_manifest)
            self._follow_orders(source)
        except Cancelled:
            sources.drop(source)
        except Exception as error:
            logger.warning(
                "areal_vllm_ext: update %s failed in step %s", update.begin.update, self._step, exc_info=True
            )
            sources.drop(source)
            if not update.cancelled.is_set():
                update.report(self._step, f"{self._step}: {type(error).__name__}: {error}")
        finally:
            if update.cancelled.is_set():
                if isinstance(self._transfer, TorchGroup) and self._next_index:
                    # The trainer may wait in a broadcast that no worker receives any more. Its call fails now.
                    sources.drop(source)
                update.free()
            if source is not None and not source.reusable:
                source.close()

    def _follow_orders(self, source: Source) -> None:
        """Carry out the orders. While a bucket is checked, the bytes of those after it arrive."""
        try:
            while (order := self._next_order()) is not None:
                if isinstance(order, Bucket):
                    self._in_flight.append(self._start(source, order))
                elif isinstance(order, Prepare):
                    while self._busy:
                        self._advance(source)
                    self._vote(order)
                else:
                    self._advance(source)
        finally:
            for bucket in self._in_flight:
                if bucket.work is not None:
                    bucket.work.cancel()
            # The source may be closed next, and memory must not be unmapped while the device reads it.
            reading = [bucket.digests for bucket in self._in_flight]
            for digests in (*reading, self._arrived.digests if self._arrived else None):
                if digests is not None:
                    with contextlib.suppress(Exception):
                        digests()

    @property
    def _busy(self) -> bool:
        """Whether a bucket is in flight, or not checked yet."""
        return bool(self._in_flight) or self._arrived is not None

    def _next_order(self) -> Bucket | Prepare | object | None:
        """Return the next order, ``_NO_ORDER`` if a bucket in flight comes first, or None if no more will come."""
        if len(self._in_flight) >= IN_FLIGHT:
            return _NO_ORDER
        try:
            return self._orders.get(timeout=0 if self._busy else max(self._update.seconds_left, 0.0))
        except queue.Empty:
            # After the deadline the engine has given the update up too. Prepared weights are the engine's to discard.
            return _NO_ORDER if self._busy else None

    def _advance(self, source: Source) -> None:
        """Check the bucket that has arrived; without one, wait for the oldest in flight."""
        if self._arrived is None:
            self._arrived = self._receive(self._in_flight.popleft())
        else:
            arrived, self._arrived = self._arrived, None
            self._check(source, arrived)

    def _start(self, source: Source, order: Bucket) -> InFlightBucket:
        """Start to receive a bucket."""
        update = self._update
        self._step = order.step
        if len(order.digests) != len(order.segments) and not (source.unchecked and not order.digests):
            raise ValueError(f"{len(order.digests)} digests of {len(order.segments)} tensors")
        key = (order.sender, order.index)
        if not order.allocations:
            kept, buffer = update.buffer(key, order.segments, order.nbytes, source.device)
            work = source.start(order, buffer, update.seconds_left, update.cancelled.is_set)
            return InFlightBucket(order, order.segments, kept, work)
        if (sharing := source.sharing) is None:
            raise ValueError("memory of the trainer was announced over a transport that shares none")
        if sharing.in_place:
            with no_collection():
                views = sharing.views(order)
            digests = digest.digests_of_async(list(views.tensors.values()))
            return InFlightBucket(order, order.segments, views, None, digests)
        segments, nbytes = packed_layout(order.segments)
        kept, buffer = update.buffer(key, segments, nbytes, source.device)
        return InFlightBucket(order, segments, kept, sharing.start_copy(order, buffer))

    def _receive(self, bucket: InFlightBucket) -> ArrivedBucket:
        """Wait for a bucket's bytes, and unpack them where they are staged."""
        update, order, unpacked = self._update, bucket.order, bucket.unpacked
        self._step = order.step
        if bucket.work is None:
            assert unpacked is not None
            return ArrivedBucket(order, unpacked, None, bucket.digests)
        with update.spans.span(self._track, f"receive {order.index}"):
            received = bucket.work.wait(update.seconds_left, update.cancelled.is_set)
        if unpacked is None:
            with update.spans.span(self._track, "stage"):
                buffer = update.put(received)
                unpacked = UnpackedBucket(bucket.segments, buffer, dict(unpack(bucket.segments, buffer)))
        return ArrivedBucket(order, unpacked, received, None)

    def _check(self, source: Source, arrived: ArrivedBucket) -> None:
        """Compare a bucket with the digests that the trainer announced, and stage it."""
        update, (order, unpacked, received, digests) = self._update, arrived
        spans, track, self._step = update.spans, self._track, order.step
        if not order.digests:
            with spans.span(track, self._step):
                if order.adapter:
                    update.adapters.add(order.adapter, unpacked.tensors)
                else:
                    update.add_loaded(unpacked.tensors, unchecked=source.unchecked)
            update.received[self._number] += 1
            update.report(self._step)
            return
        with spans.span(track, self._step):
            with spans.span(track, "digest"):
                if digests is not None:
                    wrong = first_different(order.segments, order.digests, digests())
                else:
                    wrong = first_corrupt(unpacked.segments, order.digests, unpacked.memory)
            if wrong:
                raise RuntimeError(f"{wrong} arrived with other bytes than were sent: {errors.SEND_AGAIN}")
            if received is None and source.sharing is not None:
                update.stamps[order.stamp] = source.sharing.stamp()
            with spans.span(track, "take"), no_collection():
                announced = zip((segment.tensor for segment in order.segments), order.digests, strict=True)
                contents = digest.by_name(announced)
                if order.adapter:
                    whole = False
                    update.adapters.add(order.adapter, unpacked.tensors, contents)
                elif order.draft:
                    whole = True
                    update.draft.add(unpacked.tensors, contents, unchecked=source.unchecked)
                else:
                    whole = update.add(unpacked, contents, unchecked=source.unchecked, shared=received is None)
            if whole and received is unpacked.memory and update.begin.staging.keep:
                update.buckets[order.sender, order.index] = unpacked
        update.received[self._number] += 1
        update.report(self._step)

    def _vote(self, order: Prepare) -> None:
        self._step = "prepare"
        with self._update.spans.span(self._track, self._step):
            manifest = self._update.vote(order)
        self._update.report(self._step, manifest=manifest)
