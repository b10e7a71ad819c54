"""An update in which every rank of the trainer sends: a part of the weights to all engines (``parts``), or all of them to the
workers on its own device (``colocated``).

Rank 0 commands. What the ranks must know of each other they show each other, and each works out the same plan from it: who
serves whom, who sends what, and in which rounds sharded tensors are gathered.
"""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import msgspec
import torch

from ..errors import InvalidWeights, UpdateAborted
from ..integrity import digest
from ..protocol import EngineInfo, Sender, TensorMeta
from ..transport.buckets import tensor_bytes, total_bytes
from ..transport.device import device_id
from .sending import Sending, choose_transport
from .weights import Checker, Named, WeightSource, gathered, is_sharded, named_parts

if TYPE_CHECKING:
    import asyncio

    from ..transport.base import Sink
    from .agreement import Agreement
    from .options import Senders
    from .update import AsyncUpdate

_LOOK_SECONDS = 0.01


class Opening(msgspec.Struct):
    """What rank 0 knows of the engines: each with its epoch, their checkpoint, and the dtype that they compute in; and the size
    of buckets.
    """

    engines: dict[str, tuple[EngineInfo, int]]
    expected: tuple[TensorMeta, ...]
    dtype: str
    bucket_bytes: int


class Holding(msgspec.Struct):
    """What a rank has, and where it is; ``sharded``: some of it must be gathered."""

    tensors: tuple[TensorMeta, ...]
    place: str
    sharded: bool


class Offer(msgspec.Struct):
    """How a rank will send, by engine; ``kept``: over connections of an earlier update."""

    senders: dict[str, Sender]
    kept: bool


class Begun(msgspec.Struct):
    """How rank 0's Begin ended: with the update's name, or an error, after which it may be tried ``again``."""

    update: str = ""
    error: str = ""
    again: bool = False


class Sent(msgspec.Struct):
    """What a rank has sent."""

    buckets: int
    nbytes: int
    entries: list[tuple[TensorMeta, int]]


