"""``RankSends``: an update in which every rank of the trainer sends.

With ``partitioned``, each rank sends a share of the weights to all engines. With ``colocated``, each rank sends all weights to
the workers on its own device. Rank 0 commands. The ranks exchange what they hold, and each computes the same plan from it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec
import torch

from ...errors import InvalidWeights, UpdateAborted
from ...integrity import digest
from ...protocol import EngineInfo, Sender
from ...transport.buckets import total_bytes
from ..delivery import choose_transport
from ..modules import Named, gathered, is_sharded
from ..sending import Sending, SendReport
from ..weights import Checker, WeightSource, named_parts
from .plan import BeginContext, Plan, RankInventory, own_place, plan, with_workers, worker_ranks

if TYPE_CHECKING:
    from ...transport.base import Sink
    from ..options import Senders
    from ..transaction import Transaction
    from .agreement import Agreement

_POLL_SECONDS = 0.01


class SenderOffer(msgspec.Struct):
    """How a rank is going to send.

    Attributes:
        senders: by engine.
        cached: whether the rank uses a connection of an earlier update.
    """

    senders: dict[str, Sender]
    cached: bool


class BeginResult(msgspec.Struct):
    """How the Begin of rank 0 ended.

    Attributes:
        update: the update's id.
        error: why it failed; empty if it did not.
        retry: whether all ranks try again with new connections.
    """

    update: str = ""
    error: str = ""
    retry: bool = False


class RankSends:
    """One rank's part in an update in which every rank sends."""

    def __init__(self, senders: Senders, transaction: Transaction, agreement: Agreement) -> None:
        """
        Args:
            senders: ``partitioned`` or ``colocated``.
            transaction: of this rank. The one of rank 0 commands the engines.
            agreement: with the other ranks.
        """
        self._senders = senders
        self._transaction = transaction
        self._context = transaction.context
        self._agreement = agreement

    def send(self, weights: WeightSource, dtype: str | torch.dtype | None) -> None:
        """Send this rank's share of ``weights``; returns when all ranks have sent theirs."""
        agreement, transaction = self._agreement, self._transaction
        if self._context.options.partial:
            raise InvalidWeights(f"partial=True and senders={self._senders!r} do not go together: use senders='rank0'")
        if isinstance(weights, Iterator):
            raise InvalidWeights(
                f"senders={self._senders!r} needs all tensor names in advance: pass a module, a dict or a list"
            )
        parts = list(named_parts(weights))
        device = parts[0][1].device if parts else torch.device("cpu")
        known = self._begin_context(device)
        checker = Checker(known.weights, known.dtype, dtype)
        parts = checker.as_saved(parts)
        checker.second_names.compare(parts)
        parts = list(checker.renamed(parts))
        inventories = self._exchange_inventories(checker, parts, device)
        own = inventories[agreement.rank]
        shares = plan(self._senders, known, inventories)
        sends = shares.sends[agreement.rank]
        full = self._full(parts, own, shares, sharded=any(one.sharded for one in inventories))
        pairs = checker.check((pair for pair in full if pair[0] in sends), partial=True)
        transaction.sharing.allow(weights, self._context.options.staging)
        serves = shares.serves[agreement.rank] if sends else {}
        served = {name: with_workers(known.engines[name][0], ranks) for name, ranks in serves.items()}
        update, sink = self._connect(served, device, known)
        sending = Sending(self._context, {name: known.engines[name] for name in serves}, agreement.rank)
        if sink is None:
            for _ in full:  # take part in the collectives of the other ranks
                pass
        else:
            nbytes = total_bytes((meta for meta in own.tensors if meta.name in sends), known.dtype)
            lock = agreement.lock if _must_take_turns(shares, device, sink) else None
            sending.split_shareable(sink, pairs, transaction.sharing.storages)
            sending.send(update, sink, min(sink.bucket_bytes, nbytes), lock)
        self._exchange_reports(sending.report)

    def _begin_context(self, device: torch.device) -> BeginContext:
        """Rank 0 tells the other ranks what it knows of the engines."""
        if self._agreement.rank:
            return msgspec.json.decode(self._agreement.receive_broadcast(), type=BeginContext)
        delivery = self._transaction.delivery
        weights = delivery.taken()
        known = BeginContext(delivery.engines, weights, delivery.dtype, delivery.bucket_bytes(device))
        self._agreement.broadcast(encode(known))
        return known

    def _exchange_inventories(
        self, checker: Checker, parts: Sequence[Named], device: torch.device
    ) -> list[RankInventory]:
        """Check what this rank holds; return what each rank holds.

        Raises:
            InvalidWeights: a tensor does not fit the engines' model, or no rank has it.
        """
        sharded = any(is_sharded(part) for _, part in parts)
        own = RankInventory(checker.check_ahead(parts, partial=True), own_place(device), sharded)
        self._agreement.all_gather(encode(own))
        inventories = [msgspec.json.decode(one, type=RankInventory) for one in self._agreement.gathered()]
        checker.check_complete({meta.name for one in inventories for meta in one.tensors})
        return inventories

    def _full(self, parts: Sequence[Named], own: RankInventory, shares: Plan, *, sharded: bool) -> Iterator[Named]:
        """Yield full tensors. If any rank holds shards, gather a round at a time: all ranks agree before each round."""
        names = {meta.name for meta in own.tensors}
        held = {name: part for name, part in parts if name in names}
        if not sharded:
            yield from gathered(held.items())
            return
        for round_names in shares.rounds:
            self._agreement.barrier("gather")
            # Gather the whole round before the first tensor is used, so that no rank fails between two collectives.
            yield from list(gathered((name, held[name]) for name in round_names if name in held))

    def _connect(
        self, served: Mapping[str, EngineInfo], device: torch.device, known: BeginContext
    ) -> tuple[str, Sink | None]:
        """Begin the update, with this rank as the sender to the workers in ``served``.

        Returns:
            the update's id, and a sink that is connected to these workers; None if there are none.
        """
        sinks, sharing, agreement = self._context.sinks, self._transaction.sharing, self._agreement
        while True:
            cached, sink = sinks.sink is not None, None
            if served:
                sink = self._sink(served, device, known)
            transfers = zip(served, sharing.transfers(sink), strict=True) if sink else ()
            senders = {name: Sender(transfer, worker_ranks(served[name])) for name, transfer in transfers}
            agreement.all_gather(encode(SenderOffer(senders, cached)))
            opening: Future[BeginResult] = Future()
            begin = self._await_begin if agreement.rank else self._begin
            threading.Thread(target=_resolve, args=(opening, begin), name="areal-begin", daemon=True).start()
            try:
                if sink:
                    sink.connect(opening)  # type: ignore[arg-type]  # its result is not used
                result = opening.result(timeout=max(self._context.left, 0.0))
            except _Retry:
                sinks.drop(self._context)
            except BaseException:
                sinks.drop(self._context)
                raise
            else:
                return result.update, sink

    def _sink(self, served: Mapping[str, EngineInfo], device: torch.device, known: BeginContext) -> Sink:
        asked = self._context.options.transport
        if self._senders == "colocated" and asked == "auto":
            asked = "ipc" if device.type == "cuda" else "shared_memory"
        kind = choose_transport(asked, device, served.values())
        context = self._context
        expected = known.weights.required
        return context.sinks.open(context, kind, served, device, known.bucket_bytes, expected, context.left)

    def _begin(self) -> BeginResult:
        """On rank 0: begin at every engine with the senders that all ranks have offered, and broadcast the result."""
        agreement, driver = self._agreement, self._transaction.driver
        offers = [msgspec.json.decode(one, type=SenderOffer) for one in agreement.gathered()]
        senders = {
            name: {rank: offer.senders[name] for rank, offer in enumerate(offers) if name in offer.senders}
            for name in self._transaction.delivery.engines
        }
        try:
            self._wait_for_begin(self._transaction.delivery.begin(senders))
        except UpdateAborted as error:
            retry = driver.refused and any(offer.cached for offer in offers)
            agreement.broadcast(encode(BeginResult(error=str(error), retry=retry)))
            if retry:
                raise _Retry from None
            raise
        assert driver.coordinator is not None
        result = BeginResult(update=driver.coordinator.update)
        agreement.broadcast(encode(result))
        return result

    def _wait_for_begin(self, begun: Future[None]) -> None:
        """Wait until the workers are ready. Stop if a rank fails, because the workers would wait for it until the deadline."""
        while not begun.done():
            if reason := self._agreement.failure():
                begun.cancel()
                raise UpdateAborted(reason)
            time.sleep(_POLL_SECONDS)
        begun.result()

    def _await_begin(self) -> BeginResult:
        """On the other ranks: wait for the result of rank 0."""
        result = msgspec.json.decode(self._agreement.receive_broadcast(), type=BeginResult)
        if result.retry:
            raise _Retry
        if result.error:
            raise UpdateAborted(result.error)
        return result

    def _exchange_reports(self, report: SendReport) -> None:
        """Wait until every rank has sent its share; rank 0 records what was sent.

        Raises:
            InvalidWeights: ranks that should have sent the same tensors have not.
        """
        self._agreement.all_gather(encode(report))
        if self._agreement.rank:
            return
        reports = [msgspec.json.decode(one, type=SendReport) for one in self._agreement.gathered()]
        if self._senders == "colocated":
            reports = _counted_once(reports)
        for rank, one in enumerate(reports):
            self._transaction.delivery.record(rank, one)


