"""The trainer's side of an update: a state machine with no I/O, no clock and no randomness.

    BEGIN ──all ready──▶ SEND ──sent──▶ PREPARE ──all yes──▶ PAUSE ──all paused──▶ COMMIT ──all answered──▶ RESUME ──▶ DONE
                                           │  all yes, ``hold``  ▲
                                           └──▶ PREPARED ─commit─┘
      │                   │               │ one no, or silence  │                    (an engine lost here is dropped)
      └───────────────────┴───────────────┴────────────────────┴──▶ ABORT ──all answered──▶ DONE
                                                                      ▲ (every engine refused the commit, or failed in it)

Answers and time-outs go in; the requests to send come out. Commit is sent only after every engine has acknowledged the pause.
Until then a problem aborts the update, and every engine keeps its old weights. PREPARED is where a trainer holds an update
whose votes it has: nothing is sent there.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import msgspec

from ..errors import SEND_AGAIN, join
from ..protocol import (
    WEIGHTS_ONLY,
    Abort,
    Ack,
    Answer,
    Begin,
    Commit,
    EngineRequest,
    Error,
    KVPolicy,
    Pause,
    PauseMode,
    Prepare,
    Resume,
    Sender,
    Staging,
    Units,
    Version,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

Phase = Literal["begin", "send", "prepare", "prepared", "pause", "commit", "resume", "abort", "done"]


@dataclasses.dataclass(frozen=True)
class Member:
    """An engine of the update.

    Attributes:
        epoch: of the lease.
        running: whether the engine generated when the update began.
        behind: whether its weights are older than the group's. Such an engine runs only after a commit.
    """

    epoch: int
    running: bool = True
    behind: bool = False


class Coordinator:
    """One update of one group.

    Attributes:
        phase: where the update is.
        reason: why the update was given up; empty if it was not.
        refused: whether an engine refused, instead of not answering.
        commit_sent: whether an engine may have committed.
        committed: the engines that committed.
        lost: the engines that did not answer, or failed, once the commit was sent, with the cause.
    """

    def __init__(
        self,
        update: str,
        version: Version,
        members: Mapping[str, Member],
        mode: PauseMode = "keep",
        kv: KVPolicy = "recompute",
    ) -> None:
        self.update = update
        self.version = version
        self.members = dict(members)
        self.mode: PauseMode = mode
        self.kv: KVPolicy = kv
        self.phase: Phase = "begin"
        self.reason = ""
        self.refused = False
        self.commit_sent = False
        self.committed: list[str] = []
        self.lost: dict[str, str] = {}
        self._awaited: set[str] = set()
        self._bases: set[str] = set()
        self._pause_sent = False
        self._hold = False
        # Engines that answered the commit with a refusal or a failure, so that they will not commit later.
        self._not_committing: set[str] = set()
        # The manifest that every engine must hold. It comes from the trainer or, from disk, from the first engine that votes.
        self._manifest: str | None = None
        self._manifest_of = "the trainer"

    @property
    def base(self) -> str:
        """The manifest of the weights that every engine has, if all can take changed tensors only; else empty."""
        return next(iter(self._bases)) if len(self._bases) == 1 else ""

    @property
    def awaited(self) -> frozenset[str]:
        """The engines whose answer is awaited."""
        return frozenset(self._awaited)

    def begin(
        self,
        senders: Mapping[str, Mapping[int, Sender]],
        timeout: float,
        stagings: Mapping[str, Staging] | None = None,
        spans: int = 0,
    ) -> dict[str, EngineRequest]:
        """Begin the update at every engine.

        Args:
            senders: by engine, who sends to it.
            timeout: seconds that are left for the update.
            stagings: by engine, what its workers stage.
            spans: see ``protocol.Begin``.
        """
        self._awaited = set(self.members)
        return {
            name: Begin(
                epoch=member.epoch,
                update=self.update,
                version=self.version,
                senders=dict(senders[name]),
                timeout=timeout,
                staging=stagings[name] if stagings else Staging(),
                spans=spans,
            )
            for name, member in self.members.items()
        }

    def sent(
        self,
        buckets: Mapping[int, int],
        manifest: str = "",
        base: str = "",
        kept: tuple[str, ...] = (),
        units: Units = WEIGHTS_ONLY,
        *,
        hold: bool = False,
    ) -> dict[str, EngineRequest]:
        """Ask for the votes, because all bytes were sent.

        Args:
            buckets: by sender, how many buckets it sent.
            manifest: of all units; empty if the trainer does not know it.
            base, kept, units: see ``protocol.Prepare``.
            hold: wait for ``commit`` when all engines have voted yes.
        """
        assert self.phase == "send", self.phase
        self._manifest, self._hold = manifest or None, hold
        if not units.weights:
            self.kv = "reuse"  # each version of an adapter has keys and values of its own
        self.phase, self._awaited = "prepare", set(self.members)
        prepare = Prepare(epoch=0, update=self.update, buckets=dict(buckets), base=base, kept=kept, units=units)
        return {name: msgspec.structs.replace(prepare, epoch=member.epoch) for name, member in self.members.items()}

    def commit(self, timeout: float) -> dict[str, EngineRequest]:
        """Go on with an update that was held after the votes. ``timeout``: seconds that are left for the update."""
        assert self.phase == "prepared", self.phase
        return self._pause(timeout)

    def answered(self, name: str, answer: Answer, timeout: float) -> dict[str, EngineRequest]:
        """Take an engine's answer to the request of this phase.

        Args:
            name: the engine.
            answer: its answer.
            timeout: seconds that are left for the update.

        Returns:
            the requests to send next, by engine.
        """
        if name not in self._awaited:
            return {}
        problem = "" if isinstance(answer, Ack) else describe(answer)
        if self.phase == "begin" and isinstance(answer, Ack):
            self._bases.add(answer.manifest)
        if self.phase == "prepare" and isinstance(answer, Ack):
            problem = self._compare(name, answer.manifest)
        if problem and self.phase in ("begin", "prepare", "pause"):
            self.refused = True
            return self.give_up(f"{name}: {problem}")
        self._awaited.discard(name)
        if self.phase == "commit":
            if problem:
                self.lost[name] = problem
                if isinstance(answer, Error) and answer.kind in ("failed", "state"):
                    self._not_committing.add(name)
            else:
                self.committed.append(name)
        elif self.phase == "resume" and problem:
            self.lost[name] = f"did not resume: {problem}"
        return {} if self._awaited else self._advance(timeout)

    def silent(self, name: str, cause: str, timeout: float) -> dict[str, EngineRequest]:
        """Note that an engine did not answer the request of this phase in time. Arguments as in ``answered``."""
        if name not in self._awaited:
            return {}
        if self.phase in ("begin", "prepare", "pause"):
            return self.give_up(f"{name}: {cause}")
        self._awaited.discard(name)
        if self.phase in ("commit", "resume"):
            self.lost[name] = cause
        return {} if self._awaited else self._advance(timeout)

    def give_up(self, reason: str) -> dict[str, EngineRequest]:
        """Go back to the old weights at every engine. Not possible once an engine may commit."""
        assert self.phase in ("begin", "send", "prepare", "prepared", "pause"), self.phase
        return self._abort(reason)

    def _abort(self, reason: str) -> dict[str, EngineRequest]:
        self.phase, self.reason, self._awaited = "abort", reason, set(self.members)
        return {
            name: Abort(epoch=member.epoch, update=self.update, reason=reason) for name, member in self.members.items()
        }

    def found_committed(self, name: str, *, running: bool) -> None:
        """Note that a lost engine has committed after all. Unless it is ``running``, it counts as lost until it is resumed."""
        if name not in self.committed:
            self.committed.append(name)
        if running:
            self.lost.pop(name, None)

    def _compare(self, name: str, manifest: str) -> str:
        """Return what is wrong with the vote of ``name``; empty if its manifest is that of all others."""
        if self._manifest is None:
            self._manifest, self._manifest_of = manifest, name
        if manifest == self._manifest:
            return ""
        return f"holds other weights than {self._manifest_of}: {SEND_AGAIN}"

    def _advance(self, timeout: float) -> dict[str, EngineRequest]:
        """Go to the next phase, because every awaited engine has answered."""
        match self.phase:
            case "begin":
                self.phase = "send"
                return {}
            case "prepare" if self._hold:
                self.phase = "prepared"
                return {}
            case "prepare":
                return self._pause(timeout)
            case "pause" if timeout <= 0:
                return self.give_up("its timeout was over when every engine had paused; use a longer timeout")
            case "pause":
                self.phase, self._awaited, self.commit_sent = "commit", set(self.members), True
                return {name: Commit(epoch=member.epoch, update=self.update) for name, member in self.members.items()}
            case "commit" if self._not_committing == set(self.members):
                return self._abort(f"no engine committed: {join(self.lost)}")
            case "commit":
                return self._resume([name for name in self.members if name not in self.lost], "resume")
            case "abort" if self._pause_sent:
                self._pause_sent = False
                return self._resume(list(self.members), "abort")
            case _:
                self.phase = "done"
                return {}

    def _pause(self, timeout: float) -> dict[str, EngineRequest]:
        self.phase, self._awaited, self._pause_sent = "pause", set(self.members), True
        return {
            name: Pause(epoch=member.epoch, mode=self.mode, kv=self.kv, timeout=timeout, update=self.update)
            for name, member in self.members.items()
        }

    def _resume(self, names: list[str], phase: Phase) -> dict[str, EngineRequest]:
        """Let the engines run that ran before the update."""
        requests: dict[str, EngineRequest] = {
            name: Resume(epoch=self.members[name].epoch, update=self.update)
            for name in names
            if self.members[name].running and not (phase == "abort" and self.members[name].behind)
        }
        self.phase, self._awaited = (phase, set(requests)) if requests else ("done", set())
        return requests


def describe(answer: Answer) -> str:
    """Describe an unexpected answer for people."""
    return answer.message if isinstance(answer, Error) else f"unexpected answer {type(answer).__name__}"
