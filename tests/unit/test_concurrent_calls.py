"""Calls that meet: several clients, several threads, and calls from inside an update. None waits past its deadline."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from groups import OVERRUN, seconds, states, take_lease, versions
from waiting import in_thread

from areal_vllm_ext import ArealError, AsyncEngineGroup, EngineGroup, EngineUnreachable, RequestError, UpdateAborted
from areal_vllm_ext.control import command, connection
from areal_vllm_ext.protocol import Answer, Message
from harness.simulated_engine import Deployment

if TYPE_CHECKING:
    from raw_client import RawClient

# Several clients


def test_clients_that_compete_for_the_lease_are_served_in_order(deployment: Deployment, key_file: Path) -> None:
    served: list[int] = []

    def commands(number: int) -> None:
        with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
            client.wait_ready(2, timeout=10)
            everyone.wait()
            for _ in range(12):
                client.resume(timeout=30)
                served.append(number)

    everyone = threading.Barrier(3)
    threads = [in_thread(functools.partial(commands, number)) for number in range(3)]
    for thread, outcome in threads:
        thread.join(60)
        assert outcome == [None]
    runs = [len(list(run)) for _, run in itertools.groupby(served[:24])]  # later, some have finished
    assert max(runs) <= 2, served


def test_a_client_waits_for_its_place_over_a_restart_of_the_directory(
    deployment: Deployment, group: EngineGroup, raw: Callable[..., RawClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "DISCOVER_SECONDS", 0.5)
    monkeypatch.setattr(connection, "_GONE_SECONDS", 0.5)
    take_lease(raw(deployment.directory), "dead", 60.0)
    waiting, outcome = in_thread(lambda: group.resume(timeout=20))
    time.sleep(0.3)
    port = int(deployment.directory.rpartition(":")[2])
    deployment.stop_directory()
    time.sleep(1.2)  # longer than a client waits for a directory that never answered
    assert not outcome, "it waits for the lease, and gives the directory time to come back"
    deployment.start_directory(port)
    waiting.join(20)
    assert outcome == [None]


def test_a_client_at_its_deadline_blames_the_holder_of_the_lease_and_not_the_directory(
    deployment: Deployment, group: EngineGroup, raw: Callable[..., RawClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_lease(raw(deployment.directory), "trainer on node7", 60.0)
    ask = group._group._commander._ask_directory

    async def unanswered_in_the_end(message: Message, timeout: float) -> Answer:
        if timeout < 0.5:
            raise EngineUnreachable("the directory did not answer")
        return await ask(message, timeout)

    monkeypatch.setattr(group._group._commander, "_ask_directory", unanswered_in_the_end)
    with pytest.raises(RequestError, match=r"the lease was not free within 1\.\d s: trainer on node7 commands these"):
        group.pause(timeout=1.5)


# One command of a group at a time


def inside_an_update(group: EngineGroup) -> Iterator[str]:
    """What each call says from inside the block of the same group's update."""
    for name, call in {
        "pause": lambda: group.pause(timeout=30),
        "resume": lambda: group.resume(timeout=30),
        "verify": lambda: group.verify(timeout=30),
        "update": lambda: group.update_weights("/checkpoint", version=2, timeout=30),
    }.items():
        with pytest.raises(RequestError) as refused:
            call()
        assert refused.value.kind == "busy"
        yield f"{name}: {refused.value}"


def test_calls_inside_the_block_of_a_groups_own_update_are_refused_at_once(
    deployment: Deployment, group: EngineGroup
) -> None:
    started = time.monotonic()
    with group.update(1, timeout=30) as opened:
        for said in inside_an_update(group):
            assert "inside the block of this group's update to version 1 would wait for itself" in said
        assert len(group.status()) == len(group.engines()) == len(group.wait_ready(2)) == 2, "these need no lease"
        opened.send("/checkpoint")
    assert time.monotonic() - started < 5.0
    assert versions(deployment) == [1, 1]
    group.pause(timeout=5)
    group.resume(timeout=5)


