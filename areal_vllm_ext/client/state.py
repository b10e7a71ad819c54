"""What users receive: the state of an engine, and the result of an update. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping  # at runtime, because msgspec decodes an UpdateResult from another trainer rank
from typing import TYPE_CHECKING, Literal

from ..protocol import Version

if TYPE_CHECKING:
    from ..protocol import EngineInfo, Generation, SleepState, Status, UpdatePhase


@dataclasses.dataclass(frozen=True)
class EngineState:
    """The state of an engine.

    Attributes:
        version: names the weights that the engine serves; None if the engine did not answer.
        generation: ``running``, ``pausing``, ``paused``, ``resuming``, or ``unreachable`` if the engine did not answer.
        update_phase: where the engine is in an update: ``idle``, ``receiving``, ``prepared`` or ``committing``;
            ``tainted`` if its weights are partly loaded, ``stale`` if they are older than the group's, ``foreign`` if another
            user of the engine has changed them. Empty if it did not answer.
        requests: running and waiting requests.
        waiting_for_engine: seconds since the engine's loop last ran a call; a large number means that the loop is stuck.
        error: why the engine did not answer, or what went wrong there.
        weights: digest of the weights of the last update, equal on engines that serve the same; empty before the first.
        loaded: how they were loaded: ``plan`` or ``shadow`` (both a copy in the pause), or ``reload`` with the reason (longer);
            ``peer: ENGINE`` if they were fetched from that engine.
        sleep: what vLLM's sleep mode has left on the device: ``awake``, ``weights_only``, ``asleep_1`` (weights kept aside),
            ``asleep_2`` (weights discarded). Empty if the engine did not answer.
        free_memory: bytes that were free on its device after it fell asleep or woke up last; None before that, or on a CPU.
        unproven: why those weights could not be compared with a fresh load; empty if they were.
        adapters: the LoRA adapters that updates brought, by name, with the version of the update.
        drafter: how the engine drafts with a model (``eagle``, ``mtp``, ``draft_model``); empty if it does not.
        draft_version: the version of the last update that moved the drafter; None if none has.
    """

    name: str
    replica: str
    dp_rank: int
    node: str
    headless: bool
    version: Version | None
    generation: Generation | Literal["unreachable"]
    update_phase: UpdatePhase | Literal[""]
    requests: int
    waiting_for_engine: float
    error: str
    weights: str = ""
    loaded: str = ""
    unproven: str = ""
    sleep: SleepState | Literal[""] = ""
    free_memory: int | None = None
    adapters: Mapping[str, Version] = dataclasses.field(default_factory=dict)
    drafter: str = ""
    draft_version: Version | None = None

    @classmethod
    def of(cls, engine: EngineInfo, status: Status | None, error: str = "") -> EngineState:
        return cls(
            name=engine.name,
            replica=engine.replica,
            dp_rank=engine.dp_rank,
            node=engine.node,
            headless=engine.headless,
            version=status.version if status else None,
            generation=status.generation if status else "unreachable",
            update_phase=status.update_phase if status else "",
            requests=status.requests_running + status.requests_waiting if status else 0,
            waiting_for_engine=status.waiting_for_engine if status else 0.0,
            error=status.error if status else error,
            weights=status.weights if status else "",
            loaded=status.loaded if status else "",
            unproven=status.unproven if status else "",
            sleep=status.sleep if status else "",
            free_memory=status.free_memory if status else None,
            adapters={name: one.version for name, one in status.adapters.items()} if status else {},
            drafter=engine.drafter,
            draft_version=status.draft_version if status else None,
        )


@dataclasses.dataclass(frozen=True)
class UpdateResult:
    """What an update took.

    Attributes:
        version: the version that every engine in ``engines`` serves now.
        engines: names of the engines that committed.
        lost: engines that were lost after the first commit, with the cause. They are out of the group.
        nbytes: bytes of the weights that were sent.
        kept: how many tensors were not sent, because every engine had them.
        total_ms: from the first request of the update to the last engine's resume.
        pause_ms: from the first request to pause to the last engine's resume, as the trainer sees it.
        commit_ms: the longest commit of an engine, within the pause.
        adapters: the LoRA adapters that the engines serve now, by name, with the version of the update that brought each.
        draft: ``sent`` if the update moved the engines' drafter too, ``kept`` if the drafter stays as it was; empty if they
            have none, or if the update brought no base weights.
    """

    version: Version
    engines: tuple[str, ...]
    lost: Mapping[str, str]
    nbytes: int
    kept: int
    total_ms: float
    pause_ms: float
    commit_ms: float
    adapters: Mapping[str, Version] = dataclasses.field(default_factory=dict)
    draft: Literal["sent", "kept", ""] = ""
