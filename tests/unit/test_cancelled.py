"""An update that is cancelled leaves nothing behind that could touch the next one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_infos import engine_info
from real_receivers import Served, assert_untouched, checkpoint, group, served, shared_engines, weights

from areal_vllm_ext import AsyncEngineGroup, EngineGroup, InvalidWeights, UpdateAborted, UpdateResult
from areal_vllm_ext.client import transaction as transactions
from areal_vllm_ext.client.sending import Sending
from areal_vllm_ext.client.sinks import Sinks
from areal_vllm_ext.protocol import Bucket
from areal_vllm_ext.transport.base import Cancelled
from harness.simulated_engine import NEVER, Deployment

__all__ = ["checkpoint", "group", "served", "shared_engines"]  # the fixtures


async def cancelled_after(seconds: float, group: AsyncEngineGroup, source: object, version: int) -> None:
    update = asyncio.ensure_future(
        group.update_weights(source, version=version, timeout=20, transport="broadcast")  # type: ignore[arg-type]
    )
    await asyncio.sleep(seconds)
    update.cancel()
    await asyncio.wait([update])


@pytest.mark.parametrize("step", [0.002, 0.011])
def test_healthy_updates_come_through_between_cancelled_ones(served: Served, key_file: Path, step: float) -> None:
    async def run() -> None:
        async with AsyncEngineGroup.connect(served.deployment.directory, key_file=key_file) as client:
            for number in range(12):
                await cancelled_after(step * number, client, weights(1), 100 + number)
                result = await client.update_weights(weights(number), version=number, timeout=20, transport="broadcast")
                assert result.version == number
                assert served.serves(weights(number))

    asyncio.run(run())


def test_the_thread_of_a_cancelled_update_does_not_touch_the_next_ones_connection(
    served: Served, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's iterator keeps the thread, and lets it go in the middle of the next update."""
    monkeypatch.setattr(transactions, "_STOP_SECONDS", 0.05)
    go_on, ended = threading.Event(), threading.Event()
    announced: list[object] = []
    announce = Sending.announce

    def noted(self: Sending, bucket: Bucket) -> Any:
        announced.append(self._context.version)
        return announce(self, bucket)

    monkeypatch.setattr(Sending, "announce", noted)

    def stalling() -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for number, item in enumerate(weights(1).items()):
                if number == 1:
                    go_on.wait(20)
                yield item
        finally:
            ended.set()

    def releasing() -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(weights(2).items()):
            if number == 1:
                go_on.set()
                assert ended.wait(20)
                time.sleep(0.1)  # for what the other thread does at its end
            yield item

    async def run() -> None:
        async with AsyncEngineGroup.connect(served.deployment.directory, key_file=key_file) as client:
            await cancelled_after(0.5, client, stalling(), 1)
            assert announced == []
            result = await client.update_weights(releasing(), version=2, timeout=20, transport="broadcast")
            assert result.version == 2

    asyncio.run(run())
    assert served.serves(weights(2))
    assert 1 not in announced, "the cancelled update goes on"


def test_a_begin_that_is_in_flight_is_aborted_with_its_update(deployment: Deployment, key_file: Path) -> None:
    for engine in deployment.engines.values():
        engine.seconds["begin"] = NEVER

    async def run() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            update = client.update(1, timeout=20)

            async def send() -> None:
                async with update:
                    await update.send("/nowhere")

            sending = asyncio.ensure_future(send())
            await asyncio.sleep(0.3)
            started = time.monotonic()
            sending.cancel()
            await asyncio.wait([sending])
            assert time.monotonic() - started < 0.4
            assert update._sending is not None
            assert update._sending.done(), "its thread still waits for the engines"

    asyncio.run(run())
    assert all(engine.calls == [] for engine in deployment.engines.values())


def test_a_begin_that_is_stopped_has_ended_everywhere_before_anything_else_happens(
    deployment: Deployment, key_file: Path
) -> None:
    for engine in deployment.engines.values():
        engine.seconds["begin"] = NEVER

    async def run() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            update = client.update(1, timeout=20)

            async def stop() -> None:
                async with update:
                    sending = asyncio.ensure_future(update.send("/nowhere"))
                    await asyncio.sleep(0.3)
                    driver = update.transaction.driver
                    await driver.stop_beginning()
                    assert driver.coordinator is not None
                    assert driver.coordinator.phase == "done"
                    await asyncio.wait([sending])

            with pytest.raises(UpdateAborted, match="the trainer was interrupted"):
                await stop()

    asyncio.run(run())
    assert all(engine.endpoint.participant.update is None for engine in deployment.engines.values())


def test_a_block_that_is_left_while_its_update_begins_is_aborted(deployment: Deployment, key_file: Path) -> None:
    """It ends without an error, because the user has hidden that of ``send``."""
    for engine in deployment.engines.values():
        engine.seconds["begin"] = NEVER

    async def leaving_send(client: AsyncEngineGroup) -> None:
        async with client.update(1, timeout=20) as update:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(update.send("/nowhere"), 0.3)

    async def run() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            with pytest.raises(UpdateAborted, match="the trainer was interrupted"):
                await leaving_send(client)

    asyncio.run(run())
    assert all(engine.endpoint.participant.update is None for engine in deployment.engines.values())


