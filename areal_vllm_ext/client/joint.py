"""An update of all ranks of a ``torch.distributed`` job: their sharded weights are gathered, and rank 0 sends, or every rank.

Gathering is a collective, which only comes back when every rank is in it. So before each bucket's worth of tensors the ranks
agree to go on: a rank that has failed (an engine said no, a tensor does not fit, an error of the user's) says so instead, and
all others fail with its reason (``agreement.py``). A rank that dies inside a collective is out of reach of that: each rank's
walk is on a thread, left at the deadline.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import torch
import torch.distributed as dist

from ..errors import ArealError, UpdateAborted, UpdateInDoubt
from .agreement import GRACE_SECONDS, Agreement
from .blocking_update import Update
from .options import Senders
from .senders import RankSends
from .state import UpdateResult
from .update import AsyncUpdate
from .weights import Named, gathered, is_sharded, named_parts

if TYPE_CHECKING:
    from types import TracebackType

    from ..protocol import Version
    from .loop_thread import LoopThread

# How often this process has begun an update to a version: all ranks count alike, so that each update has keys of its own.
_begun: Counter[tuple[str, str]] = Counter()


class _Outcome(msgspec.Struct):
    """What rank 0 tells the others when it is over."""

    error: str = ""
    kind: Literal["UpdateAborted", "UpdateInDoubt"] = "UpdateAborted"
    result: UpdateResult | None = None

    @classmethod
    def of(cls, error: BaseException) -> _Outcome:
        """An error of rank 0: for the others the update was given up, if it leaves no doubt."""
        said = f"rank 0 of the trainer: {str(error) or type(error).__name__}"
        return cls(said, "UpdateInDoubt" if isinstance(error, UpdateInDoubt) else "UpdateAborted")

    def exception(self) -> ArealError:
        return UpdateInDoubt(self.error) if self.kind == "UpdateInDoubt" else UpdateAborted(self.error)


def _plan(parts: list[Named]) -> str:
    """What the ranks must have in common to gather ``parts``."""
    shapes = [(name, str(part.dtype), tuple(part.shape), is_sharded(part)) for name, part in parts]
    return hashlib.sha256(msgspec.json.encode(shapes)).hexdigest()


class JointUpdate(Update):
    """``Update`` for a trainer of several ranks: every rank opens it and calls ``send``; every rank has its result or error.

    Made by ``EngineGroup.update(version, process_group=...)``. Only rank 0 commands the engines.
    """

    def __init__(
        self, thread: LoopThread, update: AsyncUpdate, group: dist.ProcessGroup, version: Version, senders: Senders
    ) -> None:
        """
        Args:
            thread: runs this rank's connection.
            update: the transaction; rank 0's is the one that counts.
            group: the trainer's ranks.
            version: names the new weights.
            senders: who sends, see ``EngineGroup.update``.
        """
        if senders not in get_args(Senders):
            raise ValueError(f"senders must be one of {', '.join(get_args(Senders))}, not {senders!r}")
        super().__init__(thread, update)
        self._ranks = group
        self._name = str(version)
        self._senders = senders
        self._leads = dist.get_rank(group) == 0
        self._heard: UpdateResult | None = None
        self._agreement: Agreement
        self._ends = 0.0

    @property
    def result(self) -> UpdateResult:
        """What it took; set when the block has been left."""
        if self._leads:
            return self._update.result
        if self._heard is None:
            raise ArealError("the update has no result yet: it is set when its block has been left")
        return self._heard

    def __enter__(self) -> JointUpdate:
        self._ends = time.monotonic() + self._update.deadline
        key = (self._ranks.group_name, self._name)
        _begun[key] += 1
        self._agreement = Agreement(self._ranks, f"{self._name}-{_begun[key]}", self._ends)
        if self._leads:
            with self._telling():
                super().__enter__()
        return self

    def send(self, weights: Any, *, dtype: str | None = None) -> None:
        """See ``AsyncUpdate.send``. On every rank; where rank 0 sends, with the same tensors in the same order.

        ``DTensor`` weights are gathered a bucket at a time. The caller's thread waits; the tensors are handled in another,
        on the caller's device and stream.
        """

        def walk() -> None:
            if self._senders != "first" and not isinstance(weights, (str, os.PathLike)):
                sends = RankSends(self._senders, self._thread.loop, self._update, self._agreement, self._ends)
                with self._update.sending_fails():
                    sends.send(weights, dtype)
            elif self._leads:
                self._update.send_blocking(weights, dtype=dtype, gather=self._gather)
            elif not isinstance(weights, (str, os.PathLike)):
                parts = named_parts(weights)
                try:
                    for _ in self._gather(parts if isinstance(weights, Iterator) else list(parts)):
                        pass
                except ArealError:
                    raise
                except RuntimeError as error:  # of a collective: another rank is gone
                    raise UpdateAborted(f"update to version {self._name}: {error}") from error

        with self._telling():
            self._in_time(walk)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | object
    ) -> None:
        if error is not None:
            self._agreement.fail(f"{type(error).__name__}: {error}")
            self._close(kind, error, trace)
            return
        try:
            if changed := self._update.changed():
                self._agreement.fail(changed)
            self._in_time(lambda: self._agreement.step("end"))  # every rank has left its block, and none with an error
        except BaseException as failure:
            self._close(type(failure), failure, failure.__traceback__)
            raise
        self._close(None, None, None)

    def _close(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the update, or hear how rank 0 ended it."""
        if not self._leads:
            try:
                if error is None:
                    outcome = msgspec.json.decode(self._agreement.outcome(), type=_Outcome)
                    if outcome.error:
                        raise outcome.exception()
                    self._heard = outcome.result
            finally:
                self._update.revoke()
                if self._heard is None:
                    self._update.sinks.drop()  # the workers may not have had all that was sent through it
            return
        outcome = _Outcome.of(error) if error else _Outcome()
        try:
            super().__exit__(kind, error, trace)
            if error is None:
                outcome = _Outcome(result=self._update.result)
        except BaseException as failure:
            outcome = _Outcome.of(failure)
            raise
        finally:
            with contextlib.suppress(dist.DistError):  # the store is gone: the others hear that
                self._agreement.tell(msgspec.json.encode(outcome))

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the other ranks of an error in the body."""
        try:
            yield
        except BaseException as error:
            self._agreement.fail(f"{type(error).__name__}: {error}")
            raise

    def _gather(self, parts: Iterable[Named]) -> Iterator[Named]:
        """Full tensors. All ranks agree before each collective."""
        if not isinstance(parts, list):
            # The user's code, which may fail at each: not between the agreement and the gathering.
            for one in parts:
                self._agreement.step(_plan([one]))
                yield from gathered([one])
            return
        plan, walk, more = _plan(parts), gathered(parts), True
        if not any(is_sharded(part) for _, part in parts):
            self._agreement.step(plan)
            yield from walk  # without a collective, so without rounds
            return
        while more:
            self._agreement.step(plan)
            # All of a round are gathered before the first is used, so that nobody fails between two of them.
            full, nbytes, more = [], 0, False
            for name, tensor in walk:
                nbytes += tensor.nbytes
                if self._leads:
                    full.append((name, tensor))
                if nbytes >= self._update.bucket_bytes(tensor.device):
                    more = True
                    break
            yield from full

    def _in_time(self, work: Callable[[], None]) -> None:
        """Do ``work`` on a thread, and leave it there where it does not end by the deadline.

        Raises:
            UpdateAborted: it did not.
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
            done.result(timeout=max(self._ends - time.monotonic(), 0.0) + GRACE_SECONDS)
        except FutureTimeout:
            if done.done():
                raise
            raise UpdateAborted(
                f"update to {self._name}: the trainer's ranks did not finish in time: {self._agreement.where()}"
            ) from None
