"""An engine's part in the trace of an update: its requests, its states, and what its workers recorded; no I/O.

Recorded from a Begin that asks for it until the next one.
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

# However long its caller would wait.
_LONGEST_SECONDS = 10.0


@dataclasses.dataclass(eq=False)
class _Asking:
    """Who wants a trace, since and until when, and what the workers have told."""

    caller: ReplyTo
    received: float
    ends: float
    told: dict[int, list[protocol.Span]] = dataclasses.field(default_factory=dict)


class Tracing:
    """Of one engine. All from the endpoint's thread, but ``spans`` takes them from any.

    Attributes:
        spans: of the update that was begun last.
    """

    def __init__(self, workers: int) -> None:
        self.spans = SpanRecorder()
        self._workers = workers
        self._update = ""
        self._asking: list[_Asking] = []

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a trace."""
        return bool(self._asking)

    def asked(self, caller: ReplyTo, message: ParticipantRequest, participant: Participant) -> None:
        """``participant`` has taken a request."""
        if isinstance(message, Begin) and participant.update is not None and participant.update.begin is message:
            self.spans, self._update = SpanRecorder(message.spans), message.update
        if self.spans.limit:
            name = message.step if isinstance(message, Bucket) else type(message).__name__.lower()
            self.spans.start(caller, "requests", name)

    def states(self, participant: Participant) -> None:
        """``participant`` may have changed its states."""
        if self.spans.limit:
            self.spans.set_state("update", participant.update_phase if participant.update_phase != "idle" else "")
            self.spans.set_state("generation", participant.generation if participant.generation != "running" else "")

    def answered(self, caller: ReplyTo) -> None:
        """A request was answered."""
        if self.spans.limit:
            self.spans.end(caller)

    def ask(self, caller: ReplyTo, message: GetTrace, now: float) -> list[Effect]:
        """Somebody wants the trace."""
        if not self.spans.limit or message.update != self._update:
            problem = f"no trace of update {message.update} was recorded here, or another update was begun since"
            return [Reply(caller, protocol.Error(kind="state", message=problem))]
        self._asking.append(_Asking(caller, now, now + min(message.timeout, _LONGEST_SECONDS)))
        return [Order(message)]

    def told(self, message: WorkerTrace, now: float) -> list[Effect]:
        """A worker has told what it did."""
        if message.update == self._update:
            for one in self._asking:
                offset = clock_offset(one.received, message.now, message.now, now)
                one.told[message.rank] = shifted(message.spans, offset)
        return self.tick(now)

    def tick(self, now: float) -> list[Effect]:
        """Answer whoever has waited long enough, or for all there is."""
        ready = [one for one in self._asking if len(one.told) == self._workers or now >= one.ends]
        self._asking = [one for one in self._asking if one not in ready]
        return [Reply(one.caller, self._trace(one, now)) for one in ready]

    def _trace(self, asking: _Asking, now: float) -> Trace:
        told = [span for _, spans in sorted(asking.told.items()) for span in spans]
        silent = tuple(sorted(set(range(self._workers)) - set(asking.told)))
        return Trace(received=asking.received, answered=now, spans=(*self.spans.snapshot(), *told), silent=silent)
