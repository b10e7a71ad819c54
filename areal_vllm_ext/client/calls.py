"""``group.call``: a method of the user's own worker extension on every worker of every engine, and its answers."""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import TYPE_CHECKING, Any

import msgspec

from .. import protocol
from ..errors import ArealError, RequestError, join
from ..protocol import method_names
from .options import LATE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..control.command import Commander
    from ..protocol import EngineInfo


@dataclasses.dataclass(frozen=True)
class WorkerAnswer:
    """What the method answered on one worker.

    Attributes:
        engine: the engine's name.
        rank: the worker's rank in its engine.
        value: what the method returned; None if it raised an exception.
        error_type: the name of the exception's class; empty if it raised none.
        error: its message.
    """

    engine: str
    replica: str
    dp_rank: int
    rank: int
    value: Any = None
    error_type: str = ""
    error: str = ""

    def __str__(self) -> str:
        said = f"{self.error_type}: {self.error}" if self.error_type else repr(self.value)
        return f"{self.engine}, worker {self.rank}: {said}"


class CallFailed(ArealError):
    """A call was not answered by every worker; the message names the engines, the ranks and the causes.

    Attributes:
        answers: a ``WorkerAnswer`` of each worker that did answer.
    """

    def __init__(self, message: str, answers: tuple[WorkerAnswer, ...] = ()) -> None:
        super().__init__(message)
        self.answers = answers


@dataclasses.dataclass(frozen=True)
class CallResult:
    """The answers of all workers, by replica, DP rank and worker rank.

    Attributes:
        answers: one of each worker.
    """

    method: str
    answers: tuple[WorkerAnswer, ...]

    @property
    def errors(self) -> tuple[WorkerAnswer, ...]:
        """The answers of the workers where the method raised an exception."""
        return tuple(answer for answer in self.answers if answer.error_type)

    @property
    def values(self) -> tuple[Any, ...]:
        """What the method returned, worker by worker.

        Raises:
            CallFailed: it raised an exception on a worker; the message names each.
        """
        if self.errors:
            raise CallFailed(f"{self.method} failed: {'; '.join(map(str, self.errors))}", self.answers)
        return tuple(answer.value for answer in self.answers)


def encode_arguments(method: object, arguments: Sequence[Any]) -> bytes:
    """Return the arguments of a call as msgpack.

    Raises:
        TypeError, ValueError: the name is no name, or msgpack cannot carry an argument.
        RequestError: a call must not reach this method.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be the name of a method, not {method!r}")
    if problem := method_names.refusal(method):
        raise RequestError("state", problem)
    for place, argument in enumerate(arguments):
        try:
            msgspec.msgpack.encode(argument)
        except Exception as error:
            raise TypeError(
                f"msgpack cannot carry argument {place} of {method}: {error}; give it None, bool, int of 64 bits, float, str, "
                "bytes, lists and dicts of these"
            ) from None
    return msgspec.msgpack.encode(list(arguments))


async def call(commander: Commander, method: str, arguments: bytes, timeout: float, *, lease: bool) -> CallResult:
    """Call ``method`` on every worker of every engine. See ``AsyncEngineGroup.call``."""
    ends = time.monotonic() + timeout
    if lease:
        async with commander.command("call", timeout) as targets:
            epochs = {name: target.epoch for name, target in targets.items()}
            engines = {name: target.engine for name, target in targets.items()}
            return await ask(commander, method, arguments, engines, epochs, ends)
    engines = await commander.engines(max(ends - time.monotonic(), 0.1))
    return await ask(commander, method, arguments, engines, {}, ends)


async def ask(
    commander: Commander,
    method: str,
    arguments: bytes | Mapping[str, bytes],
    engines: Mapping[str, EngineInfo],
    epochs: Mapping[str, int],
    ends: float,
) -> CallResult:
    """Ask ``engines`` at once. ``arguments``: of all, or by engine. ``epochs``: of the lease; empty without one.

    Raises:
        CallFailed: an engine did not answer in time, or could not ask its workers.
    """
    left = max(ends - time.monotonic(), 0.05)
    call = uuid.uuid4().hex
    requests = {
        name: (
            engine.address,
            protocol.Call(
                call=call,
                method=method,
                arguments=arguments if isinstance(arguments, bytes) else arguments[name],
                timeout=left,
                epoch=epochs.get(name),
            ),
        )
        for name, engine in engines.items()
    }
    outcomes = await commander.link.request_all(requests, left + LATE_SECONDS)
    answers: list[WorkerAnswer] = []
    problems: dict[str, str] = {}
    for name, outcome in outcomes.items():
        if isinstance(outcome, ArealError):
            problems[name] = str(outcome)
            continue
        assert isinstance(outcome, protocol.CallAnswers)
        answers += (_decoded(engines[name], answer) for answer in outcome.workers)
    answers.sort(key=lambda answer: (answer.replica, answer.dp_rank, answer.rank))
    if problems:
        raise CallFailed(f"{method} was not answered by every engine: {join(problems)}", tuple(answers))
    return CallResult(method, tuple(answers))


def _decoded(engine: EngineInfo, answer: protocol.CallAnswer) -> WorkerAnswer:
    value, error_type, error = None, answer.error_type, answer.error
    if not error_type:
        try:
            value = msgspec.msgpack.decode(answer.value)
        except Exception as problem:
            error_type, error = type(problem).__name__, f"the answer cannot be read: {problem}"
    return WorkerAnswer(engine.name, engine.replica, engine.dp_rank, answer.rank, value, error_type, error)
