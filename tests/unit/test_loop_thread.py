"""Ctrl-C in a call that waits for an event loop in another thread."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from areal_vllm_ext.client.loop_thread import LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    made = LoopThread("test")
    yield made
    made.close()


def test_an_interrupt_waits_two_seconds_for_a_clean_up_that_takes_longer(thread: LoopThread) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(10)

    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    assert 2.0 <= time.monotonic() - started < 6.0


def test_work_that_an_interrupt_overtook_still_cleans_up(thread: LoopThread, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = threading.Event()
    schedule = thread.loop.call_soon_threadsafe
    calls: list[Callable[..., Any]] = []

    def interrupted(callback: Callable[..., Any], *args: Any) -> Any:
        calls.append(callback)
        if len(calls) == 1:
            raise KeyboardInterrupt  # before the work was given to the loop
        return schedule(callback, *args)

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            cleaned.set()

    monkeypatch.setattr(thread.loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        thread.run(work())
    assert cleaned.wait(5)
