"""``JointUpdate``: an update by all ranks of a ``torch.distributed`` job.

Gathering sharded weights is a collective, which returns only when every rank is in it. So the ranks agree before each bucket's
worth of tensors. A rank that has failed says so instead (an engine refused, a tensor does not fit, the user's code raised), and
all other ranks fail with its reason (``agreement.py``). No agreement helps against a rank that dies inside a collective, so
each rank sends on a thread of its own, which is abandoned at the deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Literal

import msgspec
import torch
import torch.distributed as dist

from ...errors import ArealError, InvalidWeights, UpdateAborted, UpdateInDoubt, WeightsTainted
from ..blocking_update import Update
from ..lora import adapter_parts
from ..modules import Named, gathered, is_sharded
from ..options import Senders
from ..state import UpdateResult
from ..walk import drained_on_error, walk
from ..weights import WeightSource, checked_cast, named_parts
from .agreement import GRACE_SECONDS, Agreement
from .senders import RankSends

if TYPE_CHECKING:
    from ..drafts import DraftSource
    from ..loop_thread import LoopThread
    from ..lora import AdapterSource
    from ..transaction import Transaction

# How often this process has begun an update to a version. All ranks count alike, so each update has its own keys in the store.
_begun: Counter[tuple[str, str]] = Counter()


class _Outcome(msgspec.Struct):
    """How the update ended, as rank 0 publishes it."""

    error: str = ""
    kind: Literal["UpdateAborted", "UpdateInDoubt", "WeightsTainted"] = "UpdateAborted"
    result: UpdateResult | None = None

    @classmethod
    def of(cls, error: BaseException) -> _Outcome:
        """Return the outcome for the other ranks: rank 0 gave the update up, unless its error says otherwise."""
        message = f"rank 0 of the trainer: {str(error) or type(error).__name__}"
        if isinstance(error, UpdateInDoubt):
            return cls(message, "UpdateInDoubt")
        return cls(message, "WeightsTainted" if isinstance(error, WeightsTainted) else "UpdateAborted")

    def exception(self) -> ArealError:
        kinds = {"UpdateInDoubt": UpdateInDoubt, "WeightsTainted": WeightsTainted}
        return kinds.get(self.kind, UpdateAborted)(self.error)


class JointUpdate(Update):
    """``Update`` for a trainer of several ranks. Made by ``EngineGroup.update(version, process_group=...)``.

    Every rank opens it and calls ``send``, and every rank gets its result or an error. Only rank 0 commands the engines.
    """

    def __init__(
        self, thread: LoopThread, transaction: Transaction, group: dist.ProcessGroup, senders: Senders
    ) -> None:
        """
        Args:
            thread: runs this rank's connection.
            transaction: the update; the one of rank 0 commands the engines.
            group: the trainer's ranks.
            senders: which ranks send, see ``EngineGroup.update``.
        """
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, not {group!r}")
        super().__init__(thread, transaction)
        self._ranks = group
        self._name = str(transaction.version)
        self._senders = senders
        self._leads = dist.get_rank(group) == 0
        self._received: UpdateResult | None = None
        self._agreement: Agreement

    @property
    def result(self) -> UpdateResult:
        """What the update took; set once its block has been left."""
        return self._received or super().result

    def __enter__(self) -> JointUpdate:
        context = self._transaction.start(self._thread.loop)
        key = (self._ranks.group_name, self._name)
        _begun[key] += 1
        self._agreement = Agreement.of_group(self._ranks, f"{self._name}-{_begun[key]}", context.ends)
        if self._leads:
            with self._failing_all():
                self._thread.run(self._transaction.open())
        else:
            context.sinks.begin(context)
        return self

    def send(
        self,
        weights: WeightSource | str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        draft: DraftSource | None = None,
    ) -> None:
        """See ``AsyncUpdate.send``. Called on every rank; with ``senders="rank0"``, with equal names in one order.

        ``DTensor`` weights are gathered one bucket at a time. The caller's thread waits while another handles the tensors, on
        the caller's device and stream.
        """
        self._transaction.check_open()
        weights = walk(weights, self._transaction.options.timeout)

        def work() -> None:
            # Tell the other ranks first, because they must walk on too.
            with drained_on_error(weights, self._fail):
                self._send(weights, dtype, draft)

        with self._failing_all():
            self._in_time(work)

    def _send(
        self,
        weights: WeightSource | str | os.PathLike[str],
        dtype: str | torch.dtype | None,
        draft: DraftSource | None,
    ) -> None:
        checked_cast(dtype)
        if isinstance(weights, (str, os.PathLike)):
            if self._leads:
                self._transaction.deliver(weights, dtype, draft=draft)
        elif self._senders != "rank0":
            if draft is not None:
                raise InvalidWeights(f"draft and senders={self._senders!r} do not go together: use senders='rank0'")
            with self._transaction.errors_of_sending():
                RankSends(self._senders, self._transaction, self._agreement).send(weights, dtype)
        elif self._leads:
            self._transaction.deliver(weights, dtype, self._gather, draft)
        else:
            self._follow(weights)

    def send_adapter(self, name: str, source: AdapterSource) -> None:
        """See ``AsyncUpdate.send_adapter``. Called on every rank; rank 0 sends."""
        self._transaction.check_open("send_adapter")

        def work() -> None:
            if self._leads:
                self._transaction.add_adapter(name, source, self._gather)
                return
            for _ in self._gather(adapter_parts(name, source)[0]):
                pass

        with self._failing_all():
            self._in_time(work)

    def _follow(self, weights: WeightSource) -> None:
        """Take part in the collectives of rank 0, which sends."""
        parts = named_parts(weights)
        try:
            for _ in self._gather(parts if isinstance(weights, Iterator) else list(parts)):
                pass
        except ArealError:
            raise
        except RuntimeError as error:  # a collective failed because another rank is gone
            raise UpdateAborted(f"update to version {self._name}: {error}") from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
            self._close(error)
            return
        try:
            if changed := self._transaction.sharing.changed():
                self._agreement.fail(changed)
            self._in_time(lambda: self._agreement.barrier("end"))  # every rank has left its block without an error
        except BaseException as failure:
            self._close(failure)
            raise
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        """End the update on rank 0; on the other ranks, wait for its outcome."""
        if not self._leads:
            self._await_outcome(error)
            return
        outcome = _Outcome.of(error) if error else _Outcome()
        try:
            self._thread.run(self._transaction.close(error))
            if error is None:
                outcome = _Outcome(result=self._transaction.result)
        except BaseException as failure:
            outcome = _Outcome.of(failure)
            raise
        finally:
            with contextlib.suppress(dist.DistError):  # the store is gone, which the other ranks notice themselves
                self._agreement.publish_result(msgspec.json.encode(outcome))

    def _await_outcome(self, error: BaseException | None) -> None:
        context = self._transaction.context
        context.closed.set()
        try:
            if error is None:
                outcome = msgspec.json.decode(self._agreement.await_result(), type=_Outcome)
                if outcome.error:
                    raise outcome.exception()
                self._received = outcome.result
        finally:
            self._transaction.sharing.revoke()
            if self._received is None:
                # The workers may not have received all that was sent over this connection, so do not use it again.
                context.sinks.drop(context)
            context.sinks.end(context)

    @contextlib.contextmanager
    def _failing_all(self) -> Iterator[None]:
        """Make the other ranks fail with an error in the body."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        self._agreement.fail(f"{type(error).__name__}: {error}")

    def _gather(self, parts: Iterable[Named]) -> Iterator[Named]:
        """Yield full tensors. All ranks agree before each collective."""
        if not isinstance(parts, list):
            # The iterable is the user's code, which may fail at each tensor. So take a tensor first, then agree to gather it.
            for one in parts:
                self._agreement.barrier(_fingerprint([one]))
                yield from gathered([one])
            return
        same, walk, more = _fingerprint(parts), gathered(parts), True
        if not any(is_sharded(part) for _, part in parts):
            self._agreement.barrier(same)
            yield from walk  # no collectives, so no rounds
            return
        while more:
            self._agreement.barrier(same)
            # Gather a whole round before the first tensor is used, so that no rank fails between two collectives.
            full, nbytes, more = [], 0, False
            for name, tensor in walk:
                nbytes += tensor.nbytes
                if self._leads:
                    full.append((name, tensor))
                if nbytes >= self._transaction.context.bucket_bytes(tensor.device):
                    more = True
                    break
            yield from full

    def _in_time(self, work: Callable[[], None]) -> None:
        """Do ``work`` on a thread, and abandon the thread at the deadline.

        Raises:
            UpdateAborted: the work did not end in time.
        """
        done: Future[None] = Future()
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        device, stream = (torch.cuda.current_device(), torch.cuda.current_stream()) if cuda else (None, None)

        def run() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)
                with torch.no_grad(), torch.cuda.stream(stream):
                    work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=run, name="areal-joint-update", daemon=True).start()
        try:
            done.result(timeout=max(self._transaction.context.left, 0.0) + GRACE_SECONDS)
        except FutureTimeout:
            if done.done():
                raise
            raise UpdateAborted(
                f"update to version {self._name}: the trainer's ranks did not finish in time: {self._agreement.progress()}"
            ) from None


def _fingerprint(parts: list[Named]) -> str:
    """Return a digest of what the ranks must have in common to gather ``parts``."""
    shapes = [(name, str(part.dtype), tuple(part.shape), is_sharded(part)) for name, part in parts]
    return hashlib.sha256(msgspec.json.encode(shapes)).hexdigest()
