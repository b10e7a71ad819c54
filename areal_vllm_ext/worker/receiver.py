"""Receives weights into staging while the worker generates.

``Receiver`` is a thread that lives as long as the worker: it talks to the engine's endpoint and never blocks. Each update
gets an ``Intake``, a thread of its own that does what can block (joining a communicator, receiving, reading files): when
a sender dies, that thread ends by its deadline, and neither the worker nor the next update waits for it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
import os
import queue
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import zmq

from .. import errors, protocol
from ..config import Settings
from ..integrity import checkpoint, digest
from ..integrity.digest import Contents
from ..observability.spans import DISABLED, SpanRecorder
from ..process.switch_interval import ShortSwitchInterval
from ..protocol import (
    Abort,
    Attach,
    Begin,
    Bucket,
    DigestsTaken,
    DigestWeights,
    GetTrace,
    Prepare,
    Segment,
    TensorMeta,
    WeightsMismatch,
    WorkerDone,
    WorkerInfo,
    WorkerTrace,
    security,
)
from ..protocol.server import connect
from ..transport import host_memory
from ..transport.base import Cancelled, WorkerSite
from ..transport.buckets import UnpackedBucket, first_corrupt, first_different, first_non_finite, packed_layout, unpack
from ..transport.device import device_id
from . import staging
from .load.loader import Loader
from .served import LOOK, Served, WeightsChanged, beside
from .sources import Sources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..transport.base import Source, Work
    from .load.plan import CopyBatch, PlanRun
    from .staging import Place

_T = TypeVar("_T")

logger = logging.getLogger("vllm.areal_vllm_ext")


_LOOK_SECONDS = 0.05
_BATCH_BYTES, _BATCH_TENSORS = 64 << 20, 256
# So many buckets are on their way at once.
_AT_ONCE = 2
# After an update: its requests run again by then.
_GIVE_BACK_SECONDS = 0.3
_NOTHING = object()


class Coming(NamedTuple):
    """A bucket on its way to where its tensors will lie (``segments``). ``bytes`` is None where they are there already;
    ``piece`` was made for an earlier bucket that lay there.
    """

    order: Bucket
    segments: tuple[Segment, ...]
    piece: UnpackedBucket | None
    bytes: Work | None


class Lane:
    """What one sender brings."""

    def __init__(self, transfer: protocol.Transfer, track: str) -> None:
        self.transfer = transfer
        self.track = track  # of its spans
        self.step = "begin"  # what it is at
        self.orders: queue.SimpleQueue[Bucket | Prepare | None] = queue.SimpleQueue()
        self.source: Source | None = None
        self.received = 0
        # Buckets on their way, and one that is there and not checked: with its tensors, and what it came into.
        self.coming: collections.deque[Coming] = collections.deque()
        self.arrived: tuple[Bucket, UnpackedBucket, torch.Tensor | None] | None = None
        # Buckets that were announced before one that lies before them on the wire, and the index of that.
        self._early: dict[int, Bucket] = {}
        self._awaited = 0

    @property
    def busy(self) -> bool:
        """Whether a bucket is on its way, or to be checked."""
        return bool(self.coming) or self.arrived is not None

    def put(self, bucket: Bucket) -> None:
        """Take buckets in the order of their bytes: after a lost connection announcements come in any. gloo ends a process that
        waits for another size than comes.
        """
        if bucket.index >= self._awaited:
            self._early[bucket.index] = bucket
        while (following := self._early.pop(self._awaited, None)) is not None:
            self._awaited += 1
            self.orders.put(following)


class Intake:
    """One update's way into staging. Each sender has a lane with a thread of its own: none waits for another."""

    def __init__(self, receiver: Receiver, begin: Begin) -> None:
        self.begin = begin
        self.spans = SpanRecorder(begin.spans)
        self.tensors: dict[str, torch.Tensor] = {}
        # By sender and bucket: what of this update is to be kept, and what was kept of the last.
        self.pieces: dict[tuple[int, int], UnpackedBucket] = {}
        self._kept, receiver.kept = receiver.kept, {}
        # Of each tensor what it is, and the digest of its bytes.
        self.manifest: dict[str, tuple[TensorMeta, int]] = {}
        # Of staged tensors, where there is a load plan.
        self.bound: PlanRun | None = None
        # What the worker has, if it could do with what has changed since; and the manifest of that.
        self._base: Contents = {}
        self._base_manifest = ""
        # Whether of each bucket only the parts are kept that the plan copies.
        self._shard = False
        # Where trainers show for how long they lend what is staged, by what it shows until then.
        self._lent: dict[int, torch.Tensor] = {}
        self._receiver = receiver
        self._lanes = {
            number: Lane(sender.transfer, f"worker {receiver.rank}, from sender {number}")
            for number, sender in begin.senders.items()
            if not sender.workers or receiver.rank in sender.workers
        }
        self._opening = threading.Lock()
        self._ends = monotonic() + begin.timeout
        self._cancelled = threading.Event()
        self._place: Place | None = None
        # Without staging: what waits to be loaded; at most one bucket, and None after the last.
        self._arrived: queue.Queue[dict[str, torch.Tensor] | None] = queue.Queue(maxsize=1)
        self._name = f"areal-intake-{begin.update[:8]}"
        self._switch_interval = ShortSwitchInterval()
        self._switch_interval.begin()
        for number, lane in self._lanes.items():
            threading.Thread(target=self._run, args=(lane,), name=f"{self._name}-{number}", daemon=True).start()
        if not self._lanes:
            self._report("begin", "begin: nobody sends to this worker")

    def put(self, order: Bucket | Prepare) -> None:
        """A bucket of another worker's sender is not for this one. The vote comes when all lanes are empty: any can take it."""
        if isinstance(order, Prepare):
            for lane in itertools.islice(self._lanes.values(), 1):
                lane.orders.put(order)
        elif order.sender in self._lanes:
            self._lanes[order.sender].put(order)

    def cancel(self) -> None:
        """Give up: whatever blocks is left alone, and its result thrown away."""
        self._cancelled.set()
        self.finish()

    def finish(self) -> None:
        """End the thread, and free the staging; the connection to the sender stays for the next update."""
        self._switch_interval.end()
        for lane in self._lanes.values():
            lane.orders.put(None)
        self._free()

    def _free(self) -> None:
        self.tensors, self.bound, self._lent = {}, None, {}
        self.pieces, self._kept = {}, {}
        self._receiver.give_back()

    @property
    def in_place(self) -> bool:
        """Whether this update has no staging."""
        return self.begin.staging.kind == "none"

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Without staging: the tensors as they come, for the worker's own thread.

        Raises:
            Cancelled: the update was given up. TimeoutError: its time is over.
        """
        while (tensors := self._wait_for(self._arrived.get)) is not None:
            yield from tensors.items()

    def _wait_for(self, step: Callable[..., _T]) -> _T:
        """A blocking call on a queue, given up with the update."""
        while not self._cancelled.is_set():
            if monotonic() > self._ends:
                raise TimeoutError("the update's time is over")
            with contextlib.suppress(queue.Empty, queue.Full):
                return step(timeout=_LOOK_SECONDS)
        raise Cancelled

    def _run(self, lane: Lane) -> None:
        with beside(self._receiver.device):
            self._serve(lane)

    def _serve(self, lane: Lane) -> None:
        source: Source | None = None
        try:
            with self.spans.span(lane.track, "open"):
                left, senders = self._ends - monotonic(), len(self._lanes)
                source = self._receiver.sources.open(lane.transfer, left, self._cancelled, senders)
                ready = self._opened(lane, source)
            if ready:
                self._report(lane.step, manifest=self._base_manifest)
            self._follow(lane, source)
        except Cancelled:
            self._receiver.sources.drop(source)
        except Exception as error:
            logger.warning("areal_vllm_ext: update %s failed in step %s", self.begin.update, lane.step, exc_info=True)
            self._receiver.sources.drop(source)
            if not self._cancelled.is_set():
                self._report(lane.step, f"{lane.step}: {type(error).__name__}: {error}")
        finally:
            if self._cancelled.is_set():
                self._free()
            if source is not None and not source.reusable:
                source.close()

    def _follow(self, lane: Lane, source: Source) -> None:
        """Carry out a lane's orders. The bytes of buckets come while those of the one before them are checked."""
        try:
            while (order := self._next(lane)) is not None:
                if isinstance(order, Bucket):
                    lane.coming.append(self._start(lane, source, order))
                elif isinstance(order, Prepare):
                    while lane.busy:
                        self._advance(lane, source)
                    self._vote(lane, order)
                else:
                    self._advance(lane, source)
        finally:
            for one in lane.coming:
                if one.bytes is not None:
                    one.bytes.cancel()

    def _next(self, lane: Lane) -> Bucket | Prepare | object | None:
        """The next order, or ``_NOTHING`` where there is something else to do; None where there will be none."""
        # Without staging each bucket costs memory until it is loaded: one at a time.
        full = lane.busy if self.in_place else len(lane.coming) >= _AT_ONCE
        if full:
            return _NOTHING
        try:
            return lane.orders.get(timeout=0 if lane.busy else max(self._ends - monotonic(), 0.0))
        except queue.Empty:
            # Over its time: the engine has given this update up as well. Prepared weights are the engine's to discard.
            return _NOTHING if lane.busy else None

    def _advance(self, lane: Lane, source: Source) -> None:
        """Wait for the bytes of the oldest bucket; or check it, where they are there."""
        if lane.arrived is None:
            lane.arrived = self._arrived_of(lane, lane.coming.popleft())
        else:
            arrived, lane.arrived = lane.arrived, None
            self._finish(lane, source, *arrived)

    def _vote(self, lane: Lane, order: Prepare) -> None:
        lane.step = "prepare"
        with self.spans.span(lane.track, lane.step):
            self._check(order)
            manifest = digest.manifest(self.manifest.values())
        self._report(lane.step, manifest=manifest)

    def _opened(self, lane: Lane, source: Source) -> bool:
        """Whether this lane is the last; then all is ready to be received."""
        with self._opening:
            lane.source = source
            sources = [one.source for one in self._lanes.values() if one.source]
            if len(sources) < len(self._lanes):
                return False
            self.bound = None if self.in_place else self._receiver.loader.begin_run()
            if self.bound:
                if not self.bound.plan.packings:  # nobody can look whether these are still what they were
                    self._base_manifest, self._base = self._receiver.served.base()
                self._shard = self.bound.plan.of_a_shard and not self._receiver.served.can_be_proven()
            nbytes, of_shard = self._nbytes(sources)
            device = self._receiver.device
            self._place = staging.choose(self.begin.staging, nbytes, of_shard, device)
            # What is staged in host memory for a GPU stays whole.
            self._shard = self._shard and (self._place == "device" or device.type == "cpu")
            return True

    def _nbytes(self, sources: Sequence[Source]) -> tuple[int, int]:
        """What staging needs that it does not have: for all that comes, and on the worker's device."""
        if all(source.sharing is not None and source.sharing.in_place for source in sources):
            return 0, 0
        asked = self.begin.staging
        nbytes = of_shard = asked.nbytes or max(source.nbytes for source in sources)
        if self._shard and self.bound and asked.bucket:
            # Those on the way, and one that is checked.
            of_shard = min(nbytes, self.bound.plan.slices_nbytes + len(sources) * (_AT_ONCE + 1) * asked.bucket)
        kept = sum(piece.memory.numel() for piece in self._kept.values())
        return max(nbytes - kept, 0), max(of_shard - kept, 0)

    def _start(self, lane: Lane, source: Source, order: Bucket) -> Coming:
        """Have a bucket's bytes come."""
        lane.step = order.step
        if len(order.digests) != len(order.segments):
            raise ValueError(f"{len(order.digests)} digests of {len(order.segments)} tensors")
        if not order.allocations:
            kept, buffer = self._memory(source, order, order.segments, order.nbytes)
            under_way = source.start(order, buffer, self._ends - monotonic(), self._cancelled.is_set)
            return Coming(order, order.segments, kept, under_way)
        if (sharing := source.sharing) is None:
            raise ValueError("memory of the trainer's was announced over another transport")
        if sharing.in_place:
            return Coming(order, order.segments, sharing.views(order), None)
        segments, nbytes = packed_layout(order.segments)
        kept, buffer = self._memory(source, order, segments, nbytes)
        return Coming(order, segments, kept, sharing.start_copy(order, buffer))

    def _memory(
        self, source: Source, order: Bucket, segments: tuple[Segment, ...], nbytes: int
    ) -> tuple[UnpackedBucket | None, torch.Tensor]:
        """Where a bucket is to arrive: where its like did in the last update, if that was kept."""
        kept = self._kept.pop((order.sender, order.index), None)
        if kept is not None and (kept.segments, kept.memory.numel(), kept.memory.device) == (
            segments,
            nbytes,
            source.device,
        ):
            return kept, kept.memory
        del kept
        if source.device == self._receiver.device:
            return None, self._receiver.pool.empty(nbytes)
        return None, host_memory.zeros(nbytes)

    def _arrived_of(self, lane: Lane, coming: Coming) -> tuple[Bucket, UnpackedBucket, torch.Tensor | None]:
        """A bucket whose bytes are there, with what they came into; None where they were there before."""
        lane.step = coming.order.step
        if coming.bytes is None:
            assert coming.piece is not None
            return coming.order, coming.piece, None
        with self.spans.span(lane.track, f"receive {coming.order.index}"):
            received = coming.bytes.wait(self._ends - monotonic(), self._cancelled.is_set)
        piece = coming.piece
        if piece is None:
            with self.spans.span(lane.track, "stage"):
                buffer = self._put(received)
                piece = UnpackedBucket(coming.segments, buffer, dict(unpack(coming.segments, buffer)))
        return coming.order, piece, received

    def _finish(
        self, lane: Lane, source: Source, order: Bucket, piece: UnpackedBucket, received: torch.Tensor | None
    ) -> None:
        """Compare a bucket with what the trainer put into it, and take it."""
        track, lane.step = lane.track, order.step
        with self.spans.span(track, lane.step):
            with self.spans.span(track, "digest"):
                if received is None:
                    values = digest.digests_of(piece.tensors.values())
                    wrong = first_different(order.segments, order.digests, values)
                else:
                    wrong = first_corrupt(piece.segments, order.digests, piece.memory)
            if wrong:
                raise RuntimeError(f"{wrong} arrived with other bytes than were sent: {errors.SEND_AGAIN}")
            if received is None and source.sharing is not None:
                self._lent[order.stamp] = source.sharing.stamp()
            with self.spans.span(track, "take"):
                told = zip((segment.tensor for segment in order.segments), order.digests, strict=True)
                whole = self._take(
                    piece, {one[0].name: one for one in told}, unchecked=source.unchecked, lent=received is None
                )
            if whole and received is piece.memory and self.begin.staging.keep:
                self.pieces[order.sender, order.index] = piece
        lane.received += 1
        self._report(lane.step)

    def confirm(self) -> None:
        """After a load: what lies in the trainer's memory was what was announced, up to here.

        Raises:
            RuntimeError: the trainer may have changed it meanwhile.
        """
        if any(int(shown) != stamp for stamp, shown in self._lent.items()):
            raise RuntimeError("the trainer took its memory back before it was loaded: update this engine again")

    def _put(self, buffer: torch.Tensor) -> torch.Tensor:
        """Into staging."""
        assert self._place is not None
        return staging.put(buffer, self._place, self._receiver.device)

    def _take(self, piece: UnpackedBucket, contents: Contents, *, unchecked: bool, lent: bool = False) -> bool:
        """Check what has come, which is ``contents``, and stage it, or hand it over to be loaded. Returns whether all of it is
        kept. ``lent``: it is the trainer's memory.
        """
        expected = self._receiver.expected()
        dtypes = (self._receiver.dtype,)
        if expected is not None:
            for meta, _ in contents.values():
                if expected.get(meta.name) != meta and (problem := checkpoint.mismatch_reason(meta, expected, dtypes)):
                    raise ValueError(problem)
        if unchecked and (name := first_non_finite(piece.tensors.items())):
            raise ValueError(f"{name} holds NaN or infinite values")
        self.manifest.update(contents)
        if self.in_place:
            self._hand_over(piece.tensors)
            return False
        if (bound := self.bound) is None:
            self.tensors.update(piece.tensors)
            return True
        if piece.copies is None or piece.copies.plan is not bound.plan:
            piece.copies = bound.plan.copies_of(piece.tensors)
        parts: CopyBatch | None = piece.copies
        if self._shard and not lent and bound.fits and parts is not None:
            bound.partial = True
            bound.add(parts.compacted(self._receiver.pool.empty))
            return False
        self.tensors.update(piece.tensors)
        bound.add(parts)
        return True

    def _hand_over(self, tensors: dict[str, torch.Tensor] | None) -> None:
        self._wait_for(lambda timeout: self._arrived.put(tensors, timeout=timeout))

    def _check(self, order: Prepare) -> None:
        """Vote: is everything here that a load needs? Raises where it is not."""
        for number, lane in self._lanes.items():
            assert lane.source is not None
            for tensors in batches(lane.source.load_all()):
                staged = {name: self._put(tensor) for name, tensor in tensors.items()}
                metas = (meta_of(name, tensor) for name, tensor in staged.items())
                values = digest.digests_of(staged.values())
                contents = {meta.name: (meta, value) for meta, value in zip(metas, values, strict=True)}
                self._take(UnpackedBucket((), None, staged), contents, unchecked=lane.source.unchecked)
            if lane.received != (sent := order.buckets.get(number, 0)):
                raise RuntimeError(f"{sent} buckets were sent, {lane.received} arrived")
        if order.base:
            self._keep(order.base)
        elif (bound := self.bound) and bound.partial:
            self._check_parts(bound)
        expected = self._receiver.expected()
        if expected is not None and (problem := checkpoint.missing_reason(self.manifest, expected)):
            raise ValueError(problem)
        if self.in_place:
            self._hand_over(None)

    def _keep(self, base: str) -> None:
        """What did not come stays as it is, if it is that."""
        bound, kept = self.bound, {name: one for name, one in self._base.items() if name not in self.manifest}
        if bound is None or base != self._base_manifest:
            raise RuntimeError(f"what was to stay is not what this worker has: {errors.SEND_AGAIN}")
        bound.keep(kept)
        self._check_parts(bound)
        if not self._receiver.served.has(kept, bound.plan.whole):
            raise RuntimeError(f"what was to stay was changed by somebody else: {errors.SEND_AGAIN}")
        self.manifest |= kept

    def _check_parts(self, bound: PlanRun) -> None:
        """Whether the plan can be carried out, where nothing else can be."""
        if not bound.complete:
            self._receiver.loader.forget()  # all of the next update is staged
            raise RuntimeError(f"other tensors were sent than in the last update: {errors.SEND_AGAIN}")
        if self._receiver.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # parts may still be on their way out of their buckets

    def _report(self, step: str, error: str = "", manifest: str = "") -> None:
        update, rank = self.begin.update, self._receiver.rank
        self._receiver.report(WorkerDone(update=update, rank=rank, step=step, error=error, manifest=manifest))


