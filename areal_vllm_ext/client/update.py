"""One update, from the trainer's side: carries out what ``coordinator.py`` says, and sends the bytes."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import protocol
from ..errors import (
    ArealError,
    EngineUnreachable,
    InvalidWeights,
    RequestError,
    UpdateAborted,
    UpdateInDoubt,
    join,
)
from ..integrity import digest
from ..observability import trace
from ..observability.spans import SpanRecorder
from ..process.switch_interval import ShortSwitchInterval
from ..protocol import (
    Answer,
    EngineInfo,
    EngineRequest,
    Sender,
    Staging,
    TensorMeta,
    Version,
)
from ..transport.base import Cancelled
from ..transport.buckets import default_bucket_bytes, tensor_bytes, total_bytes
from .coordinator import Coordinator, Member
from .sending import Sending, choose_transport
from .state import UpdateResult
from .weights import Checker, Named, gathered, storages, warn_unchecked

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ..control.command import Commander
    from ..control.connection import Round
    from ..integrity.digest import Contents
    from ..protocol import Transfer
    from ..transport.base import SharingSink, Sink
    from .options import Options
    from .sinks import Sinks

    Outcomes = asyncio.Queue[tuple[str, Answer | EngineUnreachable]]

logger = logging.getLogger("vllm.areal_vllm_ext")

# After its deadline an update waits for one more answer to what it tells the engines last (keep the old weights, or commit),
# then to resume: less than a second in all. Whatever is not settled by then, the directory settles.
_GRACE_SECONDS = {"abort": 0.35, "commit": 0.3, "resume": 0.25}
# An engine that takes longer to switch, while all others are paused, is dropped.
_COMMIT_SECONDS = 120.0
_ABORT_SECONDS = 5.0
# For the engines to tell what they did; and where the update's time is over.
_TRACE_SECONDS, _LATE_TRACE_SECONDS = 2.0, 0.15


class AsyncUpdate:
    """An update under way; made by ``AsyncEngineGroup.update``."""

    def __init__(self, commander: Commander, sinks: Sinks, version: Version, options: Options) -> None:
        self._commander = commander
        self.link = commander.link
        self.sinks = sinks
        self._version = version
        self._options = options
        self._command = contextlib.AsyncExitStack()
        self._engines: dict[str, EngineInfo] = {}
        self._members: dict[str, Member] = {}
        self._coordinator: Coordinator | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ends = 0.0
        self._nbytes = 0
        self._expected_bytes = self._largest_bytes = 0
        self._kept = 0
        self._buckets: dict[int, int] = {}
        self._entries: list[tuple[TensorMeta, int]] = []
        self._manifest = ""
        self.lasting: frozenset[int] = frozenset()
        self._sharing: SharingSink | None = None
        self._started = 0.0
        self._pause_started = 0.0
        self._commit_seconds = 0.0
        self._result: UpdateResult | None = None
        # What is done here, for the trace.
        self.spans = SpanRecorder(trace.MAX_SPANS_PER_KIND if options.trace else 0)

    @property
    def deadline(self) -> float:
        """Seconds for all of it."""
        return self._options.timeout

    @property
    def version(self) -> Version:
        """Names the new weights."""
        return self._version

    @property
    def transport(self) -> str:
        """As it was asked for."""
        return self._options.transport

    def bucket_bytes(self, device: torch.device, transport: str = "") -> int:
        """Size of the pieces in which weights travel from there."""
        asked = self._options.bucket_bytes
        return default_bucket_bytes(device, transport, self._expected_bytes) if asked is None else asked

    @property
    def result(self) -> UpdateResult:
        """What it took; set when the block has been left."""
        if self._result is None:
            raise ArealError("the update has no result yet: it is set when its block has been left")
        return self._result

    @property
    def engines(self) -> dict[str, tuple[EngineInfo, int]]:
        """The engines, by name, with their epochs."""
        return {name: (engine, self._members[name].epoch) for name, engine in self._engines.items()}

    @property
    def dtype(self) -> str:
        """The dtype in which the engines compute."""
        return next(iter(self._engines.values())).dtype

    def expected(self) -> tuple[TensorMeta, ...]:
        """The engines' checkpoint, as the first engine describes it. From a thread that is not the event loop's."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._expected(), self._loop).result()

    async def __aenter__(self) -> AsyncUpdate:
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self.ends = self._started + self._options.timeout
        self.spans.set_state("update", "lease")
        # The event loop needs the interpreter while another thread handles tensor after tensor.
        self._command.enter_context(ShortSwitchInterval())
        command = self._commander.command(self._options.timeout, without_lost=self._options.drop_lost)
        try:
            targets = await self._command.enter_async_context(command)
        except BaseException:
            await self._command.aclose()
            raise
        self._engines = {name: target.engine for name, target in targets.items()}
        self._members = {name: Member(target.epoch, target.resumes) for name, target in targets.items()}
        self.spans.set_state("update", "")
        return self

    async def send(self, weights: Any, *, dtype: str | None = None) -> None:
        """Bring new weights to every engine's staging. The engines generate meanwhile.

        Change the weights after the update's block: by CUDA IPC, engines read them where they are until then.

        Args:
            weights: an ``nn.Module``, a state dict, an iterable of (name, tensor), or the path of a Hugging Face
                checkpoint directory that every engine can read.
            dtype: cast floating-point tensors to this (``"bfloat16"``) on the way.

        Raises:
            InvalidWeights: they do not fit the engines' model; nothing changed.
            UpdateAborted: an engine failed or the deadline is over; nothing changed.
        """
        await asyncio.to_thread(self.send_blocking, weights, dtype=dtype)

    def send_blocking(
        self, weights: Any, *, dtype: str | None = None, gather: Callable[[Iterable[Named]], Iterator[Named]] = gathered
    ) -> None:
        """``send``, from a thread that is not the event loop's. ``gather`` makes tensors of which ranks have parts full."""
        if self._coordinator is not None:
            raise ArealError("an update sends once; begin another update")
        if isinstance(weights, (str, os.PathLike)):
            disk = Sender(transfer=protocol.Disk(path=str(Path(weights).absolute())))
            self.open({name: {0: disk} for name in self._engines}).result()
            return
        expected = self.expected()
        checker = Checker(expected, self.dtype, dtype)
        pairs = checker.check_source(weights, gather)
        self.find_lasting(weights, dtype)
        with self.sending_fails():
            self._send_buckets(pairs, expected)

    def find_lasting(self, weights: Any, dtype: str | None) -> None:
        """Note where storages begin whose tensors can be lent: they travel as they are, and last until the update is over."""
        if dtype is None and self._options.staging in ("auto", "device"):
            self.lasting = storages(weights)

    def transfers_of(self, sink: Sink) -> Sequence[Transfer]:
        """Return what workers need to know of ``sink``, which shares ``lasting`` tensors in place if it can."""
        self._sharing = sink.sharing if self.lasting else None
        return sink.transfers if self._sharing is None else self._sharing.transfers

    def changed(self) -> str:
        """Says which of the lent tensors was written to meanwhile; empty where none was."""
        name = self._sharing.first_changed() if self._sharing else None
        return f"{name} was changed before the update was over" if name else ""

    def revoke(self) -> None:
        """End the sharing of tensors in place."""
        if self._sharing:
            self._sharing.revoke()

    @contextlib.contextmanager
    def sending_fails(self) -> Iterator[None]:
        """The body sends; whatever stops it is an error of this update."""
        try:
            yield
        except (InvalidWeights, UpdateAborted):
            raise
        except (Cancelled, TimeoutError, concurrent.futures.TimeoutError, RuntimeError) as error:
            raise self._given_up(str(error) or type(error).__name__) from error

    @property
    def id(self) -> str:
        """The update's name among the engines, once it was opened."""
        assert self._coordinator is not None
        return self._coordinator.update

    @property
    def refused(self) -> bool:
        """Whether an engine said no, instead of nothing."""
        return self._coordinator is not None and self._coordinator.refused

    def sent_by(self, sender: int, buckets: int, nbytes: int, entries: list[tuple[TensorMeta, int]]) -> None:
        """A sender has sent so much, and these of the weights."""
        self._buckets[sender] = buckets
        self._nbytes += nbytes
        self._entries += entries

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object
    ) -> None:
        try:
            coordinator = self._coordinator
            if coordinator is None:
                if error is None:
                    raise InvalidWeights("the update sent nothing: call update.send(...) inside its block")
                return
            if coordinator.phase in ("begin", "send") and error is not None:
                await self._drive(coordinator.give_up(f"{type(error).__name__}: {error}"))
            elif coordinator.phase == "send" and (changed := self.changed()):
                await self._drive(coordinator.give_up(changed))
            elif coordinator.phase == "send":
                # From disk nothing passes through here: then the engines' votes are compared with each other only.
                self._manifest = digest.manifest(self._entries) if self._entries else ""
                base = coordinator.base if self._kept else ""
                await self._drive(coordinator.sent(self._buckets, self._manifest, base))
            if kind is not None:
                return
            self._check_given_up(coordinator)
            given_up = await self._ask_lost(coordinator)
            if not coordinator.committed and given_up == set(self._members):
                raise UpdateAborted(f"update to version {self._version} was given up: {join(coordinator.lost)}")
            if not coordinator.committed:
                raise UpdateInDoubt(
                    f"every engine was told to switch to version {self._version} and none answered ({join(coordinator.lost)}); "
                    "all will have switched, or none: the directory settles it, and status() tells"
                )
            self._commander.drop((self._engines[name] for name in coordinator.lost), self._engines.values())
            finished = time.monotonic()
            self._result = UpdateResult(
                version=self._version,
                engines=tuple(coordinator.committed),
                lost=dict(coordinator.lost),
                nbytes=self._nbytes,
                kept=self._kept,
                total_ms=(finished - self._started) * 1e3,
                pause_ms=(finished - self._pause_started) * 1e3,
                commit_ms=self._commit_seconds * 1e3,
            )
        finally:
            self.revoke()
            switched = self._result is not None
            self.sinks.sent = {meta.name: (meta, value) for meta, value in self._entries} if switched else {}
            self.sinks.sent_manifest = self._manifest if switched else ""
            if not switched:
                self.sinks.drop()
            await self._command.aclose()
            if self._options.trace:
                await self._write_trace(self._options.trace)

    async def _write_trace(self, path: str | os.PathLike[str]) -> None:
        """Never an error of the update's: what is missing is logged."""
        engines: dict[str, list[protocol.Span]] = {}
        problems: list[str] = []
        about = {"version": str(self._version), "committed": self._result is not None}
        try:
            if coordinator := self._coordinator:
                about |= {"update": coordinator.update, "given_up": coordinator.reason, "lost": coordinator.lost}
                timeout = min(_TRACE_SECONDS, max(self._left(), _LATE_TRACE_SECONDS))
                engines, problems = await trace.collect(self.link.request, self._engines, coordinator.update, timeout)
            spans = self.spans.snapshot()
            await asyncio.to_thread(trace.write, path, spans, engines, self._started, about)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        if problems:
            logger.warning("the trace %s of version %s is not whole: %s", path, self._version, "; ".join(problems))

    async def _ask_lost(self, coordinator: Coordinator) -> set[str]:
        """An engine whose answer was lost may have switched all the same, or a successor may have told it to.

        Returns:
            those that have given the update up: a successor told them to.
        """
        given_up: set[str] = set()
        timeout = 1.0 if self._left() > 1.0 else 0.1

        async def ask(name: str) -> None:
            with contextlib.suppress(EngineUnreachable, RequestError):
                status = await self.link.request(self._engines[name].address, protocol.GetStatus(), timeout)
                assert isinstance(status, protocol.Status)
                if status.last_update == coordinator.update:
                    coordinator.found_committed(name, running=status.generation == "running")
                elif status.update != coordinator.update and status.committed_epoch < self._members[name].epoch:
                    given_up.add(name)

        await asyncio.gather(*(ask(name) for name in list(coordinator.lost)))
        return given_up

    # The protocol

    def _left(self) -> float:
        return self.ends - time.monotonic()

    async def _expected(self) -> tuple[TensorMeta, ...]:
        name, engine = next(iter(self._engines.items()))
        if engine.incarnation not in self.sinks.described:
            answer = await self.link.request(engine.address, protocol.DescribeWeights(), self._left())
            assert isinstance(answer, protocol.Weights), (name, answer)
            if answer.error:
                warn_unchecked(answer.error)
                return answer.tensors
            tensors, dtype = answer.tensors, engine.dtype
            largest = max((tensor_bytes(meta, dtype) for meta in tensors), default=0)
            self.sinks.described = {engine.incarnation: (tensors, total_bytes(tensors, dtype), largest)}
        tensors, self._expected_bytes, self._largest_bytes = self.sinks.described[engine.incarnation]
        return tensors

    def open(self, senders: dict[str, dict[int, Sender]]) -> Future[None]:
        """Begin on every engine, with these senders to it; is done when every worker is ready to receive.

        Raises:
            UpdateAborted: an engine is not.
        """
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(self._begin(senders), self._loop)

    async def _begin(self, senders: dict[str, dict[int, Sender]]) -> None:
        self._coordinator = Coordinator(
            uuid.uuid4().hex, self._version, self._members, self._options.mode, self._options.kv
        )
        spans = trace.spans_for(self._engines.values()) if self._options.trace else 0
        await self._drive(self._coordinator.begin(senders, self._left(), self._stagings(), spans))
        self._check_given_up(self._coordinator)

    def _check_given_up(self, coordinator: Coordinator) -> None:
        if coordinator.reason:
            raise self._given_up(coordinator.reason)

    def _given_up(self, reason: str) -> UpdateAborted:
        return UpdateAborted(f"update to version {self._version} was given up: {reason}")

    def _stagings(self) -> dict[str, Staging]:
        """What each engine's workers stage, and with how many of them they share a device and a host."""
        workers = [worker for engine in self._engines.values() for worker in engine.workers]
        devices = Counter(worker.device_id for worker in workers)
        hosts = Counter(worker.node for worker in workers)
        # The largest of any transport that a sender may choose.
        pieces = self._sharing.batch_bytes if self._sharing else self.bucket_bytes(torch.device("cuda"), "broadcast")
        return {
            name: Staging(
                kind=self._options.staging,
                nbytes=self._expected_bytes,
                on_device=max((devices[worker.device_id] for worker in engine.workers), default=1),
                on_host=max((hosts[worker.node] for worker in engine.workers), default=1),
                keep=self._options.keep_buffers,
                bucket=max(pieces, self._largest_bytes),
            )
            for name, engine in self._engines.items()
        }

    async def _drive(self, requests: dict[str, EngineRequest]) -> None:
        """Send ``requests`` and what the coordinator answers to their outcome, until it waits for no engine.

        Cancelled, it goes on to the next state in which no engine waits for anybody: back to the old weights as long as that
        is possible, else on to the new ones. Cancelled again, it ends at once.
        """
        coordinator = self._coordinator
        assert coordinator is not None
        asked, outcomes = self._launch(requests)
        cancelled: asyncio.CancelledError | None = None
        try:
            while coordinator.awaited:
                try:
                    name, outcome = await outcomes.get()
                except asyncio.CancelledError as first:
                    if cancelled:
                        raise
                    cancelled = first
                    if coordinator.phase in ("begin", "prepare", "pause"):
                        asked.cancel()
                        asked, outcomes = self._launch(coordinator.give_up("the trainer was interrupted"))
                    continue
                phase = coordinator.phase
                if isinstance(outcome, EngineUnreachable):
                    more = coordinator.silent(name, str(outcome), self._left())
                else:
                    if phase == "commit" and isinstance(outcome, protocol.Ack):
                        self._commit_seconds = max(self._commit_seconds, outcome.seconds)
                    more = coordinator.answered(name, outcome, self._left())
                if coordinator.phase != phase:
                    asked.cancel()  # what is still on the way belongs to a phase that is over
                if more:
                    asked, outcomes = self._launch(more)
                elif coordinator.phase != phase:
                    break
        finally:
            asked.cancel()
        self.spans.set_state("update", "" if coordinator.phase == "done" else coordinator.phase)
        if cancelled:
            raise cancelled

    def _launch(self, requests: dict[str, EngineRequest]) -> tuple[Round, Outcomes]:
        """Send the requests of the coordinator's phase, all at once; the queue gets the outcome of each."""
        assert self._coordinator is not None
        phase = self._coordinator.phase
        self.spans.set_state("update", phase)
        if self._options.on_phase:
            self._options.on_phase(phase)
        if phase == "pause":
            self._pause_started = time.monotonic()
        outcomes: Outcomes = asyncio.Queue()
        addressed = {name: (self._engines[name].address, message) for name, message in requests.items()}

        def heard(name: str, outcome: Answer | EngineUnreachable) -> None:
            outcomes.put_nowait((name, outcome))

        return self.link.ask(addressed, self._timeout_of(phase), heard), outcomes

    def _timeout_of(self, phase: str) -> float:
        if phase in _GRACE_SECONDS:
            longest = _ABORT_SECONDS if phase == "abort" else _COMMIT_SECONDS
            return min(max(self._left(), 0.0) + _GRACE_SECONDS[phase], longest)
        return max(self._left(), 0.05)

    # The bytes

    def _met_sink(
        self, device: torch.device, expected: tuple[TensorMeta, ...], meanwhile: Callable[[Sink], None]
    ) -> Sink:
        """The sending end, connected to every worker. ``meanwhile`` is called while they get ready, for each that is tried."""
        while True:
            kept = self.sinks.sink is not None
            kind = choose_transport(
                self._options.transport, device, self._engines.values(), apart=self.sinks.peer_ipc_failed
            )
            size = self.bucket_bytes(device, kind)
            sink = self.sinks.open(kind, self._engines, device, size, expected, self._left())
            transfers = zip(self._engines, self.transfers_of(sink), strict=True)
            opening = self.open({name: {0: Sender(transfer=transfer)} for name, transfer in transfers})
            try:
                meanwhile(sink)
            except BaseException:
                concurrent.futures.wait([opening])  # what is under way there comes to its end first
                raise
            try:
                sink.meet(opening)
                opening.result()
            except UpdateAborted:
                # A worker may have lost its end of the last update's connection: then a new one is due, not an error.
                self.sinks.drop()
                if not self.refused:
                    raise
                # Or its GPU, which looked near, is out of reach by memory (a container of its own): then NCCL does.
                falls_back = kind == "ipc" and kind != choose_transport(
                    self._options.transport, device, self._engines.values(), apart=True
                )
                self.sinks.peer_ipc_failed = self.sinks.peer_ipc_failed or falls_back
                if not (kept or falls_back):
                    raise
            else:
                return sink

    def _base(self) -> Contents:
        """What this group sent last, where that is what every engine says that it has; else nothing."""
        assert self._coordinator is not None
        base = self._coordinator.base
        return self.sinks.sent if base and base == self.sinks.sent_manifest else {}

    def _send_buckets(self, pairs: Iterator[tuple[TensorMeta, torch.Tensor]], expected: tuple[TensorMeta, ...]) -> None:
        assert self._loop is not None
        first = next(pairs)
        sending = Sending(self.link, self._loop, self.engines, self._version, self.ends, spans=self.spans)
        given: Iterator[tuple[TensorMeta, torch.Tensor]] = itertools.chain([first], pairs)

        def part(sink: Sink) -> None:
            nonlocal given
            sending.part(sink, given, self.lasting)
            given = sending.parted

        sink = self._met_sink(first[1].device, expected, part)
        bucket_bytes = min(sink.bucket_bytes, self._expected_bytes or sink.bucket_bytes)
        keep = self._options.keep_buffers
        sending.send(self.id, sink, bucket_bytes, base=self._base(), keep_buffers=keep)
        self._kept = sending.kept
        self.sent_by(0, sending.buckets, sending.nbytes, sending.entries)
