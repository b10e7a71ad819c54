"""vLLM's sleep mode on all engines at once: ``group.sleep``, ``group.wake_up``, and an update that comes meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .. import protocol
from ..control.command import Target
from ..errors import SleepFailed, UpdateAborted, join
from ..protocol import NO_SLEEP_MODE
from .options import LATE_SECONDS, PAUSE_LEASE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ..control.command import Commander
    from ..protocol import EngineRequest, PauseMode, SleepLevel, SleepTag

# For what is taken back, also after the deadline.
_GRACE_SECONDS = 2.0


async def sleep(commander: Commander, level: SleepLevel, mode: PauseMode, timeout: float) -> None:
    """Pause every engine that runs, then put all of them to sleep. See ``AsyncEngineGroup.sleep``."""
    ends = time.monotonic() + timeout
    async with commander.command("sleep", timeout) as targets:
        if unable := {name: NO_SLEEP_MODE for name, target in targets.items() if not target.engine.sleep_mode}:
            raise SleepFailed(f"nothing was done: {join(unable)}")
        if other := {name: _asleep(target) for name, target in targets.items() if _sleeps_otherwise(target, level)}:
            raise SleepFailed(f"nothing was done: {join(other)}: call group.wake_up() first")
        awake = {name: target for name, target in targets.items() if target.status.sleep == "awake"}
        await _pause(commander, awake, mode, ends)
        requests: dict[str, EngineRequest] = {
            name: protocol.Sleep(epoch=target.epoch, level=level, timeout=max(ends - time.monotonic(), 0.05))
            for name, target in targets.items()
        }
        back = awake if level == 1 else {}  # what level 2 discarded cannot be brought back
        try:
            failed = await commander.ask_all(targets, requests, ends + LATE_SECONDS)
        except asyncio.CancelledError:
            await _take_back(commander, back)
            raise
        if failed:
            await _take_back(commander, back)
            others = "are awake again" if level == 1 else "sleep; an update heals them"
            raise SleepFailed(f"not every engine fell asleep, and the others {others}: {join(failed)}")


async def _pause(commander: Commander, awake: Mapping[str, Target], mode: PauseMode, ends: float) -> None:
    # With a lease, so that an engine that never comes to sleep runs again if this client is lost. A user's own pause stands.
    pauses: dict[str, EngineRequest] = {
        name: protocol.Pause(
            epoch=target.epoch,
            mode=mode,
            kv="recompute",
            timeout=max(ends - time.monotonic(), 0.05),
            holder=commander.holder,
            lease=PAUSE_LEASE_SECONDS if _ran(target) else 0.0,
            to_sleep=_ran(target),
        )
        for name, target in awake.items()
    }
    try:
        failed = await commander.ask_all(awake, pauses, ends)
    except asyncio.CancelledError:
        await commander.ask_all(awake, _resumes(awake), time.monotonic() + _GRACE_SECONDS)
        raise
    if failed:
        await commander.ask_all(awake, _resumes(awake), time.monotonic() + _GRACE_SECONDS)
        raise SleepFailed(f"not every engine paused before its sleep, so none sleeps: {join(failed)}")


async def _take_back(commander: Commander, awake: Mapping[str, Target]) -> None:
    """Wake up the engines that were awake, and resume those that ran."""
    ends = time.monotonic() + _GRACE_SECONDS
    wakes: dict[str, EngineRequest] = {
        name: protocol.WakeUp(epoch=target.epoch, timeout=_GRACE_SECONDS) for name, target in awake.items()
    }
    failed = await commander.ask_all(awake, wakes, ends)
    still_asleep = {awake[name].engine.replica for name in failed}
    woken = {name: target for name, target in awake.items() if target.engine.replica not in still_asleep}
    await commander.ask_all(woken, _resumes(woken), ends)


async def wake_up(commander: Commander, tags: tuple[SleepTag, ...], timeout: float) -> None:
    """Wake up every engine, and resume those that ran before. See ``AsyncEngineGroup.wake_up``."""
    ends = time.monotonic() + timeout
    async with commander.command("wake_up", timeout) as targets:
        wakes: dict[str, EngineRequest] = {
            name: protocol.WakeUp(epoch=target.epoch, timeout=max(ends - time.monotonic(), 0.05), tags=tags)
            for name, target in targets.items()
        }
        if failed := await commander.ask_all(targets, wakes, ends + LATE_SECONDS):
            raise SleepFailed(f"not every engine woke up, and none was resumed: {join(failed)}: call again")
        if failed := await commander.ask_all(targets, _resumes(_awake_after(targets, tags)), ends + LATE_SECONDS):
            raise SleepFailed(f"every engine is awake, and not every one resumed: {join(failed)}: call again")


async def wake_weights(commander: Commander, targets: Mapping[str, Target], ends: float) -> None:
    """Wake the weights of engines that sleep, so that an update can come; their KV cache sleeps on.

    Raises:
        UpdateAborted: weights of an engine did not wake up, for example because the trainer has their memory.
    """
    asleep = {name: target for name, target in targets.items() if target.status.sleep in ("asleep_1", "asleep_2")}
    wakes: dict[str, EngineRequest] = {
        name: protocol.WakeUp(epoch=target.epoch, timeout=max(ends - time.monotonic(), 0.05), tags=("weights",))
        for name, target in asleep.items()
    }
    if failed := await commander.ask_all(asleep, wakes, ends):
        raise UpdateAborted(
            f"the engines sleep, and not all of their weights woke up for the update, so none was sent: {join(failed)}: free "
            "the memory that the weights need on their device, and send the update again"
        )


def _awake_after(targets: Mapping[str, Target], tags: Collection[SleepTag]) -> dict[str, Target]:
    """Return the targets that are wholly awake once they have woken up ``tags``."""
    wake_all = not tags or {"weights", "kv_cache"} <= set(tags)
    return {
        name: target
        for name, target in targets.items()
        if wake_all or target.status.sleep == "awake" or (target.status.sleep == "weights_only" and "kv_cache" in tags)
    }


def _resumes(targets: Mapping[str, Target]) -> dict[str, EngineRequest]:
    """Resume the engines that ran before, in replicas whose engines all have the group's weights.

    The ranks of an MoE replica resume together, so a replica with an engine that must not run waits for an update.
    """
    unfit = {target.engine.replica for target in targets.values() if not _fit(target)}
    return {
        name: protocol.Resume(epoch=target.epoch)
        for name, target in targets.items()
        if _ran(target) and target.engine.replica not in unfit
    }


def _ran(target: Target) -> bool:
    """Return whether the engine ran before its sleep, or would run now."""
    return target.status.runs_when_awake or target.resumes


def _fit(target: Target) -> bool:
    return not target.behind and target.status.update_phase not in ("tainted", "stale")


def _sleeps_otherwise(target: Target, level: SleepLevel) -> bool:
    return target.status.sleep in ("asleep_1", "asleep_2") and target.status.sleep != f"asleep_{level}"


def _asleep(target: Target) -> str:
    return f"it sleeps at level {target.status.sleep.removeprefix('asleep_')}"
