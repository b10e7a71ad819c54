"""Ctrl-C: a trainer that is interrupted leaves no engine paused or receiving, and no lease behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from raw_client import RawClient
from simulated_engine import NEVER, Deployment
from waiting import eventually

from areal_vllm_ext.protocol import AcquireLease, GetStatus, Lease, Status

Raw = Callable[..., RawClient]

TRAINER = """
import sys
from areal_vllm_ext import EngineGroup
directory, key_file, checkpoint, what = sys.argv[1:]
with EngineGroup.connect(directory, key_file=key_file) as group:
    if what == "pause":
        print("pausing", flush=True)
        group.pause(deadline=60)
    with group.update("new", deadline=60, on_phase=lambda phase: print(phase, flush=True)) as update:
        update.send(checkpoint)
"""


@contextlib.contextmanager
def trainer(deployment: Deployment, key_file: Path, what: str = "update") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", TRAINER, deployment.directory, str(key_file), "/checkpoint", what]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], phase: str) -> None:
    assert process.stdout is not None
    said = next((line for line in process.stdout if line.strip() == phase), "")
    assert said, process.communicate()[1]


def interrupt(process: subprocess.Popen[str]) -> float:
    """Seconds from Ctrl-C to the end."""
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, complaints = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in complaints
    return time.monotonic() - started


def state(deployment: Deployment, raw: Raw) -> set[tuple[object, str, str]]:
    answers = [raw(engine.endpoint.address).ask(GetStatus()) for engine in deployment.engines.values()]
    statuses = [answer for answer in answers if isinstance(answer, Status)]
    assert len(statuses) == len(deployment.engines)
    return {(status.version, status.phase, status.flow) for status in statuses}


def assert_lease_is_free(deployment: Deployment, raw: Raw) -> None:
    answer = raw(deployment.directory).ask(AcquireLease(holder="somebody else", seconds=0.0))
    assert isinstance(answer, Lease), answer


@pytest.mark.parametrize("phase", ["begin", "prepare", "pause"])
def test_before_the_first_commit_every_engine_keeps_its_weights_and_runs(
    deployment: Deployment, key_file: Path, raw: Raw, phase: str
) -> None:
    deployment.engines[1].seconds[phase] = NEVER
    with trainer(deployment, key_file) as process:
        wait_for(process, phase)
        eventually(lambda: phase != "pause" or not deployment.engines[0].running)
        assert interrupt(process) < 5.0
    assert state(deployment, raw) == {(0, "idle", "running")}
    assert_lease_is_free(deployment, raw)


def test_from_the_first_commit_on_every_engine_goes_to_the_new_weights_and_runs(
    deployment: Deployment, key_file: Path, raw: Raw
) -> None:
    deployment.engines[1].seconds["commit"] = 0.5
    with trainer(deployment, key_file) as process:
        wait_for(process, "commit")
        assert interrupt(process) < 5.0
    assert state(deployment, raw) == {("new", "idle", "running")}
    assert_lease_is_free(deployment, raw)


def test_a_pause_is_taken_back(deployment: Deployment, key_file: Path, raw: Raw) -> None:
    deployment.engines[1].seconds["pause"] = NEVER
    with trainer(deployment, key_file, "pause") as process:
        wait_for(process, "pausing")
        eventually(lambda: deployment.engines[0].calls and deployment.engines[1].calls)
        assert interrupt(process) < 5.0
    assert state(deployment, raw) == {(0, "idle", "running")}
    assert_lease_is_free(deployment, raw)


@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_does_not_answer_is_waited_for_two_seconds_or_until_the_second_interrupt(
    deployment: Deployment, key_file: Path, times: int
) -> None:
    engine = deployment.engines[1]
    engine.seconds["pause"] = engine.seconds["resume"] = engine.seconds["cancel"] = NEVER
    with trainer(deployment, key_file) as process:
        wait_for(process, "pause")
        eventually(lambda: engine.calls)
        started = time.monotonic()
        if times == 2:
            process.send_signal(signal.SIGINT)
            wait_for(process, "abort")
            time.sleep(0.2)
        interrupt(process)
        assert (time.monotonic() - started >= 1.9) == (times == 1)