async def update_that_commits(client: AsyncEngineGroup) -> asyncio.Future[UpdateResult]:
    """Begin an update; returns it when its commits are about to be sent."""
    committing = asyncio.Event()

    def on_phase(phase: str) -> None:
        if phase == "commit":
            committing.set()

    update = asyncio.ensure_future(client.update_weights("/nowhere", version=1, timeout=20, on_phase=on_phase))
    await committing.wait()
    return update


def test_an_update_that_is_cancelled_while_engines_commit_is_committed_and_raises(
    deployment: Deployment, key_file: Path
) -> None:
    for engine in deployment.engines.values():
        engine.seconds["commit"] = 0.5

    async def run() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            update = await update_that_commits(client)
            await asyncio.sleep(0.1)
            update.cancel()
            await asyncio.wait([update])
            assert update.cancelled()
            assert {state.version for state in await client.status()} == {1}

    asyncio.run(run())
    assert all(engine.running for engine in deployment.engines.values())


def test_a_second_cancellation_ends_an_update_that_waits_for_commits(deployment: Deployment, key_file: Path) -> None:
    for engine in deployment.engines.values():
        engine.seconds["commit"] = NEVER

    async def run() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            update = await update_that_commits(client)
            await asyncio.sleep(0)  # until the commits are sent
            update.cancel()
            await asyncio.wait([update], timeout=0.3)
            assert not update.done(), "an engine may have committed, so it goes on"
            started = time.monotonic()
            update.cancel()
            await asyncio.wait([update], timeout=5)
            assert update.cancelled()
            assert time.monotonic() - started < 3

    asyncio.run(run())


def test_a_thread_that_gets_to_begin_after_its_update_has_ended_begins_nothing(
    deployment: Deployment, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "_STOP_SECONDS", 0.05)
    go_on = threading.Event()

    def stalling() -> Iterator[tuple[str, torch.Tensor]]:
        go_on.wait(20)
        yield "late", torch.zeros(4)

    async def run() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            update = client.update(1, timeout=20, transport="shared_memory")

            async def send() -> None:
                async with update:
                    await update.send(stalling())

            sending = asyncio.ensure_future(send())
            await asyncio.sleep(0.3)
            sending.cancel()
            await asyncio.wait([sending])
            sent = update._sending
            assert sent is not None
            assert not sent.done()
            with pytest.raises(UpdateAborted, match="its block was left while it was sending"):
                await update.transaction.driver.begin({}, {})
            go_on.set()
            await asyncio.wait([sent], timeout=10)
            assert isinstance(sent.exception(), (Cancelled, UpdateAborted))

    asyncio.run(run())
    assert all(engine.orders == [] for engine in deployment.engines.values())


def test_only_the_update_that_runs_opens_and_drops_connections() -> None:
    sinks, first, second = Sinks(), object(), object()
    engines = {"one": engine_info(0)}

    def opened(user: object) -> Any:
        return sinks.open(user, "shared_memory", engines, torch.device("cpu"), 1 << 16, (), 5.0)

    sinks.begin(first)
    sink = opened(first)
    sinks.end(first)
    with pytest.raises(Cancelled):
        opened(first)
    sinks.begin(second)
    assert opened(second) is sink, "it is kept from one update to the next"
    sinks.drop(first)
    assert sinks.sink is sink
    with pytest.raises(Cancelled):
        opened(first)
    sinks.end(first)
    sinks.drop(second)
    assert sinks.sink is None
    assert opened(second) is not sink
    sinks.drop()
    assert sinks.sink is None


def test_a_send_that_was_left_in_the_middle_is_not_committed(served: Served, key_file: Path) -> None:
    """The block ends without an error, because the user has hidden that of ``send``."""

    def slow() -> Iterator[tuple[str, torch.Tensor]]:
        for item in weights(1).items():
            time.sleep(0.1)
            yield item

    async def leaving_send(client: AsyncEngineGroup) -> None:
        async with client.update(1, timeout=20, transport="broadcast") as update:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(update.send(slow()), 0.25)

    async def run() -> None:
        async with AsyncEngineGroup.connect(served.deployment.directory, key_file=key_file) as client:
            with pytest.raises(UpdateAborted, match="did not bring all weights"):
                await leaving_send(client)
            await client.update_weights(weights(3), version=3, timeout=20)

    asyncio.run(run())
    assert served.serves(weights(3))


def test_an_error_of_send_that_is_hidden_is_not_committed(served: Served, group: EngineGroup) -> None:
    bad = weights(1) | {"scale": torch.tensor(float("nan"))}
    with (
        pytest.raises(UpdateAborted, match="did not bring all weights"),
        group.update(1, timeout=20) as update,
        pytest.raises(InvalidWeights, match="NaN"),
    ):
        update.send(bad)
    assert_untouched(served)


def test_a_timeout_while_bytes_travel_says_so_and_how_far_they_got(served: Served, group: EngineGroup) -> None:
    def late() -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(weights(1).items()):
            if number == 3:
                time.sleep(1.2)
            yield item

    with pytest.raises(UpdateAborted, match=r"its timeout of 1 s was over while .* sent.*: \d of \d announced"):
        group.update_weights(late(), version=1, timeout=1.0, transport="broadcast")
    assert_untouched(served)
