"""The trace of an update: collected from every engine at its end, and written for Perfetto (Chrome's trace format).

Each process of the update is a process of the trace, with one row per track. Engines record times by their own clocks. The
round trip of the request gives the offset to the trainer's clock.
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

# Upper bounds of spans: per kind in a process, and for all workers together. Each worker keeps at least the last number.
MAX_SPANS_PER_KIND = 512
_MAX_SPANS_OF_WORKERS, _MIN_SPANS_PER_KIND = 50_000, 16
# Share of the time in which workers answer their engine.
_WORKERS_SHARE = 0.7


def spans_for(engines: Iterable[EngineInfo]) -> int:
    """Return how many spans of each kind a worker keeps, so that the trace of many workers stays readable."""
    workers = sum(len(engine.workers) for engine in engines)
    return max(min(MAX_SPANS_PER_KIND, _MAX_SPANS_OF_WORKERS // max(workers, 1)), _MIN_SPANS_PER_KIND)


async def collect(
    request: Request, engines: Mapping[str, EngineInfo], update: str, timeout: float
) -> tuple[dict[str, list[Span]], list[str]]:
    """Return what the engines did in ``update``, by name and by this process' clock, and what is missing.

    Args:
        request: sends a request to an address, see ``Link.request``.
        engines: by name.
        update: its id.
        timeout: seconds.
    """
    collected: dict[str, list[Span]] = {}
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
        collected[name] = shifted(trace.spans, clock_offset(sent, trace.received, trace.answered, monotonic()))
        problems.extend(f"{name}: worker {rank} did not answer in time" for rank in trace.silent)

    await asyncio.gather(*(ask(name, engine) for name, engine in engines.items()))
    return {name: collected[name] for name in engines if name in collected}, problems


def write(
    path: str | os.PathLike[str],
    trainer: Sequence[Span],
    engines: Mapping[str, Sequence[Span]],
    started: float,
    about: Mapping[str, Any],
) -> None:
    """Write the trace.

    Args:
        path: the file.
        trainer: spans of this process.
        engines: spans by engine.
        started: the time that becomes zero.
        about: facts that the file carries with it.

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
        # Round to whole nanoseconds, which keeps nested spans nested.
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
    """Return (start, end, name) in rows. Two entries of a row are disjoint or nested, as the trace format demands."""
    made: list[list[tuple[int, int, str]]] = []
    open_ends: list[list[int]] = []  # by row, the ends of the entries that are still open; the last one ends first
    for entry in sorted(entries, key=lambda one: (one[0], -one[1])):
        start, end, _ = entry
        for row, ends in zip(made, open_ends, strict=True):  # noqa: B007 - used when found
            while ends and ends[-1] <= start:
                ends.pop()
            if not ends or end <= ends[-1]:
                break
        else:
            made.append(row := [])
            open_ends.append(ends := [])
        row.append(entry)
        ends.append(end)
    return made
