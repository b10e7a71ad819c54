"""Sleep and wake up: on all engines at once, in the order of colocated trainers, and never past an update."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_infos import engine_info
from waiting import eventually

from areal_vllm_ext import EngineGroup, PauseFailed, RequestError, SleepFailed, UpdateAborted
from areal_vllm_ext.cli import main
from areal_vllm_ext.engine_core import elsewhere
from areal_vllm_ext.engine_core.effects import CallPause, CallResume, CallSleep, CallWakeUp, Effect, Reply
from areal_vllm_ext.engine_core.participant import Participant, ParticipantRequest
from areal_vllm_ext.engine_core.status import status_of
from areal_vllm_ext.protocol import (
    Ack,
    Answer,
    Begin,
    Disk,
    Error,
    Pause,
    Resume,
    Sender,
    Sleep,
    Status,
    WakeUp,
    security,
)
from areal_vllm_ext.protocol.server import ReplyTo
from harness.simulated_engine import NEVER, Deployment, Shape, deployed


@pytest.fixture
def deployment(key: security.ClusterKey) -> Iterator[Deployment]:
    with deployed(key, 2) as engines:
        engines.wait_attached()
        yield engines


def seen(group: EngineGroup) -> set[tuple[str, str, str]]:
    return {(state.sleep, state.generation, state.update_phase) for state in group.status()}


def calls(deployment: Deployment) -> list[list[str]]:
    return [engine.calls for engine in deployment.engines.values()]


def test_all_engines_sleep_and_wake_up_and_run_again(deployment: Deployment, group: EngineGroup) -> None:
    group.sleep()
    assert seen(group) == {("asleep_1", "paused", "idle")}
    assert {state.free_memory for state in group.status()} == {100}
    group.sleep()
    assert calls(deployment) == [["pause keep clear", "sleep 1"]] * 2, "a repetition does nothing"
    group.wake_up()
    assert seen(group) == {("awake", "running", "idle")}
    assert {state.free_memory for state in group.status()} == {20}
    group.wake_up()
    assert calls(deployment) == [["pause keep clear", "sleep 1", "wake up weights kv_cache", "resume"]] * 2


def test_the_command_line_shows_who_sleeps_and_wakes_them(
    group: EngineGroup, deployment: Deployment, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--connect", deployment.directory, "--key-file", os.fspath(key_file)]
    assert main(["status", *where]) == 0
    assert "sleep" not in capsys.readouterr().out
    group.sleep()
    assert main(["status", *where]) == 0
    assert capsys.readouterr().out.count("asleep 1") == 2
    assert main(["wake-up", *where]) == 0
    assert seen(group) == {("awake", "running", "idle")}


def test_who_was_paused_before_stays_paused(group: EngineGroup) -> None:
    group.pause(lease=None)
    group.sleep()
    group.wake_up()
    assert seen(group) == {("awake", "paused", "idle")}
    group.resume()
    assert seen(group) == {("awake", "running", "idle")}


def test_a_pause_while_asleep_outlasts_the_sleep(group: EngineGroup) -> None:
    group.sleep()
    group.pause()
    group.wake_up()
    assert seen(group) == {("awake", "paused", "idle")}


def test_the_order_of_colocated_trainers(deployment: Deployment, group: EngineGroup) -> None:
    group.sleep(1)
    with pytest.raises(SleepFailed, match="wake the weights up before the KV cache"):
        group.wake_up(["kv_cache"])
    with pytest.raises(PauseFailed, match=r"not awake \(asleep_1\): call group.wake_up\(\) first"):
        group.resume()
    with pytest.raises(RequestError, match="sleeps"):
        group.verify()
    group.wake_up(["weights"])
    assert seen(group) == {("weights_only", "paused", "idle")}
    group.update_weights("/nowhere", version=1, timeout=10)
    assert seen(group) == {("weights_only", "paused", "idle")}, "the update does not resume"
    assert {engine.commits[-1] for engine in deployment.engines.values()} == {(1, True)}
    group.wake_up(["kv_cache"])
    assert seen(group) == {("awake", "running", "idle")}
    assert {state.version for state in group.status()} == {1}


@pytest.mark.parametrize("level", [1, 2])
def test_an_update_of_engines_that_sleep_wakes_their_weights_only(
    deployment: Deployment, group: EngineGroup, level: Any
) -> None:
    """AReaL's order: pause, sleep, update, and wake up when the trainer has given its memory back."""
    group.sleep(level)
    group.update_weights("/nowhere", version=1, timeout=10)
    assert seen(group) == {("weights_only", "paused", "idle")}, "the KV cache sleeps, and the update does not resume"
    made = list(calls(deployment)[0])
    assert made[-3:] == ["wake up weights", "pause keep clear", "commit 1"]
    group.wake_up()
    assert calls(deployment)[0][len(made) :] == ["wake up kv_cache", "resume"], "old weights are not brought back"
    assert seen(group) == {("awake", "running", "idle")}
    assert {state.version for state in group.status()} == {1}


