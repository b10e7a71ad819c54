"""Calls of the user's own methods: which ones run, who waits for them, and what they answered. No I/O, no clock."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..protocol import Answer, Call, CallAnswers, Error
from .effects import CallMethod, Effect, Reply

if TYPE_CHECKING:
    from ..protocol import CallAnswer
    from ..protocol.server import ReplyTo

# Calls that an engine knows of at once, answered or not: until its time is over, a call may be asked for again.
_MOST_CALLS = 4096
# Answers that are kept for repetitions, in bytes.
_KEPT_BYTES = 64 << 20


@dataclasses.dataclass
class _Call:
    """A call until its time is over: who waits for it, and its answer with the bytes that this takes."""

    ends: float
    waiting: list[ReplyTo]
    answer: Answer | None = None
    nbytes: int = 0


class UserCalls:
    """The calls of one engine. Each is carried out once, also where its request is repeated."""

    def __init__(self, workers: frozenset[int], max_message_bytes: int) -> None:
        """
        Args:
            workers: the ranks that answer.
            max_message_bytes: the longest answer of all workers together.
        """
        self._longest_answer = max_message_bytes // max(len(workers), 1)
        self._calls: dict[str, _Call] = {}

    @property
    def waiting(self) -> bool:
        """True if a call has a deadline to keep."""
        return any(call.answer is None for call in self._calls.values())

    def knows(self, call: str) -> bool:
        """Return whether a call of this name was asked for before."""
        return call in self._calls

    def ask(self, caller: ReplyTo, message: Call, now: float) -> list[Effect]:
        """Carry out a call; ``caller`` is answered when every worker has answered, or when its time is over."""
        if (known := self._calls.get(message.call)) is not None:
            if known.answer is not None:
                return [Reply(caller, known.answer)]
            known.waiting.append(caller)
            return []
        if len(self._calls) >= _MOST_CALLS:
            return [Reply(caller, Error(kind="busy", message=f"{_MOST_CALLS} calls are in progress; call again later"))]
        call = self._calls[message.call] = _Call(now + message.timeout, [caller])
        return [CallMethod(message.call, message.method, message.arguments, call.ends, self._longest_answer)]

    def done(self, name: str, answers: tuple[CallAnswer, ...], error: str = "") -> list[Effect]:
        """Take the answers of all workers, or the reason why the engine could not ask them."""
        if (call := self._calls.get(name)) is None or call.answer is not None:
            return []  # its time was over
        call.nbytes = sum(len(one.value) + len(one.error) for one in answers)
        return self._answer(call, Error(kind="failed", message=error) if error else CallAnswers(workers=answers))

    def tick(self, now: float) -> list[Effect]:
        """Answer the calls whose time is over, and forget them."""
        effects: list[Effect] = []
        for name, call in [(name, call) for name, call in self._calls.items() if now >= call.ends]:
            del self._calls[name]
            effects += self._answer(
                call,
                Error(
                    kind="timeout",
                    message="its workers did not answer the call in time; an engine that runs a long step or another call "
                    "answers later: raise the timeout",
                ),
            )
        return effects

    def _answer(self, call: _Call, answer: Answer) -> list[Effect]:
        call.answer = answer
        callers, call.waiting = call.waiting, []
        kept = sum(one.nbytes for one in self._calls.values())
        for one in self._calls.values():  # the oldest first
            if kept <= _KEPT_BYTES:
                break
            if one.nbytes and one is not call:
                kept -= one.nbytes
                one.nbytes = 0
                one.answer = Error(
                    kind="state", message="the call was carried out, and its answer is not kept any more"
                )
        return [Reply(caller, answer) for caller in callers]
