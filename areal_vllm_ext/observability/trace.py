"""The trace of an update on every engine: collected when it is over, and written for Perfetto (Chrome's trace format).

Each process is one of the trace's, with the rows that it called its tracks. Engines tell times by their own clocks, and are
put beside the trainer's by the round trip of the question.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from .. import protocol
from ..errors import EngineUnreachable, RequestError
from .spans import clock_offset, shifted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from ..protocol import Answer, EngineInfo, Message, Span

    Request = Callable[[str, Message, float], Awaitable[Answer]]

# Of each kind so many spans in a process; of all workers' together so many, as long as each has a few.
MAX_SPANS_PER_KIND = 512
_OF_ALL_WORKERS, _FEWEST = 50_000, 16
# Workers get this share of the time to tell their engine.
_WORKERS_SHARE = 0.7


def spans_for(engines: Iterable[EngineInfo]) -> int:
    """How many spans of each kind a worker keeps, so that the trace of very many can be read."""
    workers = sum(len(engine.workers) for engine in engines)
    return max(min(MAX_SPANS_PER_KIND, _OF_ALL_WORKERS // max(workers, 1)), _FEWEST)


async def collect(
    request: Request, engines: Mapping[str, EngineInfo], update: str, timeout: float
) -> tuple[dict[str, list[Span]], list[str]]:
    """What the engines did in ``update``, by name and by this process' clock; and what is missing, for people."""
    told: dict[str, list[Span]] = {}
    problems: list[str] = []
    question = protocol.GetTrace(update=update, timeout=timeout * _WORKERS_SHARE)

    async def ask(name: str, engine: EngineInfo) -> None:
        sent = monotonic()
        try:
            trace = await request(engine.address, question, timeout)
        except (EngineUnreachable, RequestError) as error:
            problems.append(f"{name}: {error}")
            return
        assert isinstance(trace, protocol.Trace)
        told[name] = shifted(trace.spans, clock_offset(sent, trace.received, trace.answered, monotonic()))
        problems.extend(f"{name}: worker {rank} did not tell in time" for rank in trace.silent)

    await asyncio.gather(*(ask(name, engine) for name, engine in engines.items()))
    return {name: told[name] for name in engines if name in told}, problems


def write(
    path: str | os.PathLike[str],
    trainer: Sequence[Span],
    engines: Mapping[str, Sequence[Span]],
    started: float,
    about: Mapping[str, Any],
) -> None:
    """Write the trace; ``started`` is its zero, ``about`` is told with it.

    Raises:
        OSError: the file cannot be written.
    """
    processes = {f"trainer (node {socket.gethostname()}, pid {os.getpid()})": trainer, **engines}
    events = [
        event
        for number, (name, spans) in enumerate(processes.items())
        for event in _events(number, name, spans, started)
    ]
    whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    Path(path).write_bytes(msgspec.json.encode(whole))


def _events(process: int, name: str, spans: Sequence[Span], started: float) -> Iterator[dict[str, Any]]:
    def named(what: str, thread: int, value: str) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": value}}

    yield named("process_name", 0, name)
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": process}}
    tracks: dict[str, list[tuple[int, int, str]]] = {}
    for span in spans:
        # Whole nanoseconds: what lies within another still does so after rounding.
        start, end = (round((at - started) * 1e9) for at in (span.start, span.end))
        tracks.setdefault(span.track, []).append((start, max(end, start), span.name))
    thread = 0
    for track, entries in tracks.items():
        for row in rows(entries):
            thread += 1
            yield named("thread_name", thread, track)
            for start, end, what in row:
                kind = what.partition(" ")[0]
                times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
                yield {"ph": "X", "name": what, "cat": kind, "pid": process, "tid": thread, **times}


def rows(entries: Iterable[tuple[int, int, str]]) -> list[list[tuple[int, int, str]]]:
    """(start, end, name) in as many rows as it takes: of two in a row, one ends before the other starts, or lies within it."""
    made: list[list[tuple[int, int, str]]] = []
    under_way: list[list[int]] = []  # of each row, the ends of what is not over, the first to end last
    for entry in sorted(entries, key=lambda one: (one[0], -one[1])):
        start, end, _ = entry
        for row, ends in zip(made, under_way, strict=True):  # noqa: B007 - used when found
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or end <= ends[-1]:
                break
        else:
            made.append(row := [])
            under_way.append(ends := [])
        row.append(entry)
        ends.append(end)
    return made
