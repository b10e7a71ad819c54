"""Groups that are not closed, that change their event loop, or that are pickled."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle  # noqa: TID251 - what a user may try
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import eventually, in_thread

from areal_vllm_ext import ArealError, AsyncEngineGroup, EngineGroup, UpdateResult
from areal_vllm_ext.client.sinks import Sinks
from harness.simulated_engine import Deployment


def open_now() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def freed() -> Callable[[], None]:
    """Checks that threads and descriptors are as many as at first."""
    gc.collect()
    before = open_now()

    def check() -> None:
        gc.collect()
        # A few come and go with the process itself. Four groups would leave 12 threads and 56 descriptors.
        eventually(lambda: all(now <= then + 3 for now, then in zip(open_now(), before, strict=True)), timeout=5)

    return check


# A trainer that makes a group in each step and forgets it


def test_a_group_that_is_not_closed_warns_and_is_freed(
    deployment: Deployment, key_file: Path, freed: Callable[[], None]
) -> None:
    def step(version: int) -> None:
        group = EngineGroup.connect(deployment.directory, key_file=key_file)
        group.wait_ready(2, timeout=10)
        group.update_weights("/checkpoint", version=version, timeout=10)

    with pytest.warns(ResourceWarning, match="a group of engines was not closed: use it in a with block"):  # noqa: PT031 - the whole block
        for version in range(1, 5):
            step(version)
        gc.collect()
    freed()
    assert [engine.version for engine in deployment.engines.values()] == [4, 4]


def test_a_forgotten_connection_to_the_workers_is_closed_in_a_thread_of_its_own() -> None:
    closed: list[str] = []

    class Sink:
        def close(self) -> None:
            closed.append(threading.current_thread().name)

    sinks = Sinks()
    sinks._cached = (), Sink()  # type: ignore[assignment]
    del sinks
    gc.collect()
    eventually(lambda: closed == ["areal-close-sink"])


def test_a_group_that_asked_nothing_is_freed(deployment: Deployment, key_file: Path, freed: Callable[[], None]) -> None:
    for _ in range(5):
        EngineGroup.connect(deployment.directory, key_file=key_file)
    freed()


def test_an_update_keeps_its_group_alive(deployment: Deployment, key_file: Path) -> None:
    with pytest.warns(ResourceWarning, match="not closed"):  # noqa: PT031 - the whole block
        with EngineGroup.connect(deployment.directory, key_file=key_file).update(1, timeout=10) as opened:
            gc.collect()
            opened.send("/checkpoint")
        assert opened.result.version == 1
        del opened
        gc.collect()


def test_a_forgotten_group_renews_no_pause(deployment: Deployment, key_file: Path) -> None:
    def pause() -> None:
        group = EngineGroup.connect(deployment.directory, key_file=key_file)
        group.wait_ready(2, timeout=10)
        group.pause(timeout=5, lease=1.0)

    with pytest.warns(ResourceWarning, match="not closed"):  # noqa: PT031 - the whole block
        pause()
        gc.collect()
    with EngineGroup.connect(deployment.directory, key_file=key_file) as other:
        eventually(lambda: [state.generation for state in other.status()] == ["running"] * 2, timeout=5)


def test_an_asynchronous_group_that_is_not_closed_warns_and_is_freed(
    deployment: Deployment, key_file: Path, freed: Callable[[], None]
) -> None:
    async def forget() -> None:
        for _ in range(3):
            group = AsyncEngineGroup.connect(deployment.directory, key_file=key_file)
            assert len(await group.wait_ready(2, timeout=10)) == 2
            del group
            gc.collect()
            await asyncio.sleep(0.05)

    with pytest.warns(ResourceWarning, match="not closed"):
        asyncio.run(forget())
    freed()


def test_a_group_that_is_forgotten_with_its_closed_loop_is_freed(
    deployment: Deployment, key_file: Path, freed: Callable[[], None]
) -> None:
    group = AsyncEngineGroup.connect(deployment.directory, key_file=key_file)
    assert len(asyncio.run(group.wait_ready(2, timeout=10))) == 2
    with pytest.warns(ResourceWarning, match="not closed"):  # noqa: PT031 - the whole block
        del group
        gc.collect()
    freed()


def test_a_connection_whose_loop_ended_before_it_closed_does_not_hang_the_garbage_collector() -> None:
    code = """
import asyncio, gc
from areal_vllm_ext import protocol
from areal_vllm_ext.control.connection import Connection
from areal_vllm_ext.protocol import security

