"""Engine groups over the real wire: discovery, pause and resume, updates, clients that meet, and deadlines that hold."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq
from groups import OVERRUN, seconds, states, take_lease, update, versions
from waiting import eventually, in_thread

from areal_vllm_ext import (
    ArealError,
    AsyncEngineGroup,
    EngineGroup,
    EnginesMissing,
    EngineUnreachable,
    InvalidWeights,
    PauseFailed,
    UpdateAborted,
)
from areal_vllm_ext.errors import RequestError
from areal_vllm_ext.protocol import (
    Ack,
    Begin,
    Commit,
    Disk,
    Fence,
    Pause,
    Prepare,
    Sender,
    security,
)
from areal_vllm_ext.protocol.server import tune_client
from harness import simulated_engine
from harness.simulated_engine import HOST, NEVER, Deployment, Shape, deployed

if TYPE_CHECKING:
    from raw_client import RawClient

# Discovery


def test_connecting_before_anything_is_up_works(key: security.ClusterKey, key_file: Path, free_port: int) -> None:
    with EngineGroup.connect(f"tcp://{HOST}:{free_port}", key_file=key_file) as group:
        waiting, found = in_thread(lambda: group.wait_ready(2, timeout=20))
        time.sleep(0.3)
        assert not found
        with deployed(key, 2, directory_port=free_port):
            waiting.join(20)
            assert [engine.dp_rank for engine in found[0]] == [0, 1]  # type: ignore[attr-defined]


def test_where_nothing_listens_it_is_said_and_in_time(key_file: Path, free_port: int) -> None:
    with EngineGroup.connect(f"tcp://{HOST}:{free_port}", key_file=key_file) as group:
        started = time.monotonic()
        with pytest.raises(EnginesMissing, match="nothing listens there; is the head node's engine up"):
            group.wait_ready(2, timeout=1.0)
        with pytest.raises(EngineUnreachable, match=f"{HOST}:{free_port} did not answer within 0.5 s"):
            group.engines(timeout=0.5)
        with pytest.raises(EngineUnreachable, match=f"the directory .*{free_port} .*is the head node's engine up"):
            group.pause(timeout=0.5)
        assert time.monotonic() - started < 2.0 + OVERRUN


def test_ranks_that_are_missing_are_named_with_the_way_out(key: security.ClusterKey, key_file: Path) -> None:
    with (
        deployed(key, shape=Shape(dp_size=4), ranks=[0, 2]) as some,
        EngineGroup.connect(some.directory, key_file=key_file) as group,
    ):
        some.wait_attached()
        eventually(lambda: len(group.engines()) == 2)
        with pytest.raises(EnginesMissing) as missing:
            group.wait_ready(timeout=0.5)
        message = str(missing.value)
        assert "DP rank 1 of replica simulated never registered" in message
        assert "DP rank 3 of replica simulated never registered" in message
        assert "registered: 0 on node0, 2 on node2" in message
        assert "--worker-extension-cls" in message
        with pytest.raises(EnginesMissing, match="DP rank 1"):
            group.pause(timeout=1.0)


def test_too_few_replicas_are_counted(group: EngineGroup) -> None:
    with pytest.raises(EnginesMissing, match="2 of 5 engines registered: DP rank 0 of replica simulated"):
        group.wait_ready(5, timeout=0.5)


def test_one_group_spans_the_replicas_that_share_a_directory(
    deployment: Deployment, key: security.ClusterKey, key_file: Path
) -> None:
    with (
        deployed(key, 1, shape=Shape(replica="shared"), directory=deployment.directory),
        deployed(key, 1, shape=Shape(replica="another"), directory=deployment.directory),
        EngineGroup.connect(deployment.directory, key_file=key_file) as group,
    ):
        found = group.wait_ready(4, timeout=10)
        assert sorted({engine.replica for engine in found}) == ["another", "shared", "simulated"]
        group.pause(timeout=5)
        assert states(group) == ["paused"] * 4
        group.resume(timeout=5)
        assert states(group) == ["running"] * 4


def test_status_shows_an_engine_that_does_not_answer_and_one_that_is_lost(
    deployment: Deployment, group: EngineGroup
) -> None:
    gone = deployment.engines[1].name
    deployment.stop_engine(1)
    alive, unreachable = group.status(timeout=0.7)
    assert (alive.generation, unreachable.generation, unreachable.name) == ("running", "unreachable", gone)
    assert "did not answer within 0.7 s" in unreachable.error
    deployment.clock_skew += 6.0
    eventually(lambda: len(group.engines()) == 1)  # the other has beaten since
    alive, lost = group.status()
    assert (alive.generation, lost.generation, lost.name) == ("running", "unreachable", gone)
    assert "no heartbeat for" in lost.error
    with pytest.raises(EnginesMissing, match=r"DP rank 1 .*no heartbeat for"):
        group.pause(timeout=1.0)


def test_a_lost_engine_stays_named_until_it_is_forgotten(
    deployment: Deployment, group: EngineGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    deployment.stop_engine(1)
    deployment.clock_skew += 3600.0
    eventually(lambda: len(group.engines()) == 1)
    assert [state.generation for state in group.status()] == ["running", "unreachable"]
    with pytest.raises(EnginesMissing, match=r"DP rank 1 .* is lost: .*areal-vllm forget REPLICA DP_RANK"):
        group.pause(timeout=1.0)
    with pytest.raises(RequestError, match=r"DP rank 0 of replica simulated .* is alive: stop it"):
        group.forget("simulated", 0)
    with pytest.raises(RequestError, match="knows no replica nonsense"):
        group.forget("nonsense")
    group.forget("simulated", 1)
    assert states(group) == ["running"]
    update(group, 3, timeout=10)
    deployment.start_engine(1)
    eventually(lambda: len(group.engines()) == 2, timeout=8)
    assert [state.update_phase for state in group.status()] == ["idle", "stale"], "it missed an update"
    update(group, 4, timeout=10)
    assert states(group) == ["running", "running"]


def test_a_command_waits_for_the_next_beat_of_engines_that_seem_lost(
    deployment: Deployment, group: EngineGroup
) -> None:
    deployment.clock_skew += 6.0  # as if all had slept until now
    group.pause(timeout=5)
    assert states(group) == ["paused", "paused"]


def test_status_tells_what_engines_say(deployment: Deployment, group: EngineGroup) -> None:
    deployment.engines[1].requests = 7
    group.pause("wait", timeout=5)
    first, second = group.status()
    assert (first.dp_rank, first.headless, first.generation, first.version, first.update_phase) == (
        0,
        False,
        "paused",
        0,
        "idle",
    )
    assert (second.dp_rank, second.headless, second.requests, second.node) == (1, True, 7, "node1")


def test_an_engine_that_comes_back_is_used_again(deployment: Deployment, group: EngineGroup) -> None:
    deployment.stop_engine(1)
    deployment.start_engine(1)
    eventually(lambda: [e.incarnation for e in group.engines()][1] == deployment.engines[1].endpoint.info.incarnation)
    group.pause(timeout=5)
    assert deployment.engines[1].calls == ["pause keep"]
    group.resume(timeout=5)


# Pause and resume


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pause_and_resume_reach_every_engine_once(deployment: Deployment, group: EngineGroup, mode: str) -> None:
    for _ in range(2):
        group.pause(mode, timeout=5)  # type: ignore[arg-type]
        assert states(group) == ["paused", "paused"]
        assert not any(engine.running for engine in deployment.engines.values())
    for _ in range(2):
        group.resume(timeout=5)
        assert states(group) == ["running", "running"]
    for engine in deployment.engines.values():
        assert engine.calls == [f"pause {mode}", "resume"]


def test_engines_are_asked_all_at_once(deployment: Deployment, group: EngineGroup) -> None:
    for engine in deployment.engines.values():
        engine.seconds["pause"] = 0.5
    assert seconds(lambda: group.pause(timeout=5)) < 0.95


def test_an_engine_that_does_not_pause_is_named_and_the_others_run_again(
    deployment: Deployment, group: EngineGroup
) -> None:
    stuck = deployment.engines[1]
    stuck.seconds["pause"] = NEVER
    started = time.monotonic()
    with pytest.raises(PauseFailed) as failed:
        group.pause(timeout=1.0)
    assert 1.0 <= time.monotonic() - started < 1.0 + OVERRUN
    assert stuck.name in str(failed.value)
    assert deployment.engines[0].name not in str(failed.value)
    eventually(lambda: states(group) == ["running", "running"])


def test_a_pause_that_fails_at_once_says_why(deployment: Deployment, group: EngineGroup) -> None:
    deployment.engines[0].errors["pause"] = "the scheduler is broken"
    with pytest.raises(PauseFailed, match="the scheduler is broken"):
        group.pause(timeout=5)
    eventually(lambda: states(group) == ["running", "running"])


def test_an_engine_that_does_not_resume_is_named(deployment: Deployment, group: EngineGroup) -> None:
    group.pause(timeout=5)
    deployment.engines[1].seconds["resume"] = NEVER
    started = time.monotonic()
    with pytest.raises(PauseFailed, match="not every engine resumed: DP rank 1"):
        group.resume(timeout=1.0)
    assert time.monotonic() - started < 1.0 + OVERRUN
    assert states(group) == ["running", "resuming"]


def test_a_pause_that_completes_just_when_it_is_taken_back_does_not_leave_the_engine_paused(
    deployment: Deployment, group: EngineGroup
) -> None:
    slow = deployment.engines[1]
    slow.seconds["pause"] = 1.1
    slow.seconds["cancel"] = 0.3  # by then the pause has completed
    with pytest.raises(PauseFailed):
        group.pause(timeout=1.0)
    eventually(lambda: states(group) == ["running", "running"])
    assert slow.running


# Clients that meet


def test_two_clients_that_pause_and_resume_at_the_same_time_do_not_disturb_each_other(
    deployment: Deployment, key_file: Path
) -> None:
    for engine in deployment.engines.values():
        engine.seconds["pause"] = engine.seconds["resume"] = 0.02

    def work() -> None:
        with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
            client.wait_ready(2, timeout=10)
            for _ in range(4):
                client.pause(timeout=10)
                client.resume(timeout=10)

    threads = [in_thread(work) for _ in range(2)]
    for thread, _ in threads:
        thread.join(30)
    assert [outcome for _, outcome in threads] == [[None], [None]]
    assert all(engine.running for engine in deployment.engines.values())


def test_calls_of_one_group_from_several_threads_run_one_after_the_other(
    deployment: Deployment, group: EngineGroup
) -> None:
    for engine in deployment.engines.values():
        engine.seconds["pause"] = 0.1
    threads = [in_thread(lambda: group.pause(timeout=5)), in_thread(lambda: group.resume(timeout=5))]
    for thread, outcome in threads:
        thread.join(10)
        assert outcome == [None]


def test_a_client_that_died_with_the_lease_holds_the_next_up_until_it_expires(
    deployment: Deployment, group: EngineGroup, raw: Callable[..., RawClient]
) -> None:
    take_lease(raw(deployment.directory), "dead", 1.0)
    assert 0.7 < seconds(lambda: group.pause(timeout=5.0)) < 2.0
    assert states(group) == ["paused", "paused"]


def test_a_lease_that_another_keeps_is_an_error_that_names_the_holder(
    deployment: Deployment, group: EngineGroup, raw: Callable[..., RawClient]
) -> None:
    take_lease(raw(deployment.directory), "trainer on node7", 60.0)
    started = time.monotonic()
    with pytest.raises(RequestError, match="trainer on node7 commands these engines") as held:
        group.pause(timeout=1.0)
    assert held.value.kind == "held"
    assert time.monotonic() - started < 1.0 + OVERRUN
    assert states(group) == ["running", "running"], "status needs no lease"


def test_a_lease_is_renewed_for_as_long_as_a_call_takes(
    deployment: Deployment, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_vllm_ext.control.command._LEASE_SECONDS", 0.8)
    deployment.engines[0].seconds["pause"] = 2.0
    with (
        EngineGroup.connect(deployment.directory, key_file=key_file) as slow,
        EngineGroup.connect(deployment.directory, key_file=key_file) as other,
    ):
        slow.wait_ready(2, timeout=10)
        pausing, paused = in_thread(lambda: slow.pause(timeout=10))
        eventually(lambda: deployment.engines[0].calls)
        with pytest.raises(RequestError, match="commands these engines"):
            other.resume(timeout=1.2)
        pausing.join(10)
        assert paused == [None]


def test_a_lease_is_given_back_at_once(deployment: Deployment, group: EngineGroup, key_file: Path) -> None:
    group.pause(timeout=5)
    with EngineGroup.connect(deployment.directory, key_file=key_file) as next_one:
        assert seconds(lambda: next_one.resume(timeout=5)) < 1.0


def test_a_successor_aborts_what_a_dead_trainer_left_behind_and_resumes(
    deployment: Deployment, group: EngineGroup, raw: Callable[..., RawClient]
) -> None:
    epoch = take_lease(raw(deployment.directory), "dead", 0.2)

    for engine in deployment.engines.values():
        trainer = raw(engine.endpoint.address)
        for request in (
            Begin(
                epoch=epoch, update="left", version="never", senders={0: Sender(transfer=Disk(path="/"))}, timeout=60.0
            ),
            Prepare(epoch=epoch, update="left", buckets={0: 0}),
            Pause(epoch=epoch, mode="keep", kv="recompute", timeout=60.0, update="left"),
        ):
            assert isinstance(trainer.ask(request), Ack)
    assert states(group) == ["paused", "paused"]
    update(group, 7, timeout=10)
    assert versions(deployment) == [7, 7]
    assert states(group) == ["running", "running"]


def test_a_successor_finishes_what_a_dead_trainer_committed_on_one_engine(
    deployment: Deployment, group: EngineGroup, raw: Callable[..., RawClient]
) -> None:

    epoch = take_lease(raw(deployment.directory), "dead", 0.2)
    trainers = [raw(engine.endpoint.address) for engine in deployment.engines.values()]
    for trainer in trainers:
        for request in (
            Begin(
                epoch=epoch, update="left", version="half", senders={0: Sender(transfer=Disk(path="/"))}, timeout=60.0
            ),
            Prepare(epoch=epoch, update="left", buckets={0: 0}),
            Pause(epoch=epoch, mode="keep", kv="recompute", timeout=60.0, update="left"),
        ):
            assert isinstance(trainer.ask(request), Ack)
    assert isinstance(trainers[0].ask(Commit(epoch=epoch, update="left")), Ack)
    group.resume(timeout=10)
    assert versions(deployment) == ["half", "half"]
    assert states(group) == ["running", "running"]
    refused = trainers[1].ask(Fence(epoch=epoch))
    assert getattr(refused, "kind", "") == "fenced", "should it wake up"


# Updates


def test_an_update_moves_every_engine_and_says_what_it_took(deployment: Deployment, group: EngineGroup) -> None:
    with group.update("v1", timeout=10) as opened:
        opened.send("/nowhere")
        assert versions(deployment) == [0, 0], "nothing switches before the block is left"
        assert all(engine.running for engine in deployment.engines.values()), "they generate meanwhile"
    assert versions(deployment) == ["v1", "v1"]
    for engine in deployment.engines.values():
        assert engine.commits == [("v1", True)]
        assert engine.calls == ["pause keep clear", "commit v1", "resume"]
        assert [type(order) for order in engine.orders] == [Begin, Prepare]
    assert states(group) == ["running", "running"]
    result = opened.result
    assert (result.version, result.lost) == ("v1", {})
    assert sorted(result.engines) == sorted(engine.name for engine in deployment.engines.values())
    assert result.total_ms >= result.pause_ms >= 0


def test_versions_may_be_any_and_may_go_back(deployment: Deployment, group: EngineGroup) -> None:
    for version in (3, "three", 2):
        update(group, version, timeout=10)
        assert [state.version for state in group.status()] == [version, version]
        assert versions(deployment) == [version, version]


def test_engines_that_were_paused_stay_paused(deployment: Deployment, group: EngineGroup) -> None:
    group.pause(timeout=5)
    update(group, 1, timeout=10)
    assert states(group) == ["paused", "paused"]
    assert versions(deployment) == [1, 1]
    group.resume(timeout=5)


@pytest.mark.parametrize("step", ["begin", "prepare"])
@pytest.mark.parametrize("failing", [[1], [0, 1]], ids=["one", "all"])
def test_a_worker_that_fails_aborts_the_update_everywhere(
    deployment: Deployment, group: EngineGroup, step: str, failing: list[int]
) -> None:
    for rank in failing:
        deployment.engines[rank].errors[step] = "out of memory"
    with pytest.raises(UpdateAborted, match="out of memory"):
        update(group, 1, timeout=10)
    assert versions(deployment) == [0, 0]
    assert [state.update_phase for state in group.status()] == ["idle", "idle"]
    for engine in deployment.engines.values():
        assert engine.calls == [], "generation was never touched"
        engine.errors.clear()
    update(group, 2, timeout=10)
    assert versions(deployment) == [2, 2]


@pytest.mark.parametrize("step", ["begin", "prepare", "pause"])
def test_an_engine_that_goes_silent_aborts_the_update_in_time(
    deployment: Deployment, group: EngineGroup, step: str
) -> None:
    deployment.engines[1].seconds[step] = NEVER
    started = time.monotonic()
    with pytest.raises(UpdateAborted):
        update(group, 1, timeout=1.0)
    assert time.monotonic() - started < 1.0 + OVERRUN
    deployment.engines[1].seconds.clear()
    eventually(lambda: states(group) == ["running", "running"])
    assert versions(deployment) == [0, 0]
    update(group, 2, timeout=10)
    assert versions(deployment) == [2, 2]


def test_a_commit_that_fails_is_reported_and_its_engine_stays_out_until_the_next_update(
    deployment: Deployment, group: EngineGroup
) -> None:
    broken = deployment.engines[1]
    broken.errors["commit"] = "a weight did not fit"
    with group.update(1, timeout=10) as opened:
        opened.send("/nowhere")
    assert list(opened.result.lost) == [broken.name]
    assert "a weight did not fit" in opened.result.lost[broken.name]
    assert opened.result.engines == (deployment.engines[0].name,)
    assert [state.update_phase for state in group.status()] == ["idle", "tainted"]
    assert not broken.running
    with pytest.raises(PauseFailed, match="tainted"):
        group.resume(timeout=2)
    broken.errors.clear()
    update(group, 2, timeout=10)
    assert versions(deployment) == [2, 2]


def test_an_error_in_the_block_aborts_the_update_and_is_not_hidden(deployment: Deployment, group: EngineGroup) -> None:
    opened = group.update(1, timeout=10)
    with pytest.raises(ZeroDivisionError), opened:  # noqa: PT012 - the block is what is tested
        opened.send("/nowhere")
        raise ZeroDivisionError
    assert versions(deployment) == [0, 0]
    assert [state.update_phase for state in group.status()] == ["idle", "idle"]
    assert all(engine.calls == [] for engine in deployment.engines.values())
    with pytest.raises(ArealError, match="no result"):
        _ = opened.result


def test_a_block_that_sends_nothing_is_an_error(deployment: Deployment, group: EngineGroup) -> None:
    with pytest.raises(InvalidWeights, match=r"call update\.send"), group.update(1, timeout=10):
        pass
    assert all(engine.orders == [] for engine in deployment.engines.values())


def test_an_update_sends_once(group: EngineGroup) -> None:
    with group.update(1, timeout=10) as opened:
        opened.send("/nowhere")
        with pytest.raises(ArealError, match="sends once"):
            opened.send("/nowhere")


def test_an_unknown_transport_is_refused_before_anything_is_asked(deployment: Deployment, group: EngineGroup) -> None:
    with pytest.raises(ValueError, match="transport must be"):
        group.update(1, transport="pigeon")
    assert all(engine.orders == [] for engine in deployment.engines.values())


# Engines that die

PROCESS = Path(simulated_engine.__file__)


@contextlib.contextmanager
def another_process(key_file: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], EngineGroup]]:
    """Two engines, their directory and workers in another process, which can be stopped and killed."""
    engines = subprocess.Popen(
        [sys.executable, str(PROCESS), "--key-file", str(key_file), "--engines", "2", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert engines.stdout is not None
        with EngineGroup.connect(engines.stdout.readline().decode().strip(), key_file=key_file) as client:
            client.wait_ready(2, timeout=20)
            yield engines, client
    finally:
        engines.kill()
        engines.communicate()


def calls(group: EngineGroup, deadline: float) -> dict[str, Callable[[], object]]:
    return {
        "pause": lambda: group.pause(timeout=deadline),
        "resume": lambda: group.resume(timeout=deadline),
        "update": lambda: update(group, 1, timeout=deadline),
        "status": lambda: group.status(timeout=deadline),
        "engines": lambda: group.engines(timeout=deadline),
        "wait_ready": lambda: group.wait_ready(2, timeout=deadline),
    }


def test_no_call_outlasts_its_deadline_where_everything_is_stopped_or_killed(key_file: Path) -> None:
    with another_process(key_file) as (engines, group):
        engines.send_signal(signal.SIGSTOP)
        for name, call in calls(group, 0.2).items():
            started = time.monotonic()
            with pytest.raises(ArealError):
                call()
            assert time.monotonic() - started < 0.2 + OVERRUN, name
        engines.send_signal(signal.SIGCONT)
        group.wait_ready(2, timeout=10)
        group.pause(timeout=5)
        group.resume(timeout=5)
        engines.kill()
        engines.wait()
        for name, call in calls(group, 0.2).items():
            started = time.monotonic()
            with pytest.raises(ArealError):
                call()
            assert time.monotonic() - started < 0.2 + OVERRUN, name


def test_a_frozen_process_is_not_reported_as_a_wrong_key(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(socket: zmq.Socket[bytes]) -> None:
        tune_client(socket)
        socket.handshake_ivl = 300

    monkeypatch.setattr("areal_vllm_ext.control.connection.tune_client", tune)
    with another_process(key_file) as (engines, group):
        directory = group._group._commander.directory
        engines.send_signal(signal.SIGSTOP)
        for seconds in (0.2, 1.0):  # before the handshake is given up, and after
            unanswered = pytest.raises(
                EngineUnreachable, match="accepts connections but does not answer: is its process"
            )
            with EngineGroup.connect(directory, key_file=key_file) as client, unanswered:
                client.engines(timeout=seconds)
        engines.send_signal(signal.SIGCONT)
        refused = pytest.raises(EngineUnreachable, match="the key was refused")
        with EngineGroup.connect(directory, key=security.new_key()) as stranger, refused:
            stranger.engines(timeout=1.0)


@pytest.mark.parametrize("moment", ["receiving", "pausing"])
def test_no_update_outlasts_its_deadline_where_everything_stops_in_its_midst(key_file: Path, moment: str) -> None:
    with another_process(key_file, "--pause-seconds", "0.5") as (engines, group):
        opened = group.update(1, timeout=1.0)
        started = time.monotonic()
        with pytest.raises(UpdateAborted), opened:  # noqa: PT012 - the block is what is tested
            opened.send("/nowhere")
            if moment == "receiving":
                engines.send_signal(signal.SIGSTOP)
            else:
                threading.Timer(0.25, engines.send_signal, (signal.SIGSTOP,)).start()
        assert time.monotonic() - started < 1.0 + OVERRUN


def test_a_pause_does_not_outlast_its_deadline_where_everything_stops_in_its_midst(key_file: Path) -> None:
    with another_process(key_file, "--pause-seconds", "0.5") as (engines, group):
        threading.Timer(0.25, engines.send_signal, (signal.SIGSTOP,)).start()
        started = time.monotonic()
        with pytest.raises(ArealError):
            group.pause(timeout=0.7)
        assert time.monotonic() - started < 0.7 + OVERRUN


# The classes


def test_the_asynchronous_client_does_the_same(deployment: Deployment, key_file: Path) -> None:
    async def work() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as group:
            assert len(await group.wait_ready(2, timeout=10)) == 2
            await group.pause("abort", timeout=5)
            assert [state.generation for state in await group.status()] == ["paused", "paused"]
            await group.resume(timeout=5)
            async with group.update(4, timeout=10) as opened:
                await opened.send("/nowhere")
            assert opened.result.version == 4
            assert [engine.dp_rank for engine in await group.engines()] == [0, 1]

    asyncio.run(work())
    assert versions(deployment) == [4, 4]


def test_a_closed_group_says_so(deployment: Deployment, key_file: Path) -> None:
    group = EngineGroup.connect(deployment.directory, key_file=key_file)
    group.engines()
    group.close()
    group.close()
    with pytest.raises(ArealError, match="this group is closed"):
        group.status()


def test_an_engines_own_address_is_no_directory(group: EngineGroup, key_file: Path) -> None:
    (engine, _) = group.engines()
    wrong = pytest.raises(RequestError, match="is no directory of this version, but perhaps an engine's own address")
    with EngineGroup.connect(engine.address, key_file=key_file) as lost, wrong:
        lost.status()


@pytest.mark.parametrize("failing", ["socket", "get_monitor_socket"])
def test_a_process_that_can_open_no_socket_is_told_so(
    key_file: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    owner = zmq.Context if failing == "socket" else zmq.Socket
    none_left = pytest.raises(EngineUnreachable, match=r"Too many open files.*raise its limit")
    with EngineGroup.connect("tcp://127.0.0.1:1", key_file=key_file) as group:
        with monkeypatch.context() as patched, none_left:
            patched.setattr(owner, failing, fail)
            group.status(timeout=1.0)
        with pytest.raises(EngineUnreachable, match="nothing listens there"):
            group.status(timeout=1.0)


def test_a_group_that_is_closed_inside_a_block_keeps_no_lease(
    deployment: Deployment, group: EngineGroup, key_file: Path
) -> None:
    other = EngineGroup.connect(deployment.directory, key_file=key_file)
    usual = sys.getswitchinterval()
    with pytest.raises(ArealError, match="this group is closed"), other.update(1, timeout=30):
        other.close()
    assert sys.getswitchinterval() == usual
    assert seconds(lambda: update(group, 2, timeout=20)) < 4
    assert versions(deployment) == [2, 2]


def test_a_group_leaves_no_thread_and_no_socket_behind(deployment: Deployment, key_file: Path) -> None:
    def open_now() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
        group.wait_ready(2, timeout=10)
    before = open_now()
    for _ in itertools.repeat(None, 3):
        with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
            group.wait_ready(2, timeout=10)
            group.pause(timeout=5)
            group.resume(timeout=5)
    eventually(lambda: all(now <= then for now, then in zip(open_now(), before, strict=True)))
