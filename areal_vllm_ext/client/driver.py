"""``Driver``: carries out what the coordinator of an update says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

from .. import protocol
from ..errors import EngineUnreachable, RequestError, UpdateAborted
from ..observability import trace
from .coordinator import Coordinator, Member

if TYPE_CHECKING:
    from ..control.command import Commander, Target
    from ..control.connection import RequestBatch
    from ..protocol import Answer, EngineRequest, Sender, Staging
    from .context import UpdateContext

    # What an engine serves after a commit that it did not answer, or answered with an error.
    Fate = Literal["committed", "old weights", "tainted"]
    Outcomes = asyncio.Queue[tuple[str, Answer | EngineUnreachable]]

logger = logging.getLogger("vllm.areal_vllm_ext")

# After the deadline we still send one Abort (or Commit) and one Resume and wait this long for the answers, under 1 s in total.
# The directory recovers the rest.
_GRACE_SECONDS = {"abort": 0.35, "commit": 0.3, "resume": 0.25}
# An engine that commits for longer, while all others are paused, is dropped.
_COMMIT_SECONDS = 120.0
_ABORT_SECONDS = 5.0
# A lease is renewed every 1.25 s.
_SILENT_SECONDS = 2.5


class Driver:
    """Sends the coordinator's requests to the engines, and gives it their answers.

    Attributes:
        coordinator: the state of the update; None before ``begin``.
        pause_started: when the engines were asked to pause, by ``time.monotonic()``.
        commit_seconds: the longest commit of an engine.
    """

    def __init__(self, context: UpdateContext, targets: Mapping[str, Target], commander: Commander) -> None:
        """
        Args:
            context: of the update.
            targets: the engines, by name.
            commander: holds the lease.
        """
        self.coordinator: Coordinator | None = None
        self.pause_started = 0.0
        self.commit_seconds = 0.0
        self._context = context
        self._targets = targets
        self._commander = commander
        self._beginning: asyncio.Task[object] | None = None

    async def begin(self, senders: Mapping[str, Mapping[int, Sender]], stagings: Mapping[str, Staging]) -> None:
        """Begin the update at every engine, under a new id; returns when every worker is ready to receive.

        Args:
            senders: by engine, who sends to it.
            stagings: by engine, what its workers stage.

        Raises:
            UpdateAborted: an engine is not ready, or the update has ended meanwhile.
        """
        if self._context.closed.is_set():
            raise UpdateAborted(self._context.given_up("its block was left while it was sending"))
        options, targets = self._context.options, self._targets
        # All engines of a replica or none: the ranks of an MoE group resume together. One that a user has paused stays so.
        resumes = {target.engine.replica for target in targets.values() if target.resumes}
        members = {
            name: Member(target.epoch, target.engine.replica in resumes, target.behind)
            for name, target in targets.items()
        }
        coordinator = Coordinator(uuid.uuid4().hex, self._context.version, members, options.mode, options.kv)
        self.coordinator = coordinator
        spans = trace.spans_for(target.engine for target in targets.values()) if options.trace else 0
        self._beginning = asyncio.current_task()
        try:
            await self.run(coordinator.begin(senders, self._context.left, stagings, spans))
        finally:
            self._beginning = None
        self.raise_if_given_up()

    async def stop_beginning(self) -> None:
        """Cancel a ``begin`` that another task still runs, and wait until it has aborted the update."""
        if self._beginning is not None:
            self._beginning.cancel()
            await asyncio.wait([self._beginning])

    @property
    def refused(self) -> bool:
        """Whether an engine refused, instead of not answering."""
        return self.coordinator is not None and self.coordinator.refused

    def raise_if_given_up(self) -> None:
        """Raise UpdateAborted if the update was given up."""
        if self.coordinator and self.coordinator.reason:
            raise UpdateAborted(self._context.given_up(self.coordinator.reason))

    async def run(self, requests: dict[str, EngineRequest]) -> None:
        """Send ``requests`` and what the coordinator answers to their outcome, until no engine is awaited.

        A cancelled run goes on to the next state in which no engine waits: back to the old weights while that is possible,
        else on to the new ones. Then it raises CancelledError. A second cancellation ends it at once.
        """
        coordinator = self.coordinator
        assert coordinator is not None
        sent, outcomes = self._send(coordinator.phase, requests)
        cancelled: asyncio.CancelledError | None = None
        try:
            while coordinator.awaited:
                try:
                    name, outcome = await outcomes.get()
                    may_commit = await self._may_commit(coordinator, name, outcome)
                except asyncio.CancelledError as first:
                    if cancelled:
                        raise
                    cancelled = first
                    if coordinator.phase in ("begin", "prepare", "pause"):
                        sent.cancel()
                        requests = coordinator.give_up("the trainer was interrupted")
                        sent, outcomes = self._send(coordinator.phase, requests)
                    continue
                phase = coordinator.phase
                if may_commit:
                    more = self._next(coordinator, name, outcome)
                else:
                    more = coordinator.give_up("another client took the lease while this process was stopped")
                if coordinator.phase != phase:
                    sent.cancel()  # requests of a phase that has ended
                if more:
                    sent, outcomes = self._send(coordinator.phase, more)
                elif coordinator.phase != phase:
                    break
        finally:
            sent.cancel()
        self._context.spans.set_state("update", "" if coordinator.phase == "done" else coordinator.phase)
        if cancelled:
            raise cancelled

    async def _may_commit(self, coordinator: Coordinator, name: str, outcome: Answer | EngineUnreachable) -> bool:
        """Return False if this outcome would lead to the commit, and another client has taken the lease.

        A process that was stopped between pause and commit may wake after the directory has resolved its update. Engines that
        the directory has reached refuse the commit, but an engine that was out of its reach would not.
        """
        if coordinator.phase != "pause" or coordinator.awaited != {name} or not isinstance(outcome, protocol.Ack):
            return True
        return await self._commander.holds_lease(min(max(self._context.left, 0.05), 1.0))

    def _next(
        self, coordinator: Coordinator, name: str, outcome: Answer | EngineUnreachable
    ) -> dict[str, EngineRequest]:
        """Give the coordinator the outcome of a request; return the requests that it sends next."""
        left = self._context.left
        if isinstance(outcome, EngineUnreachable):
            return coordinator.silent(name, str(outcome), left)
        if isinstance(outcome, protocol.Error) and outcome.kind == "fenced":
            outcome = self._with_own_silence(outcome)
        if coordinator.phase == "commit" and isinstance(outcome, protocol.Ack):
            self.commit_seconds = max(self.commit_seconds, outcome.seconds)
        return coordinator.answered(name, outcome, left)

    def _with_own_silence(self, refusal: protocol.Error) -> protocol.Error:
        """Add to a refusal for another client's sake that this one has lost the lease by its own silence, if it was silent."""
        age = self._commander.lease_age
        if age < _SILENT_SECONDS:
            return refusal
        return msgspec.structs.replace(
            refusal,
            message=f"{refusal.message}; this client has not renewed its lease for {age:.1f} s, because its event loop was "
            "blocked (by on_phase, for example) or the directory did not answer",
        )

    def _send(self, phase: str, requests: dict[str, EngineRequest]) -> tuple[RequestBatch, Outcomes]:
        """Send the requests of a phase, all at once; the queue gets the outcome of each."""
        self._context.spans.set_state("update", phase)
        if on_phase := self._context.options.on_phase:
            try:
                on_phase(phase)
            except KeyboardInterrupt:
                raise
            except BaseException:  # sys.exit() too: what this update has begun, it must end
                logger.exception("on_phase(%r) failed; the update to version %s goes on", phase, self._context.version)
        if phase == "pause":
            self.pause_started = time.monotonic()
        outcomes: Outcomes = asyncio.Queue()
        addressed = {name: (self._targets[name].engine.address, message) for name, message in requests.items()}

        def heard(name: str, outcome: Answer | EngineUnreachable) -> None:
            outcomes.put_nowait((name, outcome))

        return self._context.link.ask(addressed, self._timeout_of(phase), heard), outcomes

    def _timeout_of(self, phase: str) -> float:
        left = self._context.left
        if phase in _GRACE_SECONDS:
            longest = _ABORT_SECONDS if phase == "abort" else _COMMIT_SECONDS
            return min(max(left, 0.0) + _GRACE_SECONDS[phase], longest)
        return max(left, 0.05)

    async def ask_lost(self) -> dict[str, Fate]:
        """Ask the engines that did not commit, as far as is known, what became of the update.

        Returns:
            by engine, what it serves. Engines that do not know yet, or do not answer, are left out.
        """
        coordinator = self.coordinator
        assert coordinator is not None
        fates: dict[str, Fate] = {}
        timeout = 1.0 if self._context.left > 1.0 else 0.1

        async def ask(name: str) -> None:
            with contextlib.suppress(EngineUnreachable, RequestError):
                target = self._targets[name]
                status = await self._context.link.request(target.engine.address, protocol.GetStatus(), timeout)
                assert isinstance(status, protocol.Status)
                if status.last_update == coordinator.update:
                    coordinator.found_committed(name, running=status.generation == "running")
                    fates[name] = "committed"
                elif status.update_phase == "tainted":
                    fates[name] = "tainted"
                elif status.update != coordinator.update and status.committed_epoch < target.epoch:
                    fates[name] = "old weights"

        await asyncio.gather(*(ask(name) for name in list(coordinator.lost)))
        return fates