async def connect():
    key = security.new_key()
    connection = Connection(lambda host: key)
    connection.ask({"engine": ("tcp://127.0.0.1:9", protocol.Hello())}, 5.0, print)
    asyncio.get_running_loop().stop()
    connection.close_from_any_thread()  # the loop closes first

loop = asyncio.new_event_loop()
task = loop.create_task(connect())
loop.run_forever()
loop.close()
del task
gc.collect()
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_program_that_closes_nothing_ends(deployment: Deployment, key_file: Path) -> None:
    code = f"""
from areal_vllm_ext import AsyncEngineGroup, EngineGroup
import asyncio
group = EngineGroup.connect({deployment.directory!r}, key_file={str(key_file)!r})
group.wait_ready(2, timeout=10)
group.pause(timeout=5)
group.resume(timeout=5)
asynchronous = AsyncEngineGroup.connect({deployment.directory!r}, key_file={str(key_file)!r})
asyncio.run(asynchronous.wait_ready(2, timeout=10))
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "Traceback" not in done.stderr


# Event loops


def test_an_asynchronous_group_goes_on_in_the_next_event_loop(
    deployment: Deployment, key_file: Path, freed: Callable[[], None]
) -> None:
    group = AsyncEngineGroup.connect(deployment.directory, key_file=key_file)

    async def step(version: int) -> None:
        await group.wait_ready(2, timeout=10)
        # A command that waits for another ties a lock to the loop.
        await asyncio.gather(group.pause(timeout=5), group.resume(timeout=5))
        await group.update_weights("/checkpoint", version=version, timeout=10)
        await group.resume(timeout=5)

    for version in range(1, 4):
        asyncio.run(step(version))
    assert [engine.version for engine in deployment.engines.values()] == [3, 3]
    asyncio.run(group.close())
    freed()


def test_a_group_in_two_loops_at_a_time_is_an_error_that_says_so(deployment: Deployment, key_file: Path) -> None:
    async def work() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as group:
            await group.wait_ready(2, timeout=10)
            for call in (group.status, group.pause, group.engines):
                with pytest.raises(
                    ArealError, match=r"belongs to another event loop, .*make a group for each event loop"
                ):
                    await asyncio.to_thread(lambda call=call: asyncio.run(call(timeout=5)))
            assert len(await group.status()) == 2

    asyncio.run(work())


def test_a_closed_asynchronous_group_says_so(deployment: Deployment, key_file: Path) -> None:
    async def work() -> None:
        group = AsyncEngineGroup.connect(deployment.directory, key_file=key_file)
        await group.engines()
        await group.close()
        await group.close()
        for call in (group.status, group.pause):
            with pytest.raises(ArealError, match="this group is closed"):
                await call(timeout=5)

    asyncio.run(work())


# A block that is never left


def test_other_clients_get_in_when_the_time_of_a_stuck_block_is_over(deployment: Deployment, key_file: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def stuck() -> None:
        with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
            group.wait_ready(2, timeout=10)
            with group.update(1, timeout=1.0):
                inside.set()
                leave.wait(30)

    thread, _ = in_thread(stuck)
    assert inside.wait(10)
    started = time.monotonic()
    with EngineGroup.connect(deployment.directory, key_file=key_file) as other:
        other.resume(timeout=10)
    assert time.monotonic() - started < 5.0
    leave.set()
    thread.join(10)


# Pickle


@pytest.mark.parametrize("kind", [EngineGroup, AsyncEngineGroup])
def test_a_group_that_is_pickled_says_what_to_do(kind: type, key_file: Path) -> None:
    group = kind.connect("tcp://127.0.0.1:1", key_file=key_file)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(
            TypeError, match=rf"{kind.__name__} cannot be pickled, .* call {kind.__name__}.connect\(...\)"
        ):
            attempt(group)


@pytest.mark.parametrize("kind", [EngineGroup, AsyncEngineGroup])
def test_an_update_that_is_pickled_says_what_to_do(kind: type, key_file: Path) -> None:
    opened = kind.connect("tcp://127.0.0.1:1", key_file=key_file).update(1)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"an update cannot be pickled, .* begin it in the process that sends"):
            attempt(opened)


def test_the_result_of_an_update_can_be_pickled() -> None:
    result = UpdateResult(
        version=1,
        engines=("one",),
        lost={"other": "it ended"},
        nbytes=8,
        kept=0,
        total_ms=2.0,
        pause_ms=1.0,
        commit_ms=0.5,
    )
    assert pickle.loads(pickle.dumps(result)) == result


def test_no_warning_comes_from_groups_that_are_closed(deployment: Deployment, key_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
            group.wait_ready(2, timeout=10)
            group.pause(timeout=5)
        del group
        gc.collect()
