"""The update in flight on one engine: which of its steps the workers have finished, and who waits for them. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SEND_AGAIN
from ..protocol import WEIGHTS_ONLY, Ack, Answer, Error, ServedAdapter
from .effects import Effect, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..protocol import Begin, Bucket, WorkerDone
    from ..protocol.server import ReplyTo


class UpdateInFlight:
    """An update from Begin until it is committed or given up.

    A step is ``begin``, ``prepare``, or a bucket's.

    Attributes:
        ends: when the engine gives it up, unless it is in doubt.
        failure: why this engine votes no; empty while it does not.
        manifest: of what the workers voted that they hold.
        base: manifest of the live weights, if every worker accepts an update of the changed tensors only.
        delayed: other users' calls through vLLM that wait until the update has ended.
        units: what it consists of; known with Prepare.
    """

    def __init__(self, begin: Begin, ends: float, workers: frozenset[int]) -> None:
        self.begin = begin
        self.ends = ends
        self.failure = ""
        self.manifest = ""
        self.base = ""
        self.delayed: list[str] = []
        self.units = WEIGHTS_ONLY
        self._workers = workers
        self._step_workers: dict[str, frozenset[int]] = {}  # where a step is not for all of them
        self._waiting: dict[str, list[ReplyTo]] = {}
        self._finished: dict[str, set[int]] = {}

    def cause_of_end(self, reason: str) -> str:
        """Return why this engine gives the update up: a failure of its own, if there was one, comes before ``reason``."""
        if not self.delayed:
            return self.failure or reason
        calls = " and ".join(dict.fromkeys(self.delayed))
        return (
            f"{self.failure or reason}; {calls}, called through vLLM by another user, had to wait for the end of this update: "
            "do not wait for such a call inside of an update"
        )

    def expect(self, bucket: Bucket) -> str:
        """Note which workers get ``bucket``; return why it cannot be one of this update, or an empty string."""
        sender = self.begin.senders.get(bucket.sender)
        if sender is None:
            return f"update {bucket.update} has no sender {bucket.sender} on this engine"
        if sender.workers:
            self._step_workers[bucket.step] = frozenset(sender.workers)
        return ""

    def wait(self, caller: ReplyTo, step: str, orders: list[Effect]) -> list[Effect]:
        """Answer ``caller`` when every worker has finished ``step``; ``orders`` go out the first time only."""
        if self.failure:
            return [Reply(caller, Error(kind="failed", message=self.failure))]
        if self._is_finished(step):
            return [Reply(caller, self._done(step))]
        asked_before = step in self._waiting
        self._waiting.setdefault(step, []).append(caller)
        return [] if asked_before else orders

    def worker_done(self, message: WorkerDone, *, accepts_base: bool) -> tuple[str, bool, list[Effect]]:
        """Take a worker's report.

        Args:
            message: the report.
            accepts_base: whether the live weights can be the base of a delta update.

        Returns:
            the worker's problem or an empty string; whether the vote is complete; the answers to those who waited.
        """
        problem, step = message.error, message.step
        if not problem and step == "prepare":
            self.manifest = self.manifest or message.manifest
            if message.manifest != self.manifest:
                problem = f"holds other weights than another worker of this engine: {SEND_AGAIN}"
        if problem:
            return f"worker {message.rank}: {problem}", False, []
        if step == "begin":
            same = "begin" not in self._finished or message.manifest == self.base
            self.base = message.manifest if same and accepts_base else ""
        self._finished.setdefault(step, set()).add(message.rank)
        if not self._is_finished(step):
            return "", False, []
        answers: list[Effect] = [Reply(caller, self._done(step)) for caller in self._waiting.pop(step, [])]
        return "", step == "prepare" and not self.failure, answers

    def adapters_after(self, before: Mapping[str, ServedAdapter]) -> dict[str, ServedAdapter]:
        """Return the adapters that an engine serves after this update."""
        version = self.begin.version
        brought = {one.name: ServedAdapter(version=version, manifest=one.manifest) for one in self.units.adapters}
        return {name: one for name, one in before.items() if name not in self.units.removed} | brought

    def answer_all(self, answer: Answer) -> list[Effect]:
        """Answer everyone who waits for a step."""
        callers = [caller for waiting in self._waiting.values() for caller in waiting]
        self._waiting.clear()
        return [Reply(caller, answer) for caller in callers]

    def _is_finished(self, step: str) -> bool:
        return self._finished.get(step, set()) >= self._step_workers.get(step, self._workers)

    def _done(self, step: str) -> Ack:
        return Ack(manifest=self.base if step == "begin" else self.manifest)


def wrong_senders(begin: Begin, workers: frozenset[int]) -> str:
    """Return why an engine with ``workers`` cannot take part in this update; empty if it can."""
    receiving = [set(sender.workers) for sender in begin.senders.values()]
    if receiving and all(workers.issuperset(ranks) for ranks in receiving):
        return ""
    return f"this engine has the workers {sorted(workers)}, and the update has {begin.senders}"
