"""Calls of the user's own methods: on every worker, once, in time, and on no other method of a worker."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from waiting import eventually

from areal_vllm_ext import AsyncEngineGroup, CallFailed, EngineGroup, EnginesMissing, RequestError
from areal_vllm_ext.cli import main
from areal_vllm_ext.config import Settings
from areal_vllm_ext.engine_core.effects import CallMethod, Effect, Reply
from areal_vllm_ext.engine_core.user_calls import UserCalls
from areal_vllm_ext.protocol import Call, CallAnswer, CallAnswers, Error, security
from areal_vllm_ext.protocol.server import ReplyTo
from areal_vllm_ext.worker import user_methods
from areal_vllm_ext.worker.extension import WorkerExtension
from harness.simulated_engine import NEVER, Deployment, Shape, deployed

WORKERS = 2


class Extension(WorkerExtension):
    """What a user writes."""

    attribute = 3

    def where(self: Any, *arguments: Any) -> dict[str, Any]:
        return {"worker": self.name, "arguments": arguments}

    def fails(self, on: str) -> None:
        if self.name == on:  # type: ignore[attr-defined]
            raise ValueError(f"not on {on} \ud800")

    def exits(self) -> None:
        sys.exit("enough")

    def returns(self, kind: str) -> Any:
        return {"object": object(), "long": b"x" * (1 << 20), "keys": {1: "a", "b": 2.5, "none": None}}[kind]

    def _private(self) -> None:
        raise AssertionError


class Worker(Extension):
    """vLLM's worker, into which vLLM mixes the extension."""

    def __init__(self, name: str) -> None:
        self.name = name
        parallel = SimpleNamespace(worker_extension_cls=f"{__name__}.Extension")
        self.vllm_config = SimpleNamespace(parallel_config=parallel)

    def execute_dummy_batch(self) -> None:
        raise AssertionError("vLLM's own")


@pytest.fixture(scope="module")
def deployment(key: security.ClusterKey) -> Iterator[Deployment]:
    with deployed(key, 2, shape=Shape(workers=WORKERS, settings=Settings(max_message_mib=1))) as engines:
        for number, engine in engines.engines.items():
            workers = [Worker(f"{number}.{rank}") for rank in range(WORKERS)]

            def method(rank: int, effect: CallMethod, workers: list[Worker] = workers) -> tuple[bytes, str, str]:
                return user_methods.call(workers[rank], effect.method, effect.arguments, effect.longest_answer)

            engine.method = method
        engines.wait_attached()
        yield engines


@pytest.fixture
def group(deployment: Deployment, key_file: Path) -> Iterator[EngineGroup]:
    with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
        client.wait_ready(2, 20)
        yield client
    for engine in deployment.engines.values():
        engine.seconds.clear()
        engine.errors.clear()


def test_every_worker_of_every_engine_answers(group: EngineGroup) -> None:
    result = group.call("where", 1, "two", [None, 3.5], {"four": b"5"})
    assert [(answer.dp_rank, answer.rank) for answer in result.answers] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [value["worker"] for value in result.values] == ["0.0", "0.1", "1.0", "1.1"]
    assert {str(value["arguments"]) for value in result.values} == {str([1, "two", [None, 3.5], {"four": b"5"}])}
    assert not result.errors
    assert group.call("returns", "keys").values[0] == {1: "a", "b": 2.5, "none": None}


def test_an_exception_is_an_answer_and_names_its_worker(group: EngineGroup) -> None:
    result = group.call("fails", "1.0")
    (error,) = result.errors
    assert (error.dp_rank, error.rank, error.error_type) == (1, 0, "ValueError")
    assert error.error == "not on 1.0 \\ud800"
    with pytest.raises(CallFailed, match=r"fails failed: DP rank 1 of .*, worker 0: ValueError: not on 1\.0"):
        result.values  # noqa: B018
    assert {answer.error_type for answer in group.call("exits").answers} == {"SystemExit"}
    assert group.call("where").values, "the engines are there"


@pytest.mark.parametrize(
    ("kind", "error"),
    [("object", "msgpack cannot carry what returns returned"), ("long", "has 1.0 MiB, and 0.5 is the most")],
)
def test_an_answer_that_cannot_travel_is_an_error_of_its_rank(group: EngineGroup, kind: str, error: str) -> None:
    result = group.call("returns", kind)
    assert len(result.errors) == 2 * WORKERS
    assert error in result.errors[0].error


@pytest.mark.parametrize("argument", [object(), 2**64, "\ud800", {1, 2j}, [[object()]]])
def test_an_argument_that_cannot_travel_is_refused_before_anything_is_sent(
    deployment: Deployment, group: EngineGroup, argument: Any
) -> None:
    before = list(deployment.engines[0].calls)
    with pytest.raises(TypeError, match="msgpack cannot carry argument 1 of where") as raised:
        group.call("where", 1, argument)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="AREAL_VLLM_MAX_MESSAGE_MIB"):
        group.call("where", b"x" * (20 << 20))
    assert deployment.engines[0].calls == before


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("_private", "private"),
        ("__init__", "private"),
        ("areal_commit", "belongs to areal_vllm_ext"),
        ("reload_weights", r"use group\.update_weights"),
        ("load_model", r"use group\.update_weights"),
        ("sleep", r"use group\.sleep"),
        ("wake_up", r"use group\.sleep"),
        ("where.__globals__", "no name of a method"),
    ],
)
def test_methods_that_are_not_the_users_are_refused(
    deployment: Deployment, group: EngineGroup, method: str, instead: str
) -> None:
    before = list(deployment.engines[0].calls)
    with pytest.raises(RequestError, match=instead):
        group.call(method)
    assert deployment.engines[0].calls == before
    answer = user_methods.call(Worker("w"), method, msgspec.msgpack.encode([]), 100)
    assert answer[1] == "LookupError", "also where another client asks"


