"""A worker's fetch of a peer's live weights: read beside everything else, kept in host memory, then made live at once."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

import torch

from ..integrity import digest
from ..integrity.checkpoint import without_drafters
from ..protocol import Units
from ..protocol.peer_messages import FetchWeights, WeightsFetched
from ..transport import host_memory
from ..transport.base import Cancelled
from ..transport.buckets import nbytes_of
from ..transport.peer import PeerSource, Refused
from . import background
from .adapters.staged import StagedAdapters
from .load import kernel_format, proof
from .load.cpu_packing import ATTRIBUTE
from .memory import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from ..protocol.peer_messages import WorkerOffer
    from .context import WorkerContext
    from .load.kernel_format import Part

logger = logging.getLogger("vllm.areal_vllm_ext")

# Host memory that a fetch leaves free for others.
_RESERVE_BYTES = 256 << 20


class Unlike(RuntimeError):
    """The peer's worker has another layout, so its tensors cannot be used here; the message says what differs."""


class Fetching:
    """One fetch of one worker.

    Attributes:
        name: of the fetch.
    """

    def __init__(self, context: WorkerContext, order: FetchWeights, report: Callable[..., None]) -> None:
        self.name = order.fetch
        self._context, self._order, self._report = context, order, report
        self._ends = time.monotonic() + order.timeout
        self._over = threading.Event()
        self._source: PeerSource | None = None
        self._offer: WorkerOffer | None = None
        self._parts: dict[str, Part] = {}
        self._arrived: dict[str, torch.Tensor] = {}
        self._digests: dict[str, int] = {}
        self._packed: dict[str, object] = {}
        self._adapters = StagedAdapters()
        self._complete = False

    def start(self) -> None:
        """Begin to read, on a thread."""
        background.run(self._run)

    def cancel(self) -> None:
        """Give the fetch up, and free its memory."""
        self._over.set()
        if self._source is not None:
            self._source.shut_down()
        self._complete = False
        self._free()

    def _free(self) -> None:
        self._arrived, self._packed = {}, {}
        self._adapters.free()

    def commit(self, update: str, numbers: Mapping[str, int], kept: Collection[int]) -> None:
        """Make what was fetched live. Runs on the worker's own thread while its engine is paused.

        Args:
            update: that brought it to the peer.
            numbers: by which requests ask for its adapters.
            kept: the numbers of all adapters that requests may still ask for.

        Raises:
            RuntimeError: not all is here, or what is live afterwards is not what arrived.
        """
        context, offer = self._context, self._offer
        if not self._complete or offer is None:
            raise RuntimeError(f"worker {context.rank} has not fetched all weights")
        served, draft = without_drafters(digest.by_name(offer.contents or ()))
        contents = None if offer.contents is None else served
        made = [held.tensor.name for held in offer.held if held.kind == "attribute"]
        with context.residency.access(), context.live_weights.committing(contents, update, draft=True):
            live = kernel_format.parts(context.model, made)
            if self._kinds(live) != self._kinds(self._parts):
                raise RuntimeError(f"the model of worker {context.rank} has changed since the fetch began")
            for name, part in live.items():
                if part.kind == "packed":
                    setattr(part.layer, ATTRIBUTE, self._packed[name])
                else:
                    assert part.tensor is not None
                    with torch.no_grad():
                        part.tensor.copy_(self._arrived[name])
            context.fetched(made)
            self._compare(live)
            context.live_weights.set_written(None)
            context.live_weights.set_draft(draft)
            context.live_weights.set_fetched(proof.digests_of_model(context.model), compared=offer.compared)
        context.adapters.commit(self._adapters.voted, numbers, kept)

    def _compare(self, live: dict[str, Part]) -> None:
        """Compare what is live now with what arrived, tensor by tensor."""
        tensors = {name: part.tensor for name, part in live.items() if part.tensor is not None}
        found = dict(zip(tensors, digest.digests_of(tensors.values()), strict=True))
        for name, part in live.items():
            if part.kind == "packed":
                columns, _ = part.meta.shape
                found[name] = digest.digests_of([kernel_format.read_columns(part.layer, 0, columns).contiguous()])[0]
        wrong = [name for name, value in found.items() if value != self._digests[name]]
        if wrong:
            raise RuntimeError(f"{len(wrong)} live tensors are not what was fetched ({', '.join(wrong[:5])})")

    # The thread

    def _run(self) -> None:
        error, unlike, manifest = "", False, ""
        try:
            with background.on_side_stream(self._context.device):
                self._fetch_all()
            manifest = digest.manifest((part.meta, self._digests[name]) for name, part in self._parts.items())
            self._complete = not self._over.is_set()
        except Cancelled:
            return
        except Unlike as problem:
            error, unlike = str(problem), True
        except (Refused, RuntimeError, TimeoutError, ValueError) as problem:
            error = str(problem)
        except Exception as problem:
            logger.warning("areal_vllm_ext: weights could not be fetched from a peer", exc_info=True)
            error = f"{type(problem).__name__}: {problem}"
        finally:
            if self._source is not None:
                self._source.close()
        if error:
            self._free()
        self._report(
            WeightsFetched(fetch=self.name, rank=self._context.rank, manifest=manifest, error=error, unlike=unlike)
        )

    def _fetch_all(self) -> None:
        offer = next((one for one in self._order.offers if one.rank == self._context.rank), None)
        if offer is None:
            raise Unlike(f"it has {len(self._order.offers)} workers, and none of rank {self._context.rank}")
        self._offer = offer
        self._check_alike(offer)
        needed = sum(part.nbytes for part in self._parts.values()) + _RESERVE_BYTES
        needed += sum(nbytes_of(meta) for one in offer.adapters for meta, _ in one.tensors)
        if (free := free_bytes(torch.device("cpu"))) < needed:
            raise RuntimeError(
                f"the host has no room for the weights: {needed >> 20} MiB are needed, {free >> 20} MiB are free"
            )
        self._source = PeerSource(offer.address, self.name, self._over.is_set)
        self._fetch_adapters(self._source, offer)
        for number, held in enumerate(offer.held):
            if self._over.is_set():
                raise Cancelled
            part = self._parts[held.tensor.name]
            memory = host_memory.zeros(part.nbytes)
            self._source.fetch(number, memoryview(memory.numpy()), self._ends)  # type: ignore[arg-type]
            self._take(held.tensor.name, part, memory, held.digest)

    def _fetch_adapters(self, source: PeerSource, offer: WorkerOffer) -> None:
        """Read the adapters, and make what the store serves. First, because one that cannot be served here costs little.

        Raises:
            RuntimeError: other bytes arrived than the peer was sent.
            ValueError: this worker cannot serve one of them.
        """
        numbers = itertools.count(len(offer.held))
        for one in offer.adapters:
            tensors = dict[str, torch.Tensor]()
            for meta, expected in one.tensors:
                memory = torch.empty(nbytes_of(meta), dtype=torch.uint8)
                source.fetch(next(numbers), memoryview(memory.numpy()), self._ends)  # type: ignore[arg-type]
                if digest.digests_of([memory]) != [expected]:
                    raise RuntimeError(
                        f"adapter {one.unit.name}: {meta.name} arrived with other bytes than the peer got"
                    )
                tensors[meta.name] = memory.view(kernel_format.dtype_of(meta)).view(meta.shape)
            self._adapters.add(one.unit.name, tensors)
        units = Units(adapters=tuple(one.unit for one in offer.adapters))
        self._adapters.vote(units, self._context.adapters, self._context.intake)

    def _check_alike(self, offer: WorkerOffer) -> None:
        """Check that each tensor of the peer has a place here.

        Raises:
            Unlike: naming what differs.
            RuntimeError: a value that is no weight is another one there.
        """
        context = self._context
        if offer.layout != context.live_weights.layout:
            raise Unlike(f"its layout is {offer.layout}; this engine's is {context.live_weights.layout}")
        made = [held.tensor.name for held in offer.held if held.kind == "attribute"]
        with context.residency.access():
            self._parts = kernel_format.parts(context.model, made)
            own = kernel_format.elsewhere(context.model, made)
        theirs = {held.tensor.name: (held.kind, held.tensor) for held in offer.held}
        ours = self._kinds(self._parts)
        if differ := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
            raise Unlike(f"{differ[0]} is another tensor there, or missing ({len(differ)} differ)")
        if differ := sorted(
            path for path in own.keys() | offer.attributes.keys() if own.get(path) != offer.attributes.get(path)
        ):
            # It may be what generation computes, and equal at the next attempt.
            raise RuntimeError(f"{differ[0]} has another value there, and is no weight ({len(differ)} differ)")

    @staticmethod
    def _kinds(parts: dict[str, Part]) -> dict[str, tuple[str, object]]:
        return {name: (part.kind, part.meta) for name, part in parts.items()}

    def _take(self, name: str, part: Part, memory: torch.Tensor, expected: int | None) -> None:
        """Compare a tensor that has arrived with its digest, and keep it."""
        found = digest.digests_of([memory])[0]
        if expected is not None and found != expected:
            raise RuntimeError(f"{name} arrived with other bytes than the peer serves since its last commit")
        self._digests[name] = found
        tensor = memory.view(kernel_format.dtype_of(part.meta)).view(part.meta.shape)
        if part.kind == "packed":
            self._packed[name] = kernel_format.pack_columns(tensor)
        else:
            self._arrived[name] = tensor
