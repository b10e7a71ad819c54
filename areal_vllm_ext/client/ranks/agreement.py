"""``Agreement``: what the trainer's ranks tell each other during an update, through the store of their job.

A collective returns only when every rank is in it. The store has no such limit: a rank that has failed writes its reason
there, and all other ranks fail with that reason.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ...errors import UpdateAborted, UpdateInDoubt

# What a rank waits for ends by itself at the deadline, or less than a second later, with a better message. So wait longer.
GRACE_SECONDS = 0.9
# Poll the store with growing pauses between these bounds.
_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 1e-4, 5e-3


class Agreement:
    """Steps that all ranks of a job take, or none does.

    Attributes:
        rank, size: this rank, and how many there are.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, ends: float) -> None:
        """
        Args:
            rank: this rank.
            size: how many ranks there are.
            store: shared by the ranks, and used for this update only.
            ends: deadline of every wait, by ``time.monotonic()``.
        """
        self.rank, self.size = rank, size
        self._store, self._ends = store, ends
        self._step = 0
        self._broadcasts = 0
        self._gathered_at = 0
        self._failed = ""

    @classmethod
    def of_group(cls, group: dist.ProcessGroup, update: str, ends: float) -> Agreement:
        """Return the agreement of a process group's ranks.

        Args:
            group: the ranks.
            update: names the update; equal on all ranks, and different each time.
            ends: deadline of every wait, by ``time.monotonic()``.
        """
        store = dist.PrefixStore(f"areal-{group.group_name}-{update}", _get_process_group_store(group))
        return cls(dist.get_rank(group), dist.get_world_size(group), store, ends)

    def barrier(self, same: str) -> None:
        """Wait until every rank has come to this step.

        Args:
            same: must be equal on all ranks.

        Raises:
            UpdateAborted: a rank failed, did not come in time, or gave another ``same``.
        """
        if self._failed:
            raise UpdateAborted(self._failed)
        self._step += 1
        self._store.set(f"at/{self.rank}", str(self._step))
        if self._store.compare_set(f"same/{self._step}", "", same) != same.encode():
            reason = (
                f"rank {self.rank} of the trainer has other tensors than an earlier rank: "
                "give send(...) the same names, shapes and dtypes in the same order on every rank"
            )
            self._store.set(f"go/{self._step}", reason)
        elif self._store.add(f"come/{self._step}", 1) == self.size:
            self._store.set(f"go/{self._step}", "")
            # Every rank has come here, so no rank still reads the keys of two steps ago.
            for key in ("come", "go", "same") if self._step > 2 else ():
                self._store.delete_key(f"{key}/{self._step - 2}")
        if reason := self._wait(f"go/{self._step}", max(self._ends - time.monotonic(), 0.0)).decode():
            raise UpdateAborted(reason)

    def fail(self, reason: str) -> None:
        """Make every other rank fail at its next barrier, with this reason."""
        self._failed = self._failed or f"rank {self.rank} of the trainer: {reason}"
        # If the store is gone, the other ranks are gone too, or notice it themselves.
        with contextlib.suppress(dist.DistError):
            self._store.set(f"go/{self._step + 1}", self._failed)

    def failure(self) -> str:
        """Return why this rank's next barrier will fail; empty if no failure is known."""
        key = f"go/{self._step + 1}"
        return self._failed or (self._store.get(key).decode() if self._store.check([key]) else "")

    def all_gather(self, text: str) -> None:
        """Share ``text`` with all ranks, in a barrier. ``gathered`` returns it until the next ``all_gather``."""
        before, self._gathered_at = self._gathered_at, self._step + 1
        self._store.set(f"gathered/{self._gathered_at}/{self.rank}", text)
        self.barrier("all_gather")
        if before:
            self._store.delete_key(f"gathered/{before}/{self.rank}")

    def gathered(self) -> list[bytes]:
        """Return what each rank gave to the last ``all_gather``, in rank order."""
        return [self._store.get(f"gathered/{self._gathered_at}/{rank}") for rank in range(self.size)]

    def broadcast(self, text: str) -> None:
        """Send ``text`` from rank 0 to the other ranks. They call ``receive_broadcast``."""
        self._broadcasts += 1
        self._store.set(f"broadcast/{self._broadcasts}", text)
        self._store.delete_key(f"broadcast/{self._broadcasts - 2}")

    def receive_broadcast(self) -> bytes:
        """Return the next ``broadcast`` of rank 0.

        Raises:
            UpdateAborted: a rank failed, or rank 0 did not send in time.
        """
        self._broadcasts += 1
        key = f"broadcast/{self._broadcasts}"
        return self._wait(key, max(self._ends - time.monotonic(), 0.0), or_fails=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one rank at a time into the body.

        Raises:
            UpdateAborted: another rank failed, or did not leave the body in time.
        """
        pause = _SHORTEST_POLL_SECONDS
        while (owner := self._store.compare_set("lock", "", str(self.rank))) != str(self.rank).encode():
            if reason := self.failure():
                raise UpdateAborted(reason)
            if time.monotonic() > self._ends:
                raise UpdateAborted(f"rank {owner.decode()} of the trainer did not finish sending a bucket in time")
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_POLL_SECONDS)
        try:
            yield
        finally:
            self._store.delete_key("lock")

    def publish_result(self, result: bytes) -> None:
        """Publish, from rank 0, how the update ended."""
        self._store.set("result", result.decode())

    def await_result(self) -> bytes:
        """Return what rank 0 published.

        Raises:
            UpdateInDoubt: rank 0 published nothing in time.
        """
        try:
            return self._wait("result", max(self._ends - time.monotonic(), 0.0) + GRACE_SECONDS)
        except UpdateAborted as error:
            raise UpdateInDoubt(
                f"rank 0 of the trainer did not say how the update ended: {error}; status() shows what the engines serve"
            ) from None

    def progress(self) -> str:
        """Describe, for people, which ranks are behind."""
        with contextlib.suppress(dist.DistError):
            steps = {
                rank: int(self._store.get(f"at/{rank}")) if self._store.check([f"at/{rank}"]) else 0
                for rank in range(self.size)
            }
            last = max(steps.values())
            behind = [str(rank) for rank, step in steps.items() if step < last]
            if behind:
                return f"rank {', '.join(behind)} of the trainer did not come to step {last}"
            return f"every rank came to step {last}, but a collective after it did not end"
        return "the job's store does not answer: is its rank 0 gone?"

    def _wait(self, key: str, timeout: float, *, or_fails: bool = False) -> bytes:
        # Poll instead of store.wait(), which would block every other user of this store client.
        ends, pause = time.monotonic() + timeout, _SHORTEST_POLL_SECONDS
        try:
            while not self._store.check([key]):
                if or_fails and (reason := self.failure()):
                    raise UpdateAborted(reason)
                if time.monotonic() > ends:
                    raise UpdateAborted(f"the trainer's ranks did not agree in time: {self.progress()}")
                time.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_POLL_SECONDS)
            value: bytes = self._store.get(key)
        except dist.DistError as error:
            raise UpdateAborted(
                f"the trainer's ranks cannot agree: their job's store is gone ({error}); is rank 0 of the job up?"
            ) from None
        return value
