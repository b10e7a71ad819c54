"""An engine's part in the trace of an update: its requests, its states, and what its workers recorded. No I/O.

Recording starts with a Begin that asks for a trace and ends with the next Begin.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .. import protocol
from ..observability.spans import SpanRecorder, clock_offset, shifted
from ..protocol import Begin, Bucket, GetTrace, Trace, WorkerTrace
from .effects import Order, Reply

if TYPE_CHECKING:
    from ..protocol.server import ReplyTo
    from .effects import Effect
    from .participant import Participant, ParticipantRequest

# Upper bound of a caller's wait for silent workers.
_LONGEST_SECONDS = 10.0


@dataclasses.dataclass(eq=False)
class _Asking:
    """Who asked for a trace, from when to when, and the spans of each worker that answered."""

    caller: ReplyTo
    received: float
    ends: float
    spans: dict[int, list[protocol.Span]] = dataclasses.field(default_factory=dict)


class Tracing:
    """The trace of one engine. Used from the endpoint's thread; ``spans`` records from any thread.

    Attributes:
        spans: of the update that began last.
    """

    def __init__(self, workers: frozenset[int]) -> None:
        self.spans = SpanRecorder()
        self._workers = workers
        self._update = ""
        self._asking: list[_Asking] = []

    @property
    def waiting(self) -> bool:
        """True if a client waits for a trace."""
        return bool(self._asking)

    def asked(self, caller: ReplyTo, message: ParticipantRequest, participant: Participant) -> None:
        """Record that ``participant`` took a request."""
        if isinstance(message, Begin) and participant.update is not None and participant.update.begin is message:
            self.spans, self._update = SpanRecorder(message.spans), message.update
        if self.spans.limit:
            name = message.step if isinstance(message, Bucket) else type(message).__name__.lower()
            self.spans.start(caller, "requests", name)

    def states(self, participant: Participant) -> None:
        """Record the states of ``participant``."""
        if self.spans.limit:
            self.spans.set_state("update", participant.update_phase if participant.update_phase != "idle" else "")
            self.spans.set_state("generation", participant.generation if participant.generation != "running" else "")

    def answered(self, caller: ReplyTo) -> None:
        """Record that a request was answered."""
        if self.spans.limit:
            self.spans.end(caller)

    def ask(self, caller: ReplyTo, message: GetTrace, now: float) -> list[Effect]:
        """Ask the workers for their spans; ``caller`` gets the trace when all have answered."""
        if not self.spans.limit or message.update != self._update:
            problem = f"no trace of update {message.update} was recorded here, or another update has begun since"
            return [Reply(caller, protocol.Error(kind="state", message=problem))]
        self._asking.append(_Asking(caller, now, now + min(message.timeout, _LONGEST_SECONDS)))
        return [Order(message)]

    def worker_trace(self, message: WorkerTrace, now: float) -> list[Effect]:
        """Take a worker's spans."""
        if message.update == self._update:
            for one in self._asking:
                offset = clock_offset(one.received, message.now, message.now, now)
                one.spans[message.rank] = shifted(message.spans, offset)
        return self.tick(now)

    def tick(self, now: float) -> list[Effect]:
        """Answer those whose workers have all answered, or whose time is over."""
        ready = [one for one in self._asking if len(one.spans) == len(self._workers) or now >= one.ends]
        self._asking = [one for one in self._asking if one not in ready]
        return [Reply(one.caller, self._trace(one, now)) for one in ready]

    def _trace(self, asking: _Asking, now: float) -> Trace:
        recorded = [span for _, spans in sorted(asking.spans.items()) for span in spans]
        silent = tuple(sorted(self._workers - set(asking.spans)))
        return Trace(received=asking.received, answered=now, spans=(*self.spans.snapshot(), *recorded), silent=silent)