@pytest.mark.parametrize("method", ["execute_dummy_batch", "attribute", "missing"])
def test_only_methods_of_the_extension_are_reached(group: EngineGroup, method: str) -> None:
    result = group.call(method)
    assert {error.error_type for error in result.errors} == {"LookupError"}
    assert f"Extension has no method {method} (its methods are exits, fails, returns, where)" in result.errors[0].error


def test_a_method_that_blocks_ends_the_call_in_time(deployment: Deployment, group: EngineGroup) -> None:
    deployment.engines[1].seconds["call"] = NEVER
    started = time.monotonic()
    with pytest.raises(CallFailed, match=r"DP rank 1 of .* did not answer the call in time") as failed:
        group.call("where", timeout=0.5)
    assert 0.4 < time.monotonic() - started < 1.5
    assert "DP rank 0" not in str(failed.value)
    assert [answer.dp_rank for answer in failed.value.answers] == [0, 0], "the others' answers are there"
    deployment.engines[1].seconds["call"] = 0
    assert len(group.call("where").answers) == 2 * WORKERS


def test_a_call_without_the_lease_runs_beside_other_commands(deployment: Deployment, key_file: Path) -> None:
    async def run() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            deployment.engines[0].seconds["pause"] = 3
            pausing = asyncio.create_task(client.pause(timeout=10))
            await asyncio.to_thread(eventually, lambda: "pause keep" in deployment.engines[0].calls)
            with pytest.raises(RequestError, match="was not started in time"):
                await client.call("where", timeout=0.3)
            assert (await client.call("where", timeout=1, lease=False)).values
            await pausing
            await client.resume()

    asyncio.run(run())
    deployment.engines[0].seconds.clear()


def test_a_call_under_a_lost_lease_is_refused(deployment: Deployment, group: EngineGroup, key_file: Path) -> None:
    group.call("where")  # raises the epoch
    engine = deployment.engines[0]
    before = list(engine.calls)

    async def late() -> None:
        async with AsyncEngineGroup.connect(deployment.directory, key_file=key_file) as client:
            message = Call(call="late", method="where", arguments=b"\x90", timeout=1.0, epoch=0)
            await client._link.request(engine.endpoint.address, message, 5.0)

    with pytest.raises(RequestError, match="a newer client") as refused:
        asyncio.run(late())
    assert refused.value.kind == "fenced"
    assert engine.calls == before


def test_a_call_needs_every_engine(key: security.ClusterKey, key_file: Path) -> None:
    with (
        deployed(key, 1, shape=Shape(dp_size=2)) as engines,
        EngineGroup.connect(engines.directory, key_file=key_file) as client,
    ):
        engines.wait_attached()
        eventually(lambda: len(client.engines()) == 1)
        for lease in (True, False):
            with pytest.raises(EnginesMissing, match="DP rank 1"):
                client.call("where", timeout=2, lease=lease)
        assert engines.engines[0].calls == []


def test_the_command_line_calls_and_says_who_failed(
    deployment: Deployment, group: EngineGroup, key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--connect", deployment.directory, "--key-file", os.fspath(key_file)]
    assert main(["call", "where", "1", '["a"]', "text", *where, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [answer["value"]["worker"] for answer in answers] == ["0.0", "0.1", "1.0", "1.1"]
    assert answers[0]["value"]["arguments"] == [1, ["a"], "text"]
    assert main(["call", "fails", '"0.1"', *where]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * WORKERS
    assert "worker 1: ValueError: not on 0.1" in lines[1]
    assert main(["call", "reload_weights", *where]) == 1
    assert "use group.update_weights(...)" in capsys.readouterr().err


# The machine without I/O


def ask(calls: UserCalls, number: int, name: str = "c", now: float = 0.0) -> list[Effect]:
    return calls.ask(ReplyTo(b"p", bytes([number])), Call(call=name, method="m", arguments=b"", timeout=5.0), now)


def test_a_repeated_call_runs_once() -> None:
    calls = UserCalls(frozenset({0}), 100)
    assert ask(calls, 1) == [CallMethod("c", "m", b"", 5.0, 100)]
    assert ask(calls, 2) == []
    answer = CallAnswers(workers=(CallAnswer(0, b"v"),))
    assert calls.done("c", answer.workers) == [Reply(ReplyTo(b"p", bytes([n])), answer) for n in (1, 2)]
    assert not calls.waiting
    assert ask(calls, 3, now=4.9) == [Reply(ReplyTo(b"p", b"\3"), answer)]


def test_an_answer_after_the_deadline_is_dropped() -> None:
    calls = UserCalls(frozenset({0}), 100)
    ask(calls, 1)
    assert calls.tick(4.9) == []
    (effect,) = calls.tick(5.0)
    assert isinstance(effect, Reply)
    assert isinstance(effect.answer, Error)
    assert effect.answer.kind == "timeout"
    assert calls.done("c", ()) == []


def test_what_is_kept_for_repetitions_is_bounded() -> None:
    calls = UserCalls(frozenset({0}), 100)
    for number in range(5):
        ask(calls, number, str(number))
        calls.done(str(number), (CallAnswer(0, bytes(20 << 20)),))
    (effect,) = ask(calls, 9, "0")
    assert isinstance(effect, Reply)
    assert isinstance(effect.answer, Error), "not run again, although its answer is gone"
    (effect,) = ask(calls, 9, "4")
    assert isinstance(effect, Reply)
    assert isinstance(effect.answer, CallAnswers)
