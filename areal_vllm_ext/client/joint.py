"""An update that all ranks of a ``torch.distributed`` job send together: their sharded weights are gathered, rank 0 sends.

Gathering is a collective, which only comes back when every rank is in it. So before each bucket's worth of tensors the ranks
agree to go on: a rank that has failed (an engine said no, a tensor does not fit, an error of the user's) says so instead, and
all others fail with its reason. The agreement goes through the job's store, not through a collective, and has the update's
deadline. A rank that dies inside a collective is out of reach of that: each rank's walk is on a thread, left at the deadline.
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
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ..errors import ArealError, UpdateAborted, UpdateInDoubt
from .blocking import EngineGroup, Update
from .update import AsyncUpdate, UpdateResult
from .weights import Named, gathered, named_parts

if TYPE_CHECKING:
    from types import TracebackType

# What is waited for here has its own end at the deadline, or less than a second after it, and says more then.
_GRACE_SECONDS = 0.9

# How often this process has begun an update to a version: all ranks count alike, so that each update has keys of its own.
_begun: Counter[tuple[str, str]] = Counter()


class _Outcome(msgspec.Struct):
    """What rank 0 tells the others when it is over."""

    error: str = ""
    result: UpdateResult | None = None


class Agreement:
    """Steps that all ranks of a job take, or none does."""

    def __init__(self, group: dist.ProcessGroup, update: str, ends: float) -> None:
        """
        Args:
            group: the ranks.
            update: names what they do; the same on each rank, and another each time.
            ends: when, by ``time.monotonic()``, waiting for the others is given up.
        """
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._store = dist.PrefixStore(f"areal-{group.group_name}-{update}", _get_process_group_store(group))
        self._ends = ends
        self._step = 0
        self._failed = ""

    def step(self, same: str) -> None:
        """Go on when every rank has come to its equal step.

        Args:
            same: what must be equal on all ranks.

        Raises:
            UpdateAborted: a rank failed, did not come in time, or has another ``same``.
        """
        if self._failed:
            raise UpdateAborted(self._failed)
        self._step += 1
        self._store.set(f"at/{self.rank}", str(self._step))
        if self._store.compare_set(f"same/{self._step}", "", same) != same.encode():
            reason = f"rank {self.rank} of the trainer would send other tensors than the ranks before it"
            self._store.set(f"go/{self._step}", reason)
        elif self._store.add(f"come/{self._step}", 1) == self.size:
            self._store.set(f"go/{self._step}", "")
            for key in ("come", "go", "same") if self._step > 2 else ():
                self._store.delete_key(f"{key}/{self._step - 2}")  # all have come here, so nobody is back there
        if reason := self._wait(f"go/{self._step}", max(self._ends - time.monotonic(), 0.0)).decode():
            raise UpdateAborted(reason)

    def fail(self, reason: str) -> None:
        """Have every other rank fail at its next step, with this reason."""
        self._failed = self._failed or f"rank {self.rank} of the trainer: {reason}"
        # Where the store is gone so are the others, or they hear of it themselves.
        with contextlib.suppress(dist.DistError):
            self._store.set(f"go/{self._step + 1}", self._failed)

    def tell(self, outcome: bytes) -> None:
        """Rank 0: say how it ended."""
        self._store.set("outcome", outcome.decode())

    def outcome(self) -> bytes:
        """The other ranks: hear how it ended."""
        try:
            return self._wait("outcome", max(self._ends - time.monotonic(), 0.0) + _GRACE_SECONDS)
        except UpdateAborted as error:
            raise UpdateInDoubt(
                f"rank 0 of the trainer did not say how the update ended: {error}; status() tells"
            ) from None

    def where(self) -> str:
        """Which ranks are behind, for people."""
        with contextlib.suppress(dist.DistError):
            steps = {
                rank: int(self._store.get(f"at/{rank}")) if self._store.check([f"at/{rank}"]) else 0
                for rank in range(self.size)
            }
            last = max(steps.values())
            behind = [str(rank) for rank, step in steps.items() if step < last]
            if behind:
                return f"rank {', '.join(behind)} of the trainer did not come to step {last}"
            return f"every rank came to step {last}: the collectives after it did not end"
        return "the job's store does not answer: is its rank 0 gone?"

    def _wait(self, key: str, timeout: float) -> bytes:
        # Looked for, not waited for: a wait would keep the store from everybody else in this process.
        ends, pause = time.monotonic() + timeout, 1e-4
        try:
            while not self._store.check([key]):
                if time.monotonic() > ends:
                    raise UpdateAborted(f"the trainer's ranks did not agree in time: {self.where()}")
                time.sleep(pause)
                pause = min(pause * 1.5, 5e-3)
            value: bytes = self._store.get(key)
        except dist.DistError as error:
            raise UpdateAborted(f"the trainer's ranks cannot agree, their store is gone: {error}") from None
        return value


def _plan(parts: list[Named]) -> str:
    """What the ranks must have in common to gather ``parts``."""
    shapes = [(name, str(part.dtype), tuple(part.shape)) for name, part in parts]
    return hashlib.sha256(msgspec.json.encode(shapes)).hexdigest()


class JointUpdate(Update):
    """``Update`` for a trainer of several ranks: every rank opens it and calls ``send``; every rank has its result or error.

    Made by ``EngineGroup.update(version, process_group=...)``. Only rank 0 talks to the engines.
    """

    def __init__(self, engines: EngineGroup, update: AsyncUpdate, group: dist.ProcessGroup, name: str) -> None:
        """
        Args:
            engines: this rank's; only rank 0's is used.
            update: likewise.
            group: the trainer's ranks.
            name: of the version.
        """
        super().__init__(engines, update)
        self._ranks = group
        self._name = name
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
        """See ``AsyncUpdate.send``. On every rank, with the same tensors in the same order.

        ``DTensor`` weights are gathered a bucket at a time. The caller's thread waits; the tensors are handled in another,
        on the caller's device and stream.
        """

        def walk() -> None:
            if self._leads:
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
            self._in_time(lambda: self._agreement.step("end"))  # every rank has left its block, and none with an error
        except BaseException as failure:
            self._close(type(failure), failure, failure.__traceback__)
            raise
        self._close(None, None, None)

    def _close(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the update, or hear how rank 0 ended it."""
        if not self._leads:
            if error is None:
                outcome = msgspec.json.decode(self._agreement.outcome(), type=_Outcome)
                if outcome.error:
                    raise UpdateAborted(outcome.error)
                self._heard = outcome.result
            return
        outcome = _Outcome(error=str(error) or type(error).__name__)
        try:
            super().__exit__(kind, error, trace)
            if error is None:
                outcome = _Outcome(result=self._update.result)
        except BaseException as failure:
            outcome = _Outcome(error=f"rank 0 of the trainer: {failure}")
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
        while more:
            self._agreement.step(plan)
            # All of a round are gathered before the first is used, so that nobody fails between two of them.
            full, nbytes, more = [], 0, False
            for name, tensor in walk:
                nbytes += tensor.nbytes
                if self._leads:
                    full.append((name, tensor))
                if nbytes >= self._update.bucket_bytes:
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
            done.result(timeout=max(self._ends - time.monotonic(), 0.0) + _GRACE_SECONDS)
        except FutureTimeout:
            if done.done():
                raise
            raise UpdateAborted(
                f"update to {self._name}: the trainer's ranks did not finish in time: {self._agreement.where()}"
            ) from None