class _Retry(Exception):
    """A worker no longer has its end of a connection, so all ranks make new ones."""


def _must_take_turns(shares: Plan, device: torch.device, sink: Sink) -> bool:
    """Return whether only one rank may have a bucket in flight: NCCL's kernels of two communicators may block each other."""
    return sum(map(bool, shares.sends)) > 1 and device.type != "cpu" and not sink.announced_is_sent


def _counted_once(reports: Sequence[SendReport]) -> list[SendReport]:
    """Return the reports of ranks that sent the same tensors, with the tensors counted once.

    Raises:
        InvalidWeights: the tensors were not the same.
    """
    manifests = {rank: digest.manifest(one.entries) for rank, one in enumerate(reports) if one.entries}
    first = next(iter(manifests))
    if others := [rank for rank, manifest in manifests.items() if manifest != manifests[first]]:
        raise InvalidWeights(
            f"rank {others[0]} of the trainer has other weights than rank {first}: "
            "senders='colocated' needs equal weights on every rank"
        )
    return [report if rank == first else SendReport(report.buckets, 0, [], 0) for rank, report in enumerate(reports)]


def _resolve(future: Future[BeginResult], work: Callable[[], BeginResult]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def encode(message: msgspec.Struct) -> str:
    """Encode a message for the store, which holds text."""
    return msgspec.json.encode(message).decode()
