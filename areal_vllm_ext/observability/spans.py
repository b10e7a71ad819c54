"""Spans of an update (what was done, from when to when) for ``EngineGroup.update(trace=...)``."""

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
    """Records the spans of one process by its monotonic clock. Safe to use from any thread.

    The first ``limit`` spans of each kind (a name's first word) are kept. Later ones are merged into one, from the first
    one's start to the last one's end. A ``limit`` of 0 records nothing.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._kept: dict[str, list[Span]] = {}
        self._merged: dict[str, tuple[int, Span]] = {}
        self._open: dict[Hashable, tuple[str, str, float]] = {}
        self._lock = threading.Lock()

    def add(self, track: str, name: str, start: float, end: float) -> None:
        """Record that ``name`` was done from ``start`` to ``end``, in the trace's row ``track``."""
        if not self.limit:
            return
        span, kind = Span(track, name, start, end), name.partition(" ")[0]
        with self._lock:
            kept = self._kept.setdefault(kind, [])
            if len(kept) < self.limit:
                kept.append(span)
            else:
                count, before = self._merged.get(kind, (0, span))
                merged = Span(before.track, "", min(before.start, start), max(before.end, end))
                self._merged[kind] = (count + 1, merged)

    def start(self, key: Hashable, track: str, name: str) -> None:
        """Begin the span ``name``, which ends with ``end(key)``."""
        if self.limit:
            with self._lock:
                self._open[key] = (track, name, monotonic())

    def end(self, key: Hashable) -> None:
        """End the span that was started as ``key``, if there is one."""
        if self.limit:
            with self._lock:
                started = self._open.pop(key, None)
            if started:
                self.add(*started, monotonic())

    @contextlib.contextmanager
    def span(self, track: str, name: str) -> Iterator[None]:
        """Record the body as the span ``name``."""
        key = object()
        self.start(key, track, name)
        try:
            yield
        finally:
            self.end(key)

    def each(self, track: str, name: str, items: Iterable[_T]) -> Iterator[_T]:
        """Yield ``items`` and record how long each took to make."""
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
        """Record that ``track`` is in ``state`` from now on. An empty state records nothing."""
        current = self._open.get(track)
        if state != (current[1] if current else ""):
            self.end(track)
            if state:
                self.start(track, track, state)

    def snapshot(self) -> tuple[Span, ...]:
        """Return all spans so far. Open spans are marked as not over and end now."""
        now = monotonic()
        with self._lock:
            spans = [span for kept in self._kept.values() for span in kept]
            for kind, (count, merged) in self._merged.items():
                spans.append(Span(merged.track, f"{kind}: {count} more", merged.start, merged.end))
            spans += [Span(track, f"{name} (not over)", start, now) for track, name, start in self._open.values()]
        return tuple(spans)


# Records nothing.
DISABLED = SpanRecorder()


def clock_offset(sent: float, received: float, answered: float, back: float) -> float:
    """Return how far another process's clock is behind this one's, in seconds.

    As in NTP, request and answer are assumed to take equally long, so the error is at most half of their sum. Processes of
    one host share a clock. So an offset of 0 is returned if the readings are possible on one clock; then the error is at most
    what request and answer took together.

    Args:
        sent: when this process sent the request, by its own clock.
        received: when the other process received it, by that process's clock.
        answered: when the other process answered, by that process's clock.
        back: when this process received the answer, by its own clock.
    """
    if sent <= received <= answered <= back:
        return 0.0
    return ((sent - received) + (back - answered)) / 2


def shifted(spans: Iterable[Span], seconds: float) -> list[Span]:
    """Return the spans by a clock that is ``seconds`` ahead."""
    return [Span(span.track, span.name, span.start + seconds, span.end + seconds) for span in spans]
