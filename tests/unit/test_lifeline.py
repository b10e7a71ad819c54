"""A lifeline tells both ends of each other's end, and strangers nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from areal_vllm_ext.process import lifeline

PEER = """
import asyncio, sys
from areal_vllm_ext.process import lifeline
async def main():
    address = lifeline.LifelineAddress(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    task = await lifeline.connect(address, sys.argv[4], lambda: print("ended", flush=True))
    print("connected", flush=True)
    await task
asyncio.run(main())
"""

OWNER = """
import asyncio
import contextlib
from areal_vllm_ext.process import lifeline
async def main():
    address = await lifeline.Lifelines(lambda _: None).listen("127.0.0.1")
    print(address.port, address.token, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def peer(address: lifeline.LifelineAddress, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PEER, address.host, str(address.port), address.token, name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextlib.asynccontextmanager
async def listening(lost: Callable[[str], None]) -> AsyncIterator[lifeline.LifelineAddress]:
    """Listen until the end of the block; the owner itself listens until its process ends."""
    lifelines = lifeline.Lifelines(lost)
    yield await lifelines.listen("127.0.0.1")
    assert lifelines._server
    lifelines._server.close()


async def until(condition: object) -> None:
    for _ in range(200):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come to that")


def test_killed_peer_is_named() -> None:
    async def run() -> None:
        lost: list[str] = []
        async with listening(lost.append) as address:
            process = peer(address, "node 1")
            assert process.stdout
            assert await asyncio.to_thread(process.stdout.readline) == "connected\n"
            assert not lost
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: lost == ["node 1"])
            process.communicate()

    asyncio.run(run())


def test_peer_hears_of_the_owners_end() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)

    async def run() -> None:
        assert owner.stdout
        port, token = (await asyncio.to_thread(owner.stdout.readline)).split()
        ended = asyncio.Event()
        task = await lifeline.connect(lifeline.LifelineAddress("127.0.0.1", int(port), token), "node 1", ended.set)
        assert not ended.is_set()
        owner.kill()
        await asyncio.wait_for(ended.wait(), 10)
        await task
        owner.communicate()

    asyncio.run(run())


def test_stranger_cannot_report_a_loss() -> None:
    async def run() -> None:
        lost: list[str] = []
        async with listening(lost.append) as address:
            for greeting in (b"guess node 1\n", b"\xff\xfe\n", b"x" * 100_000 + b"\n", b""):
                _, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(greeting)
                writer.close()
            await asyncio.sleep(0.3)
        assert not lost

    asyncio.run(run())


def test_owner_that_cannot_be_reached() -> None:
    async def run() -> None:
        unused = lifeline.LifelineAddress("127.0.0.1", 1, "token")
        with pytest.raises(OSError, match="Connect call failed"):
            await lifeline.connect(unused, "node 1", lambda: None)

    asyncio.run(run())
