"""Coverage of the simulation as a number: which messages met which states, and which faults struck in which phases."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable
from typing import Any

from areal_vllm_ext.engine_core.participant import Participant

from .base import require

PHASES = ("none", "begin", "receiving", "prepare", "pause", "commit", "resume", "abort")
UPDATE_PHASES = ("idle", "receiving", "prepared", "committing", "tainted", "stale")
GENERATIONS = ("running", "pausing", "paused", "resuming")
MESSAGES = (
    "AdoptEpoch",
    "Abort",
    "Begin",
    "Bucket",
    "Commit",
    "EndOffer",
    "Fence",
    "GetStatus",
    "KeepPaused",
    "OfferWeights",
    "Pause",
    "Prepare",
    "Resume",
    "Sleep",
    "WakeUp",
)


# States in which no message can find an engine, and why.
_TICK = "the endpoint pauses such an engine before it reads the next message"
_COMMIT = "only a paused engine commits, and it resumes and pauses for nobody meanwhile"
IMPOSSIBLE = {
    ("committing", "running"): _COMMIT,
    ("committing", "pausing"): _COMMIT,
    ("committing", "resuming"): _COMMIT,
    ("tainted", "running"): _TICK,
    ("stale", "running"): _TICK,
}


class Coverage:
    """Counts what a simulation has met.

    Attributes:
        messages: by state of the engine (update phase and generation) and message.
        faults: by phase of the update and fault.
        fetched: how often a stale engine got its weights from a peer.
    """

    def __init__(self) -> None:
        self.messages: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.faults: collections.Counter[tuple[str, str]] = collections.Counter()
        self.fetched = 0

    def message(self, participant: Participant, message: Any) -> None:
        """Note that a message has come to an engine."""
        phase: str = participant.update_phase
        if phase == "idle":
            phase = "tainted" if participant.tainted else "stale" if participant.stale else phase
        impossible = IMPOSSIBLE.get((phase, participant.generation))
        require(not impossible, "rule", f"an engine is {phase} and {participant.generation}, although {impossible}")
        self.messages[phase, participant.generation, type(message).__name__] += 1

    def fault(self, phase: str, fault: str) -> None:
        """Note that a fault has struck in a phase of an update."""
        self.faults[phase, fault] += 1

    def update(self, other: Coverage) -> None:
        """Add what another simulation has met."""
        self.messages.update(other.messages)
        self.faults.update(other.faults)
        self.fetched += other.fetched

    def report(self, faults: Iterable[str]) -> dict[str, object]:
        """Return the coverage and what is missing, for the faults that were allowed."""
        states = [state for state in itertools.product(UPDATE_PHASES, GENERATIONS) if state not in IMPOSSIBLE]
        messages = [(*state, message) for state in states for message in MESSAGES]
        struck = list(itertools.product(PHASES, faults))
        return {
            "state_and_message": f"{sum(pair in self.messages for pair in messages)} of {len(messages)}",
            "phase_and_fault": f"{sum(pair in self.faults for pair in struck)} of {len(struck)}",
            "fetched_from_peers": self.fetched,
            "messages_missing": _grouped((f"{a}, {b}", c) for a, b, c in messages if (a, b, c) not in self.messages),
            "faults_missing": _grouped(pair for pair in struck if pair not in self.faults),
            "cannot_happen": {", ".join(state): reason for state, reason in IMPOSSIBLE.items()},
            "rarest_messages": {", ".join(pair): self.messages[pair] for pair in _rarest(self.messages)},
        }


def _rarest(met: collections.Counter[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return sorted(met, key=lambda pair: met[pair])[:10]


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = collections.defaultdict(list)
    for one, other in pairs:
        grouped[one].append(other)
    return dict(grouped)