def test_weights_that_do_not_wake_up_end_the_update_before_it_begins(
    deployment: Deployment, group: EngineGroup
) -> None:
    group.sleep(1)
    deployment.engines[1].errors["wake"] = "CUDA out of memory"
    with pytest.raises(
        UpdateAborted, match=r"rank 1 of .*: CUDA out of memory: free the memory .* send the update again"
    ):
        group.update_weights("/nowhere", version=1, timeout=10)
    assert {state.version for state in group.status()} == {0}
    assert not any("commit" in call for engine in calls(deployment) for call in engine)
    deployment.engines[1].errors.clear()
    group.update_weights("/nowhere", version=2, timeout=10)
    group.wake_up()
    assert seen(group) == {("awake", "running", "idle")}


def test_discarded_weights_are_not_served_before_an_update(deployment: Deployment, group: EngineGroup) -> None:
    group.sleep(2)
    assert seen(group) == {("asleep_2", "paused", "tainted")}
    group.wake_up()
    assert seen(group) == {("awake", "paused", "tainted")}
    with pytest.raises(PauseFailed, match="level 2 discarded them"):
        group.resume()
    assert not any(engine.running for engine in deployment.engines.values())
    group.update_weights("/nowhere", version=2, timeout=10)
    assert seen(group) == {("awake", "running", "idle")}, "as before its sleep"


def test_level_2_in_its_right_order(deployment: Deployment, group: EngineGroup) -> None:
    group.sleep(2)
    group.wake_up(["weights"])
    group.update_weights("/nowhere", version=2, timeout=10)
    group.wake_up()
    assert seen(group) == {("awake", "running", "idle")}
    assert not any(engine.discarded for engine in deployment.engines.values())


@pytest.mark.parametrize("level", [0, 1, 2])
def test_one_call_wakes_up_with_new_weights(deployment: Deployment, group: EngineGroup, level: Any) -> None:
    """Also engines that do not sleep."""
    if level:
        group.sleep(level)
    assert group.wake_up_with("/nowhere", version=7, timeout=10).version == 7
    assert seen(group) == {("awake", "running", "idle")}
    assert {state.version for state in group.status()} == {7}
    if level:
        made = calls(deployment)[0]
        assert made.index("wake up weights") < made.index("commit 7") < made.index("wake up kv_cache")


def test_one_call_that_fails_goes_on_when_it_is_made_again(deployment: Deployment, group: EngineGroup) -> None:
    group.sleep(2)
    deployment.engines[1].errors["prepare"] = "no"
    with pytest.raises(UpdateAborted):
        group.wake_up_with("/nowhere", version=7, timeout=10)
    assert seen(group) == {("weights_only", "paused", "tainted")}
    deployment.engines[1].errors.clear()
    group.wake_up_with("/nowhere", version=8, timeout=10)
    assert seen(group) == {("awake", "running", "idle")}


def test_another_level_needs_to_wake_up_first(deployment: Deployment, group: EngineGroup) -> None:
    group.sleep(1)
    with pytest.raises(SleepFailed, match=r"nothing was done: .*sleeps at level 1: call group.wake_up\(\) first"):
        group.sleep(2)
    group.wake_up(["weights"])
    group.sleep(2)
    group.wake_up(["weights"])
    group.update_weights("/nowhere", version=3, timeout=10)
    group.wake_up()
    assert seen(group) == {("awake", "running", "idle")}
    assert all(made[-1] == "resume" for made in calls(deployment))


def test_an_engine_without_sleep_mode_is_named_before_anything_is_done(
    key: security.ClusterKey, key_file: Path
) -> None:
    with (
        deployed(key, 1, shape=Shape(sleep_mode=False)) as engines,
        EngineGroup.connect(engines.directory, key_file=key_file) as client,
    ):
        client.wait_ready(1, 20)
        with pytest.raises(SleepFailed, match=r"nothing was done: DP rank 0 .*: start it with --enable-sleep-mode"):
            client.sleep()
        assert engines.engines[0].calls == []
        client.wake_up()


def test_an_engine_that_cannot_sleep_wakes_the_others(deployment: Deployment, group: EngineGroup) -> None:
    deployment.engines[1].errors["sleep"] = "no host memory"
    with pytest.raises(SleepFailed, match=r"the others are awake again: DP rank 1 .*: no host memory"):
        group.sleep()
    assert seen(group) == {("awake", "running", "idle")}


def test_an_engine_that_does_not_pause_keeps_all_awake(deployment: Deployment, group: EngineGroup) -> None:
    deployment.engines[1].seconds["pause"] = NEVER
    with pytest.raises(SleepFailed, match="none sleeps: DP rank 1"):
        group.sleep(timeout=0.5)
    eventually(lambda: seen(group) == {("awake", "running", "idle")})