def test_calls_inside_of_an_asynchronous_updates_block_are_refused_at_once(
    deployment: Deployment, key_file: Path
) -> None:
    async def work() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as group:
            await group.wait_ready(2, timeout=10)
            async with group.update(1, timeout=30) as opened:
                for call in (group.pause(timeout=30), group.resume(timeout=30), group.verify(timeout=30)):
                    with pytest.raises(RequestError, match="inside the block of this group's update to version 1"):
                        await call
                with pytest.raises(RequestError, match="is running"):  # another task: it may be meant to wait
                    await asyncio.create_task(group.pause(timeout=0.5))
                await opened.send("/checkpoint")
            await group.resume(timeout=5)

    asyncio.run(work())
    assert versions(deployment) == [1, 1]


def test_a_call_beside_another_threads_update_waits_until_its_own_deadline(
    deployment: Deployment, group: EngineGroup
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow_update() -> None:
        with group.update(1, timeout=30) as opened:
            inside.set()
            leave.wait(20)
            opened.send("/checkpoint")

    updating, updated = in_thread(slow_update)
    assert inside.wait(10)
    began = time.monotonic()
    for call in (group.pause, group.resume, group.verify):
        started = time.monotonic()
        with pytest.raises(RequestError, match="this group's update to version 1 is running") as refused:
            call(timeout=0.8)
        assert refused.value.kind == "busy"
        running = re.search(r"\(for ([\d.]+) s so far\)", str(refused.value))
        assert running
        assert 0.7 < float(running[1]) < time.monotonic() - began + 0.1
        assert 0.7 < time.monotonic() - started < 0.8 + OVERRUN
    pausing, paused = in_thread(lambda: group.pause(timeout=20))
    leave.set()
    updating.join(20)
    pausing.join(20)
    assert (updated, paused) == ([None], [None])
    assert states(group) == ["paused", "paused"]


def test_other_clients_get_in_once_the_time_of_an_abandoned_update_is_over(
    deployment: Deployment, group: EngineGroup, key_file: Path
) -> None:
    """The body calls the group, catches the error, and goes on until its time is over."""

    def work() -> None:
        with group.update(1, timeout=1.0) as opened:
            with contextlib.suppress(RequestError):
                group.pause(timeout=30)
            time.sleep(1.0)
            opened.send("/checkpoint")

    with pytest.raises(UpdateAborted):
        work()
    with EngineGroup.connect(deployment.directory, key_file=key_file) as other:
        assert seconds(lambda: other.resume(timeout=5)) < 2.0


@pytest.mark.parametrize("call", ["status", "pause", "engines"])
def test_on_phase_that_asks_its_own_group_is_refused_at_once_and_the_update_goes_on(
    deployment: Deployment, group: EngineGroup, call: str
) -> None:
    said: list[str] = []

    def on_phase(phase: str) -> None:
        try:
            getattr(group, call)()
        except ArealError as error:
            said.append(str(error))

    started = time.monotonic()
    with group.update(1, timeout=20, on_phase=on_phase) as opened:
        opened.send("/checkpoint")
    assert time.monotonic() - started < 5.0
    assert len(said) == len(["begin", "prepare", "pause", "commit", "resume"])
    assert all("as in on_phase" in one for one in said)
    assert versions(deployment) == [1, 1]


@pytest.mark.parametrize(
    ("failing", "error"),
    [*((phase, KeyError) for phase in ("begin", "prepare", "pause", "commit", "resume")), ("commit", SystemExit)],
)
def test_on_phase_that_fails_is_logged_and_hides_no_outcome(
    deployment: Deployment,
    group: EngineGroup,
    failing: str,
    error: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    phases: list[str] = []

    def on_phase(phase: str) -> None:
        phases.append(phase)
        if phase == failing:
            raise error("a bug of the user's")

    result = group.update_weights("/checkpoint", version=1, timeout=20, on_phase=on_phase)
    assert (result.version, len(result.engines)) == (1, 2)
    assert phases == ["begin", "prepare", "pause", "commit", "resume"]
    assert versions(deployment) == [1, 1]
    assert f"on_phase('{failing}') failed" in caplog.text
    assert "a bug of the user's" in caplog.text


def test_an_exit_in_a_groups_event_loop_does_not_end_it(group: EngineGroup) -> None:
    async def exits() -> None:
        await asyncio.create_task(leaves())

    async def leaves() -> None:
        sys.exit("a task of the user's")

    with pytest.raises(SystemExit, match="a task of the user's"):
        group._thread.run(exits())
    assert len(group.status()) == 2
