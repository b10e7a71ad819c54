"""What was done in an update, from when to when: recorded where it is done, for ``EngineGroup.update(trace=...)``."""

from __future__ import annotations

import contextlib
import itertools
import threading
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from ..protocol import Span

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

_T = TypeVar("_T")


class SpanRecorder:
    """The spans of one process, by its monotonic clock. From any thread.

    Of each kind (a name's first word) the first ``limit`` are kept; those after them become one, from the first's start to the
    last's end. A ``limit`` of 0 records nothing.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._kept: dict[str, list[Span]] = {}
        self._more: dict[str, tuple[int, Span]] = {}
        self._open: dict[Hashable, tuple[str, str, float]] = {}
        self._lock = threading.Lock()

    def add(self, track: str, name: str, start: float, end: float) -> None:
        """``name`` was done from ``start`` to ``end``, in a row of the trace that is called ``track``."""
        if not self.limit:
            return
        span, kind = Span(track, name, start, end), name.partition(" ")[0]
        with self._lock:
            kept = self._kept.setdefault(kind, [])
            if len(kept) < self.limit:
                kept.append(span)
            else:
                count, more = self._more.get(kind, (0, span))
                merged = Span(more.track, "", min(more.start, start), max(more.end, end))
                self._more[kind] = (count + 1, merged)

    def start(self, key: Hashable, track: str, name: str) -> None:
        """``name`` is done from now on, until ``end(key)``."""
        if self.limit:
            with self._lock:
                self._open[key] = (track, name, monotonic())

    def end(self, key: Hashable) -> None:
        """What was started as ``key`` is over; nothing where nothing was."""
        if self.limit:
            with self._lock:
                started = self._open.pop(key, None)
            if started:
                self.add(*started, monotonic())

    @contextlib.contextmanager
    def span(self, track: str, name: str) -> Iterator[None]:
        """The body is ``name``."""
        key = object()
        self.start(key, track, name)
        try:
            yield
        finally:
            self.end(key)

    def each(self, track: str, name: str, items: Iterable[_T]) -> Iterator[_T]:
        """``items``, each with a span of its making."""
        remaining = iter(items)
        for number in itertools.count():
            started = monotonic()
            try:
                item = next(remaining)
            except StopIteration:
                return
            self.add(track, f"{name} {number}", started, monotonic())
            yield item

    def set_state(self, track: str, state: str) -> None:
        """``track`` is in ``state`` from now on; empty: in none that is worth a span."""
        current = self._open.get(track)
        if state != (current[1] if current else ""):
            self.end(track)
            if state:
                self.start(track, track, state)

    def snapshot(self) -> tuple[Span, ...]:
        """All spans so far. What is not over yet says so, and ends now."""
        now = monotonic()
        with self._lock:
            spans = [span for kept in self._kept.values() for span in kept]
            for kind, (count, more) in self._more.items():
                spans.append(Span(more.track, f"{kind}: {count} more", more.start, more.end))
            spans += [Span(track, f"{name} (not over)", start, now) for track, name, start in self._open.values()]
        return tuple(spans)


# For who records nothing.
DISABLED = SpanRecorder()


def clock_offset(sent: float, received: float, answered: float, back: float) -> float:
    """What another process' clock lacks against this one's, in seconds.

    Args:
        sent: when this process asked, by its own clock.
        received: when the other heard it, by the other's clock.
        answered: when the other answered, by the other's clock.
        back: when this process had the answer, by its own clock.

    As in NTP, the question is taken to have travelled for as long as the answer: wrong by half of what both took at most.
    Processes of one host have the same clock: readings that can be this clock's own are taken as they are, and whoever has
    them by chance is off by no more than what both took.
    """
    if sent <= received <= answered <= back:
        return 0.0
    return ((sent - received) + (back - answered)) / 2


def shifted(spans: Iterable[Span], seconds: float) -> list[Span]:
    """The same, by a clock that is ``seconds`` ahead."""
    return [Span(span.track, span.name, span.start + seconds, span.end + seconds) for span in spans]