def test_an_engine_that_wakes_up_late_is_named_and_none_runs_before_it(
    deployment: Deployment, group: EngineGroup
) -> None:
    group.sleep()
    deployment.engines[1].seconds["wake"] = 1.0
    started = time.monotonic()
    with pytest.raises(
        SleepFailed, match=r"none was resumed: DP rank 1 .* did not wake up in time; it may do so later"
    ):
        group.wake_up(timeout=0.4)
    assert time.monotonic() - started < 1.0
    assert not any(engine.running for engine in deployment.engines.values())
    group.wake_up(timeout=10)
    assert seen(group) == {("awake", "running", "idle")}


@pytest.mark.parametrize("arguments", [{"level": 3}, {"level": 0}, {"mode": "now"}])
def test_wrong_arguments_are_named(group: EngineGroup, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        group.sleep(**arguments)
    with pytest.raises(ValueError, match="tags must be one of 'weights', 'kv_cache'"):
        group.wake_up(["kvcache"])  # type: ignore[list-item]


def test_engines_sleep_on_when_their_client_is_killed(
    deployment: Deployment, group: EngineGroup, key_file: Path
) -> None:
    """And run again once another client has woken them up."""
    program = (
        "import sys, time\n"
        "from areal_vllm_ext import EngineGroup\n"
        "from areal_vllm_ext.client import sleeping\n"
        "sleeping.PAUSE_LEASE_SECONDS = 0.5\n"
        "group = EngineGroup.connect(sys.argv[1], key_file=sys.argv[2])\n"
        "group.sleep()\n"
        "print('asleep', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, deployment.directory, os.fspath(key_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        assert client.stdout.readline() == "asleep\n"
        client.send_signal(signal.SIGKILL)
    time.sleep(1.5)
    assert seen(group) == {("asleep_1", "paused", "idle")}
    group.wake_up()
    assert seen(group) == {("awake", "running", "idle")}


# The machine without I/O


class Rig:
    """A participant that can be asked; ``calls`` are those of its loop."""

    def __init__(self) -> None:
        self.participant = Participant("v0", frozenset({0}))
        self.calls: list[Effect] = []
        self.answers: dict[int, Answer] = {}
        self._numbers = itertools.count()

    def ask(self, message: ParticipantRequest, now: float = 0.0) -> int:
        number = next(self._numbers)
        self.take(self.participant.handle(ReplyTo(b"p", number.to_bytes(16, "big")), message, now))
        return number

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Reply):
                self.answers[int.from_bytes(effect.caller.request_id, "big")] = effect.answer
            else:
                self.calls.append(effect)

    def kind(self, number: int) -> str:
        answer = self.answers.get(number)
        return answer.kind if isinstance(answer, Error) else type(answer).__name__

    def pause(self, epoch: int = 1, *, to_sleep: bool = True, lease: float = 0.0) -> None:
        self.ask(Pause(epoch=epoch, mode="keep", kv="recompute", timeout=9.0, lease=lease, to_sleep=to_sleep))
        call = self.calls.pop()
        assert isinstance(call, CallPause)
        self.take(self.participant.pauses.pause_done(call.call, ""))

    def done(self, error: str = "", *, touched: bool = True) -> None:
        call = self.calls.pop()
        assert isinstance(call, CallSleep | CallWakeUp)
        self.take(self.participant.sleep_done(call.call, error, 7, touched=touched))

    @property
    def status(self) -> Status:
        return status_of(self.participant, engine_info())


def sleep(level: Any = 1, epoch: int = 1) -> Sleep:
    return Sleep(epoch=epoch, level=level, timeout=5.0)


def wake(*tags: Any, epoch: int = 1) -> WakeUp:
    return WakeUp(epoch=epoch, tags=tags, timeout=5.0)


def begin() -> Begin:
    return Begin(epoch=1, update="u", version="v1", senders={0: Sender(transfer=Disk(path="/"))}, timeout=60.0)


def asleep(level: int = 1) -> Rig:
    rig = Rig()
    rig.pause()
    rig.ask(sleep(level))
    rig.done()
    return rig


def test_an_engine_that_runs_or_is_in_an_update_does_not_sleep() -> None:
    rig = Rig()
    assert rig.kind(rig.ask(sleep())) == "state"
    rig.pause()
    rig.ask(begin())
    assert rig.kind(rig.ask(sleep())) == "busy"
    assert not any(isinstance(call, CallSleep) for call in rig.calls)


def test_a_repeated_sleep_or_wake_up_is_done_once() -> None:
    rig = Rig()
    rig.pause()
    first, second = rig.ask(sleep()), rig.ask(sleep())
    assert rig.kind(rig.ask(sleep(2))) == "busy"
    assert rig.kind(rig.ask(wake())) == "busy"
    assert rig.kind(rig.ask(begin())) == rig.kind(rig.ask(Resume(epoch=1))) == "state"
    assert len(rig.calls) == 1
    rig.done()
    assert rig.answers[first] == rig.answers[second] == Ack()
    assert rig.kind(rig.ask(sleep())) == "Ack"
    assert rig.kind(rig.ask(sleep(2))) == "state"
    first, second = rig.ask(wake()), rig.ask(wake())
    assert len(rig.calls) == 1
    rig.done()
    assert rig.answers[first] == rig.answers[second] == Ack()
    assert rig.kind(rig.ask(wake())) == "Ack"
    assert (rig.status.sleep, rig.status.free_memory) == ("awake", 7)


def test_the_outcome_of_another_call_ends_no_sleep() -> None:
    rig = Rig()
    rig.pause()
    asked = rig.ask(sleep())
    rig.take(rig.participant.sleep_done(99, "", 7))
    assert asked not in rig.answers
    rig.done()
    assert rig.status.sleep == "asleep_1"


def test_the_weights_wake_up_before_the_kv_cache() -> None:
    rig = asleep()
    assert rig.kind(rig.ask(wake("kv_cache"))) == "state"
    assert rig.calls == []
    rig.ask(wake("weights"))
    rig.done()
    rig.ask(wake("kv_cache"))
    rig.done()
    assert rig.status.sleep == "awake"


def test_a_late_command_of_an_earlier_client_does_nothing() -> None:
    rig = asleep()
    rig.ask(wake(epoch=3))
    rig.done()
    for late in (sleep(epoch=2), wake(epoch=2)):
        assert rig.kind(rig.ask(late)) == "fenced"
    assert rig.calls == []


def test_a_call_that_the_loop_came_to_too_late_changes_nothing() -> None:
    rig = Rig()
    rig.pause()
    asked = rig.ask(sleep(2))
    rig.take(rig.participant.tick(5.0))
    assert rig.kind(asked) == "timeout"
    rig.done("its time was over", touched=False)
    assert (rig.status.sleep, rig.status.update_phase) == ("awake", "idle")


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleep_that_failed_half_way_counts_as_asleep(level: int) -> None:
    rig = Rig()
    rig.pause()
    asked = rig.ask(sleep(level))
    rig.done("a worker ran out of memory")
    assert rig.kind(asked) == "failed"
    assert rig.status.sleep == f"asleep_{level}"
    assert (rig.status.update_phase == "tainted") == (level == 2)
    refusal = rig.answers[rig.ask(sleep(level))]
    assert isinstance(refusal, Error), "a worker may hold its memory still"
    assert refusal.message == (
        "not every worker of this engine fell asleep (a worker ran out of memory): wake it up before it sleeps again"
    )
    failed = rig.ask(wake())
    rig.done("again")
    assert rig.kind(failed) == "failed"
    assert rig.status.sleep == f"asleep_{level}"
    rig.ask(wake())
    rig.done()
    assert rig.status.sleep == "awake"
    rig.ask(sleep(level))
    rig.done()
    assert rig.kind(rig.ask(sleep(level))) == "Ack"


def test_a_sleep_that_failed_half_way_is_over_when_another_user_woke_the_engine_up() -> None:
    rig = Rig()
    rig.pause()
    rig.ask(sleep())
    rig.done("a worker ran out of memory")
    rig.take(elsewhere.woke(rig.participant, []))
    rig.take(elsewhere.slept(rig.participant, ["weights", "kv_cache"], 1, ran=False))
    assert rig.kind(rig.ask(sleep())) == "Ack"


def test_an_engine_that_sleeps_is_not_recovered() -> None:
    rig = Rig()
    rig.pause(lease=30.0)
    rig.ask(sleep())
    rig.done()
    rig.take(rig.participant.tick(31.0))
    assert not rig.participant.needs_recovery
    assert not rig.status.orphaned
    rig.ask(wake("weights"))
    rig.done()
    rig.take(rig.participant.tick(32.0))
    assert not rig.participant.needs_recovery
    rig.ask(wake())
    rig.done()
    rig.take(rig.participant.tick(33.0))
    assert rig.participant.needs_recovery, "its client was lost before it could resume"
    assert rig.status.runs_when_awake


def test_whoever_resumes_ends_the_memory_of_having_run() -> None:
    rig = asleep()
    rig.ask(wake())
    rig.done()
    rig.ask(Resume(epoch=1))
    call = rig.calls.pop()
    assert isinstance(call, CallResume)
    rig.take(rig.participant.pauses.resume_done(call.call, ""))
    assert not rig.status.runs_when_awake
    rig.pause(to_sleep=False)
    rig.ask(sleep())
    rig.done()
    assert not rig.status.runs_when_awake
