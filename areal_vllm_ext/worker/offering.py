"""A worker's offer of its live weights to a worker of a stale engine, beside generation.

The bytes are read slice by slice on a thread, and on a CUDA stream of their own. While the engine serves requests, the work
rests for three quarters of the time, so the fetch takes at most a quarter of the link and of the copy engine.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import torch

from ..integrity import digest
from ..protocol.peer_messages import (
    Held,
    HeldAdapter,
    OfferWeights,
    ReadPacked,
    WorkerOffer,
    WorkerOffered,
    WorkerOfferEnded,
)
from ..transport.base import Cancelled, PeerLost
from ..transport.peer import PeerSink
from . import background
from .load import kernel_format
from .load.strides import in_memory_order
from .residency import NotResident

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .context import WorkerContext
    from .live_weights import Served
    from .load.kernel_format import Part

logger = logging.getLogger("vllm.areal_vllm_ext")

_SLICE_BYTES = 4 << 20
_SHARE = 0.25
# How long to wait for a call on the engine's loop.
_CALL_SECONDS = 30.0


class OfferOver(RuntimeError):
    """This worker cannot send more; the message says why."""


class Offering:
    """One offer of one worker."""

    def __init__(self, context: WorkerContext, order: OfferWeights, host: str, report: Callable[..., None]) -> None:
        """
        Args:
            context: of the worker.
            order: the engine's.
            host: where to listen.
            report: sends a message to the engine's endpoint.
        """
        self._context, self._order, self._host, self._report = context, order, host, report
        self._over = threading.Event()
        self._sink: PeerSink | None = None
        self._parts: dict[str, Part] = {}
        self._names: list[str] = []
        self._digests: dict[str, int] = {}
        self._of_adapters: list[torch.Tensor] = []
        self._failure = ""
        # Columns of a packed weight, which the worker's own thread reads.
        self._columns: tuple[str, int, torch.Tensor] | None = None
        self._columns_read = threading.Condition()

    def start(self) -> None:
        """Begin to listen, on a thread."""
        background.run(self._run)

    def end(self) -> None:
        """End the offer, and say what was sent."""
        self._over.set()
        if self._sink is not None:
            self._sink.close()
        sent_all = self._sink is not None and len(self._digests) == len(self._names)
        failure = self._failure or ("" if sent_all else "not all of its tensors were sent")
        entries = ((part.meta, self._digests[name]) for name, part in self._parts.items()) if not failure else ()
        self._report(
            WorkerOfferEnded(
                fetch=self._order.fetch,
                rank=self._context.rank,
                manifest="" if failure else digest.manifest(entries),
                error=failure,
            )
        )

    def take_columns(self, layer: str, start: int, count: int) -> None:
        """Read columns of a packed weight, on the worker's own thread, between two steps."""
        if self._over.is_set() or layer not in self._parts:
            return
        read = kernel_format.read_columns(self._parts[layer].layer, start, count)
        with self._columns_read:
            self._columns = (layer, start, read)
            self._columns_read.notify_all()

    # The thread

    def _run(self) -> None:
        rank, fetch = self._context.rank, self._order.fetch
        try:
            with background.on_side_stream(self._context.device):
                self._served = self._context.live_weights.served()
                offer = self._listen(self._served)
                self._report(WorkerOffered(fetch=fetch, rank=rank, offer=offer))
        except Exception as error:
            logger.info("areal_vllm_ext: this worker cannot offer its weights", exc_info=True)
            self._failure = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
            if self._sink is not None:
                self._sink.free()
            self._report(WorkerOffered(fetch=fetch, rank=rank, error=self._failure))
            return
        sink = self._sink
        assert sink is not None
        try:
            if self._over.is_set():  # it was ended before it could listen
                return
            sink.accept(fetch)
            with background.on_side_stream(self._context.device):
                self._send_all(sink)
        except (Cancelled, PeerLost):
            pass
        except Exception as error:
            self._failure = str(error)
            sink.refuse(self._failure)
            if not isinstance(error, (OfferOver, TimeoutError)):
                logger.warning("areal_vllm_ext: weights could not be sent to a peer", exc_info=True)
        finally:
            sink.free()

    def _listen(self, served: Served) -> WorkerOffer:
        context = self._context
        model, made = context.model, context.made
        with context.residency.access():
            self._parts = kernel_format.parts(model, made)
            attributes = kernel_format.elsewhere(model, made)
        self._names = list(self._parts)
        adapters = context.adapters.find(self._order.adapters)
        self._of_adapters = [tensor for one in adapters for tensor in one.tensors.values()]
        self._sink = PeerSink(self._host)
        return WorkerOffer(
            rank=context.rank,
            layout=context.live_weights.layout,
            address=self._sink.address,
            held=tuple(Held(part.meta, part.kind, self._known(served, name)) for name, part in self._parts.items()),
            attributes=attributes,
            contents=None if served.contents is None else tuple(served.contents.values()),
            compared=served.compared,
            adapters=tuple(
                HeldAdapter(one.unit, tuple(one.contents[name] for name in one.tensors)) for one in adapters
            ),
        )

    def _send_all(self, sink: PeerSink) -> None:
        while (number := sink.next_request()) is not None:
            if number >= len(self._names) + len(self._of_adapters):
                raise OfferOver(f"there is no tensor {number}")
            if number >= len(self._names):
                tensor = self._of_adapters[number - len(self._names)]
                sink.send(tensor.nbytes, self._paced(_slices(kernel_format.bytes_of(tensor))))
                continue
            name = self._names[number]
            part, known = self._parts[name], self._known(self._served, name)
            self._check()
            if part.kind == "packed":
                whole = self._read_packed(part)
                self._digests[name] = digest.digests_of([whole])[0]
                sink.send(part.nbytes, self._paced(_slices(kernel_format.bytes_of(whole))))
            else:
                assert part.tensor is not None
                with self._context.residency.access():
                    self._check_order(name, part.tensor)
                    flat = kernel_format.bytes_of(part.tensor)
                    self._digests[name] = digest.digests_of([flat])[0] if known is None else known
                sink.send(part.nbytes, self._paced(_slices(flat)))

    def _known(self, served: Served, name: str) -> int | None:
        """Return the digest of a tensor's bytes as they are sent, if that is known: in row-major order, as it lies."""
        tensor = self._parts[name].tensor
        return served.digests.get(name) if tensor is not None and tensor.is_contiguous() else None

    def _check_order(self, name: str, tensor: torch.Tensor) -> None:
        """Compare a tensor that lies in another order than it is sent with what is known of it."""
        known = None if tensor.is_contiguous() else self._served.digests.get(name)
        if known is not None and digest.digests_of([in_memory_order(tensor)]) != [known]:
            raise RuntimeError(f"{name} has changed since it was loaded")

    def _check(self) -> None:
        """Raise if what is live may not be what was offered, or if the engine needs the link for an update."""
        if self._over.is_set():
            raise Cancelled
        if self._context.live_weights.is_busy():
            raise OfferOver("an update has begun there")
        if not self._context.live_weights.unchanged(self._served.changes):
            raise OfferOver("its weights have changed")
        if reason := self._context.residency.asleep_reason():
            raise OfferOver(reason)

    def _paced(self, slices: Iterator[torch.Tensor]) -> Iterator[memoryview]:
        """Yield slices in host memory, with rests in which the engine has link and device for itself."""
        while True:
            started = time.perf_counter()
            self._check()
            try:
                with self._context.residency.access():
                    if (one := next(slices, None)) is None:
                        return
                    on_host = one.cpu()
            except NotResident as error:
                raise OfferOver(str(error)) from None
            yield memoryview(on_host.numpy())  # type: ignore[arg-type]
            if self._context.loader.serves():
                self._over.wait((time.perf_counter() - started) * (1 / _SHARE - 1))

    def _read_packed(self, part: Part) -> torch.Tensor:
        """Return a packed weight, column by column. The engine's loop reads it, some columns between two steps."""
        columns, _ = part.meta.shape
        at_once = kernel_format.columns_at_once(part.layer)
        read: list[torch.Tensor] = []
        for start in range(0, columns, at_once):
            self._check()
            count = min(at_once, columns - start)
            fetch, rank = self._order.fetch, self._context.rank
            with self._columns_read:
                self._columns = None
            self._report(ReadPacked(fetch=fetch, rank=rank, layer=part.meta.name, start=start, count=count))
            ends = time.monotonic() + _CALL_SECONDS
            with self._columns_read:
                while self._columns is None or self._columns[:2] != (part.meta.name, start):
                    if self._over.is_set():
                        raise Cancelled
                    if time.monotonic() > ends:
                        raise OfferOver(f"the engine's loop did not read a packed weight within {_CALL_SECONDS:.0f} s")
                    self._columns_read.wait(0.05)
                read.append(self._columns[2])
        return torch.cat(read)


def _slices(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, flat.numel(), _SLICE_BYTES):
        yield flat[start : start + _SLICE_BYTES]
