"""``Delivery``: how the weights of one update get to the workers: by which transport, shared or copied, in which buckets."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import itertools
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .. import protocol
from ..errors import ArealError, InvalidWeights, UpdateAborted
from ..integrity import digest
from ..process.collector import no_collection
from ..protocol import EngineInfo, Sender, Staging, TensorMeta, Transfer, Units, Weights
from ..transport.buckets import tensor_bytes, total_bytes
from ..transport.device import device_id
from .driver import Driver
from .sending import Sending, SendReport
from .weights import persistent_storages, warn_unchecked

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ..control.command import Target
    from ..integrity.digest import Contents
    from ..transport.base import SharingSink, Sink
    from .context import UpdateContext
    from .lora import SentAdapter
    from .weights import WeightSource

    Tensors = Iterator[tuple[TensorMeta, torch.Tensor]]


class Sharing:
    """Zero-copy sharing of the trainer's tensors with colocated workers, during one update.

    Attributes:
        storages: addresses of the storages whose tensors may be shared, because they outlive the update.
    """

    def __init__(self) -> None:
        self.storages: frozenset[int] = frozenset()
        self._sink: SharingSink | None = None

    @property
    def batch_bytes(self) -> int:
        """Upper bound of the bytes that one announcement shares; 0 if nothing is shared."""
        return self._sink.batch_bytes if self._sink else 0

    def allow(self, weights: WeightSource, staging: str) -> None:
        """Allow the storages of ``weights``, if workers may stage them on the device. Tensors that are cast are not in them."""
        if staging in ("auto", "device"):
            self.storages = persistent_storages(weights)

    def transfers(self, sink: Sink) -> Sequence[Transfer]:
        """Return the transfers of ``sink``, which shares the allowed storages from now on if it can."""
        self._sink = sink.sharing if self.storages else None
        return self._sink.transfers if self._sink else sink.transfers

    def changed(self) -> str:
        """Say which shared tensor was written to during the update; empty if none was."""
        name = self._sink.first_changed() if self._sink else None
        return (
            f"{name} was changed before the update was over; change the weights after the update's block"
            if name
            else ""
        )

    def revoke(self) -> None:
        """Stop sharing: workers that have not loaded the tensors yet refuse to."""
        if self._sink:
            self._sink.revoke()


class Delivery:
    """How the weights of one update get to the workers.

    Attributes:
        sharing: zero-copy sharing of the trainer's tensors.
        nbytes: bytes that all senders have sent.
        unchanged: how many tensors were not sent, because every engine has them.
        entries: each tensor with its digest.
        buckets: by sender, how many it has sent.
        kept: the tensors of a partial update that were not sent.
        complete: whether everything was sent.
        draft_manifest: the digest of what was sent for the drafter; empty if nothing was.
        draft_bytes: the most bytes that come for it.
    """

    def __init__(self, context: UpdateContext, targets: Mapping[str, Target], driver: Driver, sharing: Sharing) -> None:
        self.sharing = sharing
        self.nbytes = 0
        self.unchanged = 0
        self.entries: list[tuple[TensorMeta, int]] = []
        self.buckets: dict[int, int] = {}
        self.kept: tuple[str, ...] = ()
        self.complete = False
        self.draft_manifest = ""
        self.draft_bytes = 0
        self._context = context
        self._targets = targets
        self._driver = driver
        self._engines = {name: target.engine for name, target in targets.items()}
        self._expected_bytes = self._largest_bytes = 0
        # Once the engines have begun, the end through which adapters go, and its number as a sender.
        self._sink: Sink | None = None
        self._sink_number = 0

    @property
    def engines(self) -> dict[str, tuple[EngineInfo, int]]:
        """The engines, by name, with their epochs."""
        return {name: (target.engine, target.epoch) for name, target in self._targets.items()}

    @functools.cached_property
    def manifest(self) -> str:
        """The digest of all that was sent; empty from disk, because then nothing passes through this process."""
        return digest.manifest(self.entries) if self.entries else ""

    @property
    def contents(self) -> Contents:
        """Each tensor with its digest, by name."""
        return digest.by_name(self.entries)

    def units_manifest(self, units: Units) -> str:
        """Return the digest of all units of the update; empty if this process does not know it."""
        if units.weights and not self.manifest:
            return ""
        adapters = {one.name: one.manifest for one in units.adapters}
        return digest.units_manifest(self.manifest, adapters, self.draft_manifest)

    @property
    def dtype(self) -> str:
        """The dtype in which the engines compute."""
        return next(iter(self._targets.values())).engine.dtype

    def taken(self) -> Weights:
        """Return what the engines take, as the first engine describes it. Not from the event loop's thread."""
        return asyncio.run_coroutine_threadsafe(self.describe(), self._context.loop).result()

    async def describe(self) -> Weights:
        """Return what ``taken`` returns, on the event loop."""
        sinks, engine = self._context.sinks, next(iter(self._targets.values())).engine
        if engine.incarnation not in sinks.described:
            answer = await self._context.link.request(engine.address, protocol.DescribeWeights(), self._context.left)
            assert isinstance(answer, protocol.Weights), (engine.name, answer)
            if answer.error:
                warn_unchecked(answer.error)
                return answer
            tensors, dtype = answer.required, engine.dtype
            largest = max((tensor_bytes(meta, dtype) for meta in tensors), default=0)
            sinks.described = {engine.incarnation: (answer, total_bytes(tensors, dtype), largest)}
        weights, self._expected_bytes, self._largest_bytes = sinks.described[engine.incarnation]
        return weights

    def bucket_bytes(self, device: torch.device, transport: str = "") -> int:
        """Return the size of the buckets in which tensors on ``device`` travel."""
        return self._context.bucket_bytes(device, transport, self._expected_bytes)

    def stagings(self) -> dict[str, Staging]:
        """Return, by engine, what its workers stage, and how many of them share a device and a host."""
        options = self._context.options
        workers = [worker for target in self._targets.values() for worker in target.engine.workers]
        devices = Counter(worker.device_id for worker in workers)
        hosts = Counter(worker.node for worker in workers)
        # Senders choose their transport later, so this is the upper bound over all transports.
        bucket = self.sharing.batch_bytes or self.bucket_bytes(torch.device("cuda"), "broadcast")
        return {
            name: Staging(
                kind=options.staging,
                nbytes=self._expected_bytes + self.draft_bytes,
                on_device=max((devices[worker.device_id] for worker in target.engine.workers), default=1),
                on_host=max((hosts[worker.node] for worker in target.engine.workers), default=1),
                keep=options.keep_buffers,
                bucket=max(bucket, self._largest_bytes),
            )
            for name, target in self._targets.items()
        }

    def begin(self, senders: Mapping[str, Mapping[int, Sender]]) -> Future[None]:
        """Begin the update at every engine. Not from the event loop's thread.

        Args:
            senders: by engine, who sends to it.

        Returns:
            done when every worker is ready to receive; else its exception is UpdateAborted.
        """
        return asyncio.run_coroutine_threadsafe(self._driver.begin(senders, self.stagings()), self._context.loop)

    def record(self, sender: int, report: SendReport, *, complete: bool = True) -> None:
        """Record what a sender has sent, after the last one has sent its share.

        Args:
            sender: its number.
            report: what it has sent.
            complete: whether base weights are among it.
        """
        self.complete = complete
        self.buckets[sender] = self.buckets.get(sender, 0) + report.buckets
        self.nbytes += report.nbytes
        self.unchanged += report.unchanged
        self.entries += report.entries

    def send_path(self, path: str, *, beside: bool = False) -> None:
        """Have every worker read the checkpoint directory at ``path``; returns when all have begun.

        Args:
            path: of the directory.
            beside: whether ``send_adapter`` or ``send_draft`` follows.
        """
        disk = Sender(transfer=protocol.Disk(path=path))
        if beside:
            self._sink_number = 1
            self._sink = self._connect(
                torch.device("cpu"), (), nothing, transport=self._host_transport, beside={0: disk}
            )
        else:
            self.begin({name: {0: disk} for name in self._engines}).result()
        self.complete = True

    def begin_without_weights(self, adapters: Iterable[SentAdapter]) -> None:
        """Begin an update that brings no base weights; returns when every worker is ready to receive."""
        self.taken()  # as for weights, so that a connection that is kept serves both
        metas = [meta for adapter in adapters for meta, _ in adapter.entries]
        kind, device = self._context.sinks.cached(self._engines) or (self._host_transport, torch.device("cpu"))
        self._sink = self._connect(device, metas, nothing, transport=kind)

    @property
    def _host_transport(self) -> str:
        """How adapters travel, which are in host memory, if there is no connection yet."""
        return "shared_memory" if self._context.options.transport == "shared_memory" else "broadcast"

    def send_adapter(self, adapter: SentAdapter) -> None:
        """Send an adapter, after the engines have begun; returns when every worker holds it.

        Raises:
            InvalidWeights: these weights come in a way that takes no adapters with them.
        """
        if self._sink is None:
            raise InvalidWeights(
                f"adapter {adapter.unit.name} cannot go with these weights: with a checkpoint directory, call "
                'update.send_adapter(...) before update.send(path); with senders="partitioned" or "colocated", send it in an '
                "update of its own"
            )
        self._send_beside(self._sink, adapter.pairs, adapter=adapter.unit.name)

    def send_draft(self, pairs: Tensors) -> None:
        """Send the drafter's tensors, after the base model's; returns when every worker holds them."""
        assert self._sink is not None
        entries = self._send_beside(self._sink, pairs, draft=True).entries
        self.draft_manifest = digest.manifest(entries)

    def _send_beside(self, sink: Sink, pairs: Tensors, *, adapter: str = "", draft: bool = False) -> SendReport:
        """Send what is beside the base weights over their connection. It is copied, never shared."""
        coordinator, number = self._driver.coordinator, self._sink_number
        assert coordinator is not None
        first = self.buckets.get(number, 0)
        sending = Sending(self._context, self.engines, number, first=first, adapter=adapter, draft=draft)
        sending.split_shareable(sink, pairs)
        sending.send(coordinator.update, sink, sink.bucket_bytes, keep_buffers=self._context.options.keep_buffers)
        self.buckets[number] = first + sending.report.buckets
        self.nbytes += sending.report.nbytes
        return sending.report

    def send(self, pairs: Tensors, expected: Sequence[TensorMeta]) -> None:
        """Send all tensors from this process; returns when every worker holds them.

        Args:
            pairs: the tensors.
            expected: the tensors that the engines take.
        """
        context = self._context
        if (first := next(pairs, None)) is None:
            raise InvalidWeights("there was no tensor to send: send(...) got an empty source")
        sending = Sending(context, self.engines)
        remaining: Tensors = itertools.chain([first], pairs)

        def split(sink: Sink, opening: Future[None]) -> None:
            nonlocal remaining

            def ready() -> tuple[str, Contents] | None:
                coordinator = self._driver.coordinator
                if coordinator is None or not opening.done() or opening.cancelled() or opening.exception():
                    return None
                return coordinator.update, self._base(coordinator.base)

            # What can be shared is walked through in milliseconds. An iterator may take its time between two tensors.
            with no_collection() if self.sharing.storages else contextlib.nullcontext():
                sending.split_shareable(sink, remaining, self.sharing.storages, ready)
            remaining = sending.all_tensors

        sink = self._sink = self._connect(first[1].device, expected, split)
        coordinator = self._driver.coordinator
        assert coordinator is not None
        bucket_bytes = min(sink.bucket_bytes, self._expected_bytes or sink.bucket_bytes)
        keep = context.options.keep_buffers
        sending.send(coordinator.update, sink, bucket_bytes, base=self._base(coordinator.base), keep_buffers=keep)
        self.record(0, sending.report)

    def keep_rest(self, taken: Weights) -> None:
        """Have every engine keep what was not sent. The manifest is of all that it has afterwards, so that its vote proves it.

        Raises:
            UpdateAborted: the engines do not say what they have.
        """
        coordinator = self._driver.coordinator
        assert coordinator is not None
        base = self._base(coordinator.base) or self._serving()
        if coordinator.base and digest.manifest(base.values()) != coordinator.base:
            raise UpdateAborted(
                self._context.given_up("the engines' weights changed while they were asked for: send again")
            )
        sent = {meta.name for meta, _ in self.entries}
        # With a base, an engine keeps all that it has; without one, what it is asked to.
        needed = base if coordinator.base else [meta.name for meta in taken.required]
        rest = [name for name in needed if name not in sent]
        if absent := [name for name in rest if name not in base]:
            raise UpdateAborted(
                self._context.given_up(f"no engine says what it has of {absent[0]}: send all weights once")
            )
        self.kept = tuple(rest)
        self.entries += [base[name] for name in rest]
        self.unchanged += len(rest)

    def _serving(self) -> Contents:
        """Return which tensors the engines serve, with their digests, as the first worker of the first engine says."""
        asked = self._ask_contents()
        worker = asyncio.run_coroutine_threadsafe(asked, self._context.loop).result().workers[0]
        if not worker.contents:
            reason = next(iter(worker.uncompared.values()), "no update was committed yet")
            raise UpdateAborted(
                self._context.given_up(
                    f"a partial update needs to know what the engines have: {reason}; send all weights once"
                )
            )
        return digest.by_name(worker.contents)

    async def _ask_contents(self) -> protocol.WeightDigests:
        engine, left = next(iter(self._targets.values())).engine, max(self._context.left, 0.1)
        ask = protocol.DigestWeights(request=uuid.uuid4().hex, timeout=left, contents=True)
        try:
            answer = await self._context.link.request(engine.address, ask, left)
        except ArealError as error:
            raise UpdateAborted(self._context.given_up(f"{engine.name}: {error}")) from None
        assert isinstance(answer, protocol.WeightDigests), (engine.name, answer)
        return answer

    def _base(self, manifest: str) -> Contents:
        """Return what this group sent last, if it is what every engine says that it has; else nothing."""
        sinks = self._context.sinks
        return sinks.sent if manifest and manifest == sinks.sent_manifest else {}

    def _connect(
        self,
        device: torch.device,
        expected: Sequence[TensorMeta],
        meanwhile: Callable[[Sink, Future[None]], None],
        *,
        transport: str = "",
        beside: Mapping[int, Sender] | None = None,
    ) -> Sink:
        """Begin the update; return a sink that is connected to every worker.

        Args:
            device: where the tensors are.
            expected: the tensors.
            meanwhile: called with each sink that is tried, while the workers connect, and what ``begin`` returned.
            transport: what to use instead of what the user asked for.
            beside: other senders, by number.
        """
        beside = beside or {}
        context = self._context
        sinks, asked, engines = context.sinks, transport or context.options.transport, self._engines
        while True:
            cached = sinks.sink is not None
            kind = choose_transport(asked, device, engines.values(), peer_ipc_failed=sinks.peer_ipc_failed)
            sink = sinks.open(context, kind, engines, device, self.bucket_bytes(device, kind), expected, context.left)
            transfers = zip(engines, self.sharing.transfers(sink), strict=True)
            number = len(beside)
            opening = self.begin({name: {**beside, number: Sender(transfer=transfer)} for name, transfer in transfers})
            try:
                meanwhile(sink, opening)
            except BaseException:
                concurrent.futures.wait([opening])  # requests that are in flight come to their end first
                raise
            try:
                sink.connect(opening)
                opening.result()
            except UpdateAborted:
                sinks.drop(context)
                # Retry with a new connection if a worker no longer has the cached one. If CUDA IPC failed (for example, the
                # worker is in another container), fall back to NCCL.
                falls_back = kind == "ipc" and kind != choose_transport(
                    asked, device, engines.values(), peer_ipc_failed=True
                )
                if not (self._driver.refused and (cached or falls_back)):
                    raise
                sinks.peer_ipc_failed = sinks.peer_ipc_failed or falls_back
            else:
                return sink


