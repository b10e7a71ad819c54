"""Put a steady load on a server: when a request ends, the next one begins.

    python -m benchmarks.load URL MODEL ENGINES REQUESTS TOKENS   # REQUESTS at a time on each of ENGINES engines

The load has a process of its own. Its first line of output says that every request has tokens. It runs until standard input
is closed, and then prints a line of JSON: for each request, the moments at which tokens came and how many had come by then.
Moments are ``time.monotonic``, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

_ROOT = Path(__file__).parent.parent
_PROMPT = [11, 7, 5, 3, 2, 13, 17, 19]


# Longest gap in seconds between tokens that count as one arrival, because the server or this process was late.
_TOGETHER_SECONDS = 0.0005


@dataclass
class Load:
    """The tokens of a load; filled when its context ends.

    Attributes:
        streams: for each request, pairs of a moment and the tokens so far, in order.
    """

    streams: list[list[tuple[float, int]]] = field(default_factory=list)

    def gaps(self, start: float, end: float) -> list[float]:
        """Return the gaps in seconds between tokens of a request that overlap ``start`` to ``end``."""
        return [
            later - earlier
            for stream in self.streams
            for (earlier, _), (later, _) in itertools.pairwise(stream)
            if later > start and earlier < end and later - earlier > _TOGETHER_SECONDS
        ]

    def tokens(self, start: float, end: float) -> int:
        """Return how many tokens came to all requests between two moments."""
        total = 0
        for stream in self.streams:
            before = 0
            for moment, count in stream:
                total += (count - before) * (start <= moment < end)
                before = count
        return total


@contextlib.contextmanager
def load(
    url: str, model: str, engines: int, requests: int, tokens: int, prefix: tuple[str, ...] = ()
) -> Iterator[Load]:
    """Put a load on the server inside this context; none with 0 requests."""
    result = Load()
    if not requests:
        yield result
        return
    command = [sys.executable, "-m", "benchmarks.load", url, model, str(engines), str(requests), str(tokens)]
    process = subprocess.Popen(
        [*prefix, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT, start_new_session=True
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError(f"the load could not start: it ended with {process.wait()}")
        yield result
        result.streams = json.loads(process.communicate("", timeout=60)[0])
    finally:
        process.kill()
        process.wait()


async def _request(session: Any, url: str, body: dict[str, Any], engine: int, stream: list[tuple[float, int]]) -> None:
    headers = {"X-data-parallel-rank": str(engine)}
    count = 0
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                came = len(json.loads(line[6:])["choices"][0]["token_ids"] or ())
                count += came
                if came:
                    stream.append((monotonic(), count))


async def _run(url: str, model: str, engines: int, requests: int, tokens: int) -> list[list[tuple[float, int]]]:
    import aiohttp

    body = {"model": model, "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True, "stream": True}
    body |= {"return_token_ids": True}
    streams: list[list[tuple[float, int]]] = []

    async def keep_busy(session: Any, engine: int, place: int) -> None:
        while True:
            stream: list[tuple[float, int]] = []
            streams.append(stream)
            # Every prompt is new, so the prefix cache has none of them.
            prompt = [*_PROMPT, engine + 20, place + 20, len(streams) % 400 + 20]
            await _request(session, url, body | {"prompt": prompt}, engine, stream)

    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        busy = [
            asyncio.create_task(keep_busy(session, engine, place))
            for engine in range(engines)
            for place in range(requests)
        ]
        first = asyncio.create_task(_all_begun(streams, len(busy)))
        await asyncio.wait([first, *busy], return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            next(task for task in busy if task.done()).result()
        print("begun", flush=True)
        reader = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await asyncio.wait([reader, *busy], return_when=asyncio.FIRST_COMPLETED)
        for task in busy:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    return streams


async def _all_begun(streams: list[list[tuple[float, int]]], count: int) -> None:
    while len(streams) < count or not all(streams[:count]):  # noqa: ASYNC110 - seldom, and only here
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_run(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])))), flush=True)