def place_of(device: torch.device | str, node: str) -> str:
    """Where a rank or a worker is: its GPU, or for a CPU its host. ``device``: a torch device, or a worker's ``device_id``."""
    name = device_id(device) if isinstance(device, torch.device) else device
    return name if name != "cpu" else f"cpu of {node.partition('/')[0]}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who does what, the same on every rank.

    Attributes:
        serves: for each rank the engines that it sends to, and the ranks of the workers there.
        sends: for each rank the names of what it sends.
        rounds: names, in the order in which sharded tensors are gathered: a round after each agreement.
    """

    serves: list[dict[str, tuple[int, ...]]]
    sends: list[frozenset[str]]
    rounds: list[list[str]]


def plan(kind: Senders, opening: Opening, holdings: Sequence[Holding]) -> Plan:
    """Who sends what to whom.

    Raises:
        InvalidWeights: the ranks' tensors do not agree. UpdateAborted: a worker has no rank on its device.
    """
    metas: dict[str, TensorMeta] = {}
    for rank, holding in enumerate(holdings):
        for meta in holding.tensors:
            if metas.setdefault(meta.name, meta) != meta:
                raise InvalidWeights(
                    f"{meta.name} is another tensor on rank {rank} of the trainer than on those before it"
                )
    names: list[list[str]] = [[]]
    size = 0
    for name, meta in metas.items():
        if size >= opening.bucket_bytes:
            names.append([])
            size = 0
        names[-1].append(name)
        size += tensor_bytes(meta)
    if kind == "parts":
        return Plan([_all_workers(opening)] * len(holdings), _spread(metas, holdings), names)
    serves = _own_devices(opening, holdings)
    for rank, holding in enumerate(holdings):
        if serves[rank] and (missing := metas.keys() - {meta.name for meta in holding.tensors}):
            raise InvalidWeights(f"rank {rank} of the trainer lacks {min(missing)}, which other ranks have")
    return Plan(serves, [frozenset(metas)] * len(holdings), names)


def ranks_of(info: EngineInfo) -> tuple[int, ...]:
    """Of its workers."""
    return tuple(worker.rank for worker in info.workers)


def with_workers(info: EngineInfo, ranks: Sequence[int]) -> EngineInfo:
    """The same engine, with these of its workers only."""
    return msgspec.structs.replace(info, workers=tuple(one for one in info.workers if one.rank in ranks))


def _all_workers(opening: Opening) -> dict[str, tuple[int, ...]]:
    return {name: ranks_of(info) for name, (info, _) in opening.engines.items()}


def _spread(metas: Mapping[str, TensorMeta], holdings: Sequence[Holding]) -> list[frozenset[str]]:
    """Each tensor to one of the ranks that have it: the one that has the least to send so far."""
    holders: dict[str, list[int]] = {name: [] for name in metas}
    for rank, holding in enumerate(holdings):
        for meta in holding.tensors:
            holders[meta.name].append(rank)
    load: Counter[int] = Counter()
    sends: list[set[str]] = [set() for _ in holdings]
    for name, ranks in holders.items():
        rank = min(ranks, key=lambda one: load[one])
        load[rank] += tensor_bytes(metas[name])
        sends[rank].add(name)
    return [frozenset(part) for part in sends]


def _own_devices(opening: Opening, holdings: Sequence[Holding]) -> list[dict[str, tuple[int, ...]]]:
    """Each worker to a rank on its device; in turn, where there are several."""
    serves: list[dict[str, tuple[int, ...]]] = [{} for _ in holdings]
    taken: Counter[int] = Counter()
    for name, (info, _) in opening.engines.items():
        for worker in info.workers:
            place = place_of(worker.device_id, worker.node)
            ranks = [rank for rank, holding in enumerate(holdings) if holding.place == place]
            if not ranks:
                raise UpdateAborted(
                    f"worker {worker.rank} of {name} runs on {place}, where no rank of the trainer is: use senders='first'"
                )
            rank = min(ranks, key=lambda one: taken[one])
            taken[rank] += 1
            serves[rank][name] = (*serves[rank].get(name, ()), worker.rank)
    return serves


class RankSends:
    """One rank's part in it."""

    def __init__(
        self,
        kind: Senders,
        loop: asyncio.AbstractEventLoop,
        update: AsyncUpdate,
        agreement: Agreement,
        ends: float,
    ) -> None:
        """
        Args:
            kind: ``parts`` or ``colocated``.
            loop: runs this rank's connection.
            update: the transaction; rank 0's is the one that counts.
            agreement: with the other ranks.
            ends: the deadline, by ``time.monotonic()``.
        """
        self._kind = kind
        self._link, self._loop, self._sinks = update.link, loop, update.sinks
        self._update = update
        self._agreement = agreement
        self._ends = ends

    def send(self, weights: WeightSource, dtype: str | None) -> None:
        """Send this rank's share of ``weights``; returns when all ranks have sent theirs."""
        agreement, rank = self._agreement, self._agreement.rank
        if isinstance(weights, Iterator):
            raise InvalidWeights("an iterator shows its tensors one by one: give send(...) a module, a dict or a list")
        parts = list(named_parts(weights))
        device = parts[0][1].device if parts else torch.device("cpu")
        if rank == 0:
            bucket_bytes = self._update.bucket_bytes(device)
            known = Opening(self._update.engines, self._update.expected(), self._update.dtype, bucket_bytes)
            agreement.say(encode(known))
        else:
            known = msgspec.json.decode(agreement.hear(), type=Opening)
        checker = Checker(known.expected, known.dtype, dtype)
        sharded = any(is_sharded(part) for _, part in parts)
        holding = Holding(checker.check_ahead(parts, part=True), place_of(device, socket.gethostname()), sharded)
        agreement.show(encode(holding))
        holdings = [msgspec.json.decode(agreement.read(one), type=Holding) for one in range(agreement.size)]
        checker.check_whole({meta.name for one in holdings for meta in one.tensors})
        shared = plan(self._kind, known, holdings)
        held = {meta.name for meta in holding.tensors}
        own = [part for part in parts if part[0] in held]
        full = self._gathered(own, shared) if any(one.sharded for one in holdings) else gathered(own)
        serves, mine = shared.serves[rank], shared.sends[rank]
        pairs = checker.check((pair for pair in full if pair[0] in mine), part=True)
        engines = {name: known.engines[name] for name in serves} if mine else {}
        served = {name: with_workers(info, serves[name]) for name, (info, _) in engines.items()}
        self._update.find_lasting(weights, dtype)
        name, sink = self._begin(served, device, known)
        sending = Sending(self._link, self._loop, engines, self._update.version, self._ends, rank, self._update.spans)
        if sink is None:
            for _ in full:  # the other ranks' collectives need this one
                pass
        else:
            # NCCL asks that no two communicators wait for each other's kernels: one bucket at a time on all devices.
            one_at_a_time = sum(map(bool, shared.sends)) > 1 and device.type != "cpu" and not sink.announced_is_sent
            turn = agreement.turn if one_at_a_time else None
            size = total_bytes((meta for meta in holding.tensors if meta.name in mine), known.dtype)
            sending.part(sink, pairs, self._update.lasting)
            sending.send(name, sink, min(sink.bucket_bytes, size), turn)
        agreement.show(encode(Sent(sending.buckets, sending.nbytes, sending.entries)))
        if rank == 0:
            self._record([msgspec.json.decode(agreement.read(one), type=Sent) for one in range(agreement.size)])

    def _gathered(self, parts: Sequence[Named], shared: Plan) -> Iterator[Named]:
        """Full tensors, a round at a time. All ranks agree before each; and in a round nobody's code can fail."""
        held = dict(parts)
        for names in shared.rounds:
            self._agreement.step("gather")
            yield from list(gathered((name, held[name]) for name in names if name in held))

    def _begin(self, served: dict[str, EngineInfo], device: torch.device, known: Opening) -> tuple[str, Sink | None]:
        """Open the update, with this rank as a sender to the workers in ``served``; returns its name and the sending end,
        which has met them.
        """
        while True:
            kept, sink = self._sinks.sink is not None, None
            if served:
                sink = self._sink(served, device, known)
            transfers = zip(served, self._update.transfers_of(sink), strict=True) if sink else ()
            offer = Offer({name: Sender(transfer, ranks_of(served[name])) for name, transfer in transfers}, kept)
            self._agreement.show(encode(offer))
            opening: Future[Begun] = Future()
            target = self._open if self._agreement.rank == 0 else self._await_opening
            threading.Thread(target=_settle, args=(opening, target), name="areal-opening", daemon=True).start()
            try:
                if sink:
                    sink.meet(opening)  # type: ignore[arg-type]  # only whether it is done counts
                begun = opening.result(timeout=max(self._ends - time.monotonic(), 0.0))
            except _TryAgain:
                self._sinks.drop()
            except BaseException:
                self._sinks.drop()
                raise
            else:
                return begun.update, sink

    def _sink(self, served: dict[str, EngineInfo], device: torch.device, known: Opening) -> Sink:
        asked = self._update.transport
        if self._kind == "colocated" and asked == "auto":
            asked = "ipc" if device.type == "cuda" else "shared_memory"
        kind = choose_transport(asked, device, served.values())
        left = self._ends - time.monotonic()
        return self._sinks.open(kind, served, device, known.bucket_bytes, known.expected, left)

    def _open(self) -> Begun:
        """Rank 0: begin everywhere with the senders that all ranks have offered, and tell them."""
        agreement = self._agreement
        offers = [msgspec.json.decode(agreement.read(rank), type=Offer) for rank in range(agreement.size)]
        senders = {
            name: {rank: offer.senders[name] for rank, offer in enumerate(offers) if name in offer.senders}
            for name in self._update.engines
        }
        try:
            self._wait_opened(self._update.open(senders))
        except UpdateAborted as error:
            again = self._update.refused and any(offer.kept for offer in offers)
            agreement.say(encode(Begun(error=str(error), again=again)))
            if again:
                raise _TryAgain from None
            raise
        begun = Begun(update=self._update.id)
        agreement.say(encode(begun))
        return begun

    def _wait_opened(self, opened: Future[None]) -> None:
        """A rank that has failed does not meet the workers: they would be waited for until the deadline."""
        while not opened.done():
            if reason := self._agreement.failure():
                opened.cancel()
                raise UpdateAborted(reason)
            time.sleep(_LOOK_SECONDS)
        opened.result()

    def _await_opening(self) -> Begun:
        begun = msgspec.json.decode(self._agreement.hear(), type=Begun)
        if begun.again:
            raise _TryAgain
        if begun.error:
            raise UpdateAborted(begun.error)
        return begun

    def _record(self, sent: Sequence[Sent]) -> None:
        """Rank 0: what all have sent.

        Raises:
            InvalidWeights: ranks that should have sent the same have not.
        """
        if self._kind == "parts":
            for rank, one in enumerate(sent):
                self._update.sent_by(rank, one.buckets, one.nbytes, one.entries)
            return
        manifests = {rank: digest.manifest(one.entries) for rank, one in enumerate(sent) if one.entries}
        first = next(iter(manifests))
        if others := [rank for rank, manifest in manifests.items() if manifest != manifests[first]]:
            raise InvalidWeights(f"rank {others[0]} of the trainer has other weights than rank {first}")
        for rank, one in enumerate(sent):
            same = rank == first  # counted once
            self._update.sent_by(rank, one.buckets, one.nbytes if same else 0, one.entries if same else [])


class _TryAgain(Exception):
    """A worker no longer has its end of a connection: all make new ones."""


def _settle(future: Future[Begun], work: Callable[[], Begun]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def encode(shown: msgspec.Struct) -> str:
    """For the store, which keeps text."""
    return msgspec.json.encode(shown).decode()