def nothing(*_: object) -> None:
    """Do nothing."""


def choose_transport(
    asked: str, device: torch.device, engines: Iterable[EngineInfo], *, peer_ipc_failed: bool = False
) -> str:
    """Return the transport for tensors on ``device``: ``asked``, or what ``auto`` means for them.

    Args:
        asked: the transport that the user gave.
        device: where the tensors are.
        engines: the engines, with the workers to send to.
        peer_ipc_failed: whether CUDA IPC to another GPU has failed before.
    """
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "broadcast"
    workers = {worker.device_id for engine in engines for worker in engine.workers}
    # NCCL allows one rank per device, so a worker on the trainer's own GPU needs CUDA IPC. A single worker on another GPU of
    # this host gets it too, because a copy takes no time from generation. Several workers would share the bandwidth of the
    # trainer's GPU, while NCCL's broadcast passes the bytes on from worker to worker.
    if device_id(device) in workers:
        return "ipc"
    if len(workers) == 1 and workers <= peers(device) and not peer_ipc_failed:
        return "ipc"
    return "broadcast"


def peers(device: torch.device) -> set[str]:
    """Return the GPUs that this process sees and that can read the memory of ``device``, including itself."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return {device_id(gpu) for gpu in gpus if gpu == device or torch.cuda.can_device_access_peer(gpu, device)}