def _tell_of_sleep(worker: Any, served: Served) -> None:
    """Have ``served`` hear of vLLM's sleep mode."""
    if (sleep := getattr(worker, "sleep", None)) is None:
        return

    @functools.wraps(sleep)
    def told(*args: Any, **options: Any) -> Any:
        served.sleeps()
        return sleep(*args, **options)

    worker.sleep = told


def meta_of(name: str, tensor: torch.Tensor) -> TensorMeta:
    """What a tensor is, beside its bytes."""
    return TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def batches(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors in groups, so that what is done to each group costs little for each tensor."""
    batch: dict[str, torch.Tensor] = {}
    nbytes = 0
    for name, tensor in pairs:
        batch[name] = tensor
        nbytes += tensor.nbytes
        if nbytes >= _BATCH_BYTES or len(batch) >= _BATCH_TENSORS:
            yield batch
            batch, nbytes = {}, 0
    if batch:
        yield batch


class Receiver:
    """The worker's link to its engine."""

    def __init__(self, worker: Any, endpoint: str, token: str) -> None:
        """Connect and attach; the thread runs until the process ends.

        Args:
            worker: vLLM's worker.
            endpoint: the engine's control address.
            token: shows the engine that this is a worker of its own.
        """
        config = worker.vllm_config
        additional = config.additional_config if isinstance(config.additional_config, dict) else {}
        settings = Settings.load(additional)
        host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        self.rank: int = worker.rank
        self.device: torch.device = torch.device(worker.device)
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.own_host = settings.host or security.own_address_toward(host)
        self.sources = Sources(WorkerSite(self.rank, self.device, self.own_host))
        self.loader = Loader(worker)
        self.served = Served(worker, (config.model_config.model, config.model_config.revision))
        self.served.damaged, self.served.busy = self._damaged, lambda: self._intake is not None
        _tell_of_sleep(worker, self.served)
        self._max_message_bytes = settings.max_message_mib << 20
        self._model = (config.model_config.model, config.model_config.revision)
        self._expected: dict[str, TensorMeta] | None = None
        self._intake: Intake | None = None
        self.pool = staging.Pool(self.device)
        # Staging of the last update, where it was to be kept.
        self.kept: dict[tuple[int, int], UnpackedBucket] = {}
        # Whether the last update asked that its memory is kept.
        self._keeps = False
        self._traced = ("", DISABLED)
        self._reports: queue.SimpleQueue[WorkerDone | WeightsMismatch | DigestsTaken | WorkerTrace] = (
            queue.SimpleQueue()
        )
        digest.compile_cpu_kernel()  # begins now, not with the first update
        self._wake_read, self._wake_write = socket.socketpair()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = connect(
            self._context,
            endpoint,
            security.key_for(host, settings.key_file),
            # Not to be guessed: a peer of the same name would take this one's connection over.
            os.urandom(16),
        )
        self._token = token
        self._info = WorkerInfo(
            rank=self.rank,
            node=f"{socket.gethostname()}/{self.own_host}",
            pid=os.getpid(),
            device=str(self.device),
            device_id=device_id(self.device),
        )
        threading.Thread(target=self._run, name="areal-receiver", daemon=True).start()

    # Called from the worker's own thread

    def staged(self, update: str) -> Iterable[tuple[str, torch.Tensor]]:
        """The staged tensors of ``update``; without staging, its tensors as they come.

        Raises:
            RuntimeError: where this worker did not stage it.
        """
        intake = self._intake
        if intake is None or intake.begin.update != update:
            raise RuntimeError(f"worker {self.rank} has no staged weights of update {update}")
        return intake.stream() if intake.in_place else list(intake.tensors.items())

    def bound(self, update: str) -> PlanRun | None:
        """What was staged for ``update``, added to the load plan; None without one."""
        intake = self._intake
        return intake.bound if intake is not None and intake.begin.update == update else None

    def confirm(self, update: str) -> None:
        """See ``Intake.confirm``."""
        intake = self._intake
        if intake is not None and intake.begin.update == update:
            intake.confirm()

    def contents(self, update: str) -> Contents:
        """What was staged for ``update``, with digests."""
        intake = self._intake
        return intake.manifest if intake is not None and intake.begin.update == update else {}

    def spans(self, update: str) -> SpanRecorder:
        """Where to record what is done in ``update``; also when it is over."""
        return self._traced[1] if self._traced[0] == update else DISABLED

    def discard(self, update: str) -> None:
        """Free the staging of ``update``."""
        intake = self._intake
        if intake is not None and intake.begin.update == update:
            self._intake = None
            self.kept, self._keeps = intake.pieces, intake.begin.staging.keep
            intake.finish()

    # Called from intakes

    def give_back(self) -> None:
        """Have the device's memory that was staging go back to it, beside the running engine."""
        if self.pool.used:
            later = threading.Timer(_GIVE_BACK_SECONDS, self._give_back)
            later.name, later.daemon = LOOK, True
            later.start()

    def _give_back(self) -> None:
        if self._intake is None and not self._keeps:
            self.pool.give_back()

    def expected(self) -> dict[str, TensorMeta] | None:
        """The checkpoint that this engine was started from, or None where it cannot be told."""
        if self._expected is None:
            try:
                self._expected = {tensor.name: tensor for tensor in checkpoint.describe(*self._model)}
            except checkpoint.NotACheckpoint as error:
                logger.warning("areal_vllm_ext: names and shapes of incoming weights cannot be checked: %s", error)
                return None
        return self._expected

    def report(self, message: WorkerDone | WeightsMismatch | DigestsTaken | WorkerTrace) -> None:
        self._reports.put(message)
        self._wake_write.send(b"\0")

    # The thread

    def _run(self) -> None:
        self._send(Attach(worker=self._info, token=self._token))
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read.fileno(), zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
                while not self._reports.empty():
                    self._send(self._reports.get())
            if self._socket in ready:
                try:
                    message = protocol.worker_decoder.decode(self._socket.recv_multipart()[-1])
                except protocol.UNREADABLE:
                    logger.exception("areal_vllm_ext: the engine's endpoint sent what this worker cannot read")
                else:
                    self._handle(message)

    def _send(self, message: Attach | WorkerDone | WeightsMismatch | DigestsTaken | WorkerTrace) -> None:
        payload = protocol.encoder.encode(message)
        if isinstance(message, DigestsTaken) and len(payload) > self._max_message_bytes:
            # The endpoint would end this connection.
            problem = (
                f"digests of {len(payload) >> 20} MiB are more than the engine reads: raise AREAL_VLLM_MAX_MESSAGE_MIB"
            )
            payload = protocol.encoder.encode(DigestsTaken(request=message.request, rank=message.rank, error=problem))
        self._socket.send_multipart([os.urandom(protocol.REQUEST_ID_BYTES), payload])

    def _handle(self, message: protocol.WorkerOrder | protocol.Answer) -> None:
        intake = self._intake
        match message:
            case Begin():
                if intake:
                    intake.cancel()
                self._intake = Intake(self, message)
                self._traced = (message.update, self._intake.spans)
            case Bucket() | Prepare():
                if intake and intake.begin.update == message.update:
                    intake.put(message)
            case DigestWeights():
                # Reading all weights takes a while: not on this thread.
                threading.Thread(target=self._digest, args=(message,), name=LOOK, daemon=True).start()
            case GetTrace():
                spans = self.spans(message.update).snapshot()
                self._send(WorkerTrace(update=message.update, rank=self.rank, now=monotonic(), spans=spans))
            case Abort():
                if intake and intake.begin.update == message.update:
                    self._intake, self._keeps = None, False
                    intake.cancel()
            case protocol.Error():
                logger.error("areal_vllm_ext: the engine refuses worker %d: %s", self.rank, message.message)

    def _damaged(self, update: str, reason: str) -> None:
        self.report(WeightsMismatch(update=update, rank=self.rank, reason=reason))

    def _digest(self, order: DigestWeights) -> None:
        weights, error, busy = None, "", False
        try:
            with beside(self.device):
                weights = self.served.describe(order.contents)
        except WeightsChanged as changed:
            error, busy = str(changed), True
        except Exception as problem:
            logger.warning("areal_vllm_ext: no digests could be taken", exc_info=True)
            error = f"{type(problem).__name__}: {problem}"
        self.report(DigestsTaken(request=order.request, rank=self.rank, weights=weights, error=error, busy=busy))
