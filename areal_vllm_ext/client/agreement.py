"""What the ranks of a trainer agree on while they send an update: through their job's store, not by collectives.

A collective only comes back when every rank is in it. Here a rank that has failed says so, and all others fail with its reason.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

from ..errors import UpdateAborted, UpdateInDoubt

# What is waited for here has its own end at the deadline, or less than a second after it, and says more then.
GRACE_SECONDS = 0.9


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
        self._said = 0
        self._shown = 0
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

    def failure(self) -> str:
        """Why this rank's next step will fail, where that is known."""
        key = f"go/{self._step + 1}"
        return self._failed or (self._store.get(key).decode() if self._store.check([key]) else "")

    def show(self, text: str) -> None:
        """A step to which each rank brings ``text``; every rank can ``read`` it until the next one."""
        before, self._shown = self._shown, self._step + 1
        self._store.set(f"shown/{self._shown}/{self.rank}", text)
        self.step("show")
        if before:
            self._store.delete_key(f"shown/{before}/{self.rank}")  # all have come here, so nobody reads it any more

    def read(self, rank: int) -> bytes:
        """What ``rank`` showed last."""
        value: bytes = self._store.get(f"shown/{self._shown}/{rank}")
        return value

    def say(self, text: str) -> None:
        """Rank 0: tell the others, who ``hear`` it."""
        self._said += 1
        self._store.set(f"said/{self._said}", text)
        self._store.delete_key(f"said/{self._said - 2}")

    def hear(self) -> bytes:
        """The other ranks: what rank 0 says next.

        Raises:
            UpdateAborted: a rank failed, or it was not said in time.
        """
        self._said += 1
        return self._wait(f"said/{self._said}", max(self._ends - time.monotonic(), 0.0), or_fails=True)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One rank at a time.

        Raises:
            UpdateAborted: another rank's did not end in time.
        """
        pause = 1e-4
        while (owner := self._store.compare_set("turn", "", str(self.rank))) != str(self.rank).encode():
            if reason := self.failure():
                raise UpdateAborted(reason)
            if time.monotonic() > self._ends:
                raise UpdateAborted(f"rank {owner.decode()} of the trainer sends, and does not end")
            time.sleep(pause)
            pause = min(pause * 1.5, 5e-3)
        try:
            yield
        finally:
            self._store.delete_key("turn")

    def tell(self, outcome: bytes) -> None:
        """Rank 0: say how it ended."""
        self._store.set("outcome", outcome.decode())

    def outcome(self) -> bytes:
        """The other ranks: hear how it ended."""
        try:
            return self._wait("outcome", max(self._ends - time.monotonic(), 0.0) + GRACE_SECONDS)
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

    def _wait(self, key: str, timeout: float, *, or_fails: bool = False) -> bytes:
        # Looked for, not waited for: a wait would keep the store from everybody else in this process.
        ends, pause = time.monotonic() + timeout, 1e-4
        try:
            while not self._store.check([key]):
                if or_fails and (reason := self.failure()):
                    raise UpdateAborted(reason)
                if time.monotonic() > ends:
                    raise UpdateAborted(f"the trainer's ranks did not agree in time: {self.where()}")
                time.sleep(pause)
                pause = min(pause * 1.5, 5e-3)
            value: bytes = self._store.get(key)
        except dist.DistError as error:
            raise UpdateAborted(f"the trainer's ranks cannot agree, their store is gone: {error}") from None
        return value
