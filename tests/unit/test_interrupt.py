"""Ctrl-C: a trainer that is interrupted leaves no engine paused or receiving, and no lease behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import peers
import pytest
from raw_client import RawClient
from waiting import eventually

from areal_vllm_ext.protocol import AcquireLease, GetStatus, Lease, Status
from harness.simulated_engine import NEVER, Deployment

Raw = Callable[..., RawClient]


@dataclasses.dataclass
class Trainer:
    """A client in a process of its own."""

    process: BaseProcess
    connection: Connection

    def wait_for(self, phase: str) -> None:
        while self.connection.poll(20):
            if self.connection.recv() == phase:
                return
        raise AssertionError(f"the trainer did not come to {phase}")

    def interrupt(self) -> None:
        assert self.process.pid
        os.kill(self.process.pid, signal.SIGINT)

    def seconds_to_the_end(self) -> float:
        started = time.monotonic()
        self.process.join(30)
        assert self.process.exitcode == 1, "KeyboardInterrupt did not come out"
        return time.monotonic() - started


@contextlib.contextmanager
def trainer(deployment: Deployment, key_file: Path, what: str = "update") -> Iterator[Trainer]:
    process, connection = peers.start(peers.command, deployment.directory, str(key_file), what)
    try:
        yield Trainer(process, connection)
    finally:
        peers.end(process, connection)


def state(deployment: Deployment, raw: Raw) -> set[tuple[object, str, str]]:
    answers = [raw(engine.endpoint.address).ask(GetStatus()) for engine in deployment.engines.values()]
    statuses = [answer for answer in answers if isinstance(answer, Status)]
    assert len(statuses) == len(deployment.engines)
    return {(status.version, status.update_phase, status.generation) for status in statuses}


def assert_lease_is_free(deployment: Deployment, raw: Raw) -> None:
    answer = raw(deployment.directory).ask(AcquireLease(holder="somebody else", seconds=0.0))
    assert isinstance(answer, Lease), answer


@pytest.mark.parametrize("phase", ["begin", "prepare", "pause"])
def test_before_the_first_commit_every_engine_keeps_its_weights_and_runs(
    deployment: Deployment, key_file: Path, raw: Raw, phase: str
) -> None:
    deployment.engines[1].seconds[phase] = NEVER
    with trainer(deployment, key_file) as one:
        one.wait_for(phase)
        eventually(lambda: phase != "pause" or not deployment.engines[0].running)
        one.interrupt()
        assert one.seconds_to_the_end() < 5.0
    assert state(deployment, raw) == {(0, "idle", "running")}
    assert_lease_is_free(deployment, raw)


def test_from_the_first_commit_on_every_engine_goes_to_the_new_weights_and_runs(
    deployment: Deployment, key_file: Path, raw: Raw
) -> None:
    deployment.engines[1].seconds["commit"] = 0.5
    with trainer(deployment, key_file) as one:
        one.wait_for("commit")
        one.interrupt()
        assert one.seconds_to_the_end() < 5.0
    assert state(deployment, raw) == {("new", "idle", "running")}
    assert_lease_is_free(deployment, raw)


def test_a_pause_is_taken_back(deployment: Deployment, key_file: Path, raw: Raw) -> None:
    deployment.engines[1].seconds["pause"] = NEVER
    with trainer(deployment, key_file, "pause") as one:
        one.wait_for("pausing")
        eventually(lambda: deployment.engines[0].calls and deployment.engines[1].calls)
        one.interrupt()
        assert one.seconds_to_the_end() < 5.0
    assert state(deployment, raw) == {(0, "idle", "running")}
    assert_lease_is_free(deployment, raw)


@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_does_not_answer_is_waited_for_two_seconds_or_until_the_second_interrupt(
    deployment: Deployment, key_file: Path, times: int
) -> None:
    engine = deployment.engines[1]
    engine.seconds["pause"] = engine.seconds["resume"] = engine.seconds["cancel"] = NEVER
    with trainer(deployment, key_file) as one:
        one.wait_for("pause")
        eventually(lambda: engine.calls)
        started = time.monotonic()
        if times == 2:
            one.interrupt()
            one.wait_for("abort")
            time.sleep(0.2)
        one.interrupt()
        one.seconds_to_the_end()
        assert (time.monotonic() - started >= 1.9) == (times == 1)
