"""The calls on the engine's loop: what ``Controller`` looks at before it pauses, resumes, commits or lets an engine sleep.

The real controller, participant and ``ForeignCalls``, over vLLM's methods of an engine without a model.
"""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from areal_vllm_ext.engine_core.adapters import Adapters
from areal_vllm_ext.engine_core.controller import Controller
from areal_vllm_ext.engine_core.effects import (
    CallCommit,
    CallCommitFetched,
    CallMethod,
    CallPause,
    CallResume,
    CallSleep,
    CallWakeUp,
    Effect,
    Reply,
)
from areal_vllm_ext.engine_core.foreign_calls import ForeignCalls
from areal_vllm_ext.engine_core.participant import Participant, ParticipantRequest
from areal_vllm_ext.engine_core.prefix_root import PrefixRoot
from areal_vllm_ext.observability.spans import SpanRecorder
from areal_vllm_ext.protocol import (
    Ack,
    Answer,
    Begin,
    Commit,
    Disk,
    Error,
    Pause,
    Prepare,
    Resume,
    Sender,
    ServedAdapter,
    Sleep,
    WakeUp,
    WorkerDone,
)
from areal_vllm_ext.protocol.peer_messages import ReadPacked
from areal_vllm_ext.protocol.server import ReplyTo

if TYPE_CHECKING:
    from collections.abc import Callable


class Executor:
    """vLLM's executor of one worker; ``done`` is what it did."""

    def __init__(self) -> None:
        self.sleeping_tags: set[str] = set()
        self.done: list[str] = []

    def sleep(self, level: int) -> None:
        self.done.append(f"sleep {level}")
        self.sleeping_tags |= {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> None:
        if self.sleeping_tags:
            self.done.append("wake up")
        self.sleeping_tags -= set(tags)

    def reset_encoder_cache(self) -> None:
        pass


class Engine:
    """vLLM's EngineCore without a model."""

    def __init__(self) -> None:
        self.paused = False
        self.model_executor = Executor()
        self.scheduler = SimpleNamespace(reset_encoder_cache=lambda: None, requests={})
        self.request_block_hasher = None
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True), lora_config=None)

    def pause_scheduler(self, mode: str = "abort", *, clear_cache: bool = True) -> None:
        self.paused = True

    def resume_scheduler(self) -> None:
        self.paused = False

    def is_scheduler_paused(self) -> bool:
        return self.paused

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.paused = True
        self.model_executor.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.model_executor.wake_up(tags or ["weights", "kv_cache"])
        return True

    def reset_prefix_cache(self, *, reset_running_requests: bool, reset_connector: bool) -> bool:
        return True

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.model_executor.done.append(method)
        return [7] if method == "areal_free_memory" else [("", "")]


class Rig:
    """An engine whose loop runs each call when ``step`` is called, so that calls of other users can come before."""

    def __init__(self) -> None:
        self.participant = Participant("v0", frozenset({0}))
        self.engine = Engine()
        self.loop: list[Callable[[], None]] = []
        self.answers: dict[int, Answer] = {}
        self._numbers = itertools.count()
        controller = Controller.__new__(Controller)  # its endpoint would need sockets, and its engine a model
        controller._engine, controller._run_on_loop = self.engine, self.loop.append
        controller._idle_callback, controller._calls, controller._call_ids = None, {}, itertools.count()
        controller._prefix_root = PrefixRoot(self.engine)
        controller._foreign = ForeignCalls(self.engine, lambda event: self.take(event(self.participant)), can_wait=True)
        controller._adapters = Adapters(self.engine)
        controller.endpoint = SimpleNamespace(  # type: ignore[assignment]
            post=lambda event: self.take(event()),
            participant=self.participant,
            tracing=SimpleNamespace(spans=SpanRecorder(0)),
        )
        self.controller = controller

    def ask(self, message: ParticipantRequest) -> int:
        number = next(self._numbers)
        self.take(self.participant.handle(ReplyTo(b"p", number.to_bytes(16, "big")), message, 0.0))
        return number

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply():
                    self.answers[int.from_bytes(effect.caller.request_id, "big")] = effect.answer
                case CallPause():
                    self.controller.pause(effect)
                case CallResume():
                    self.controller.resume(effect)
                case CallCommit():
                    self.controller.commit(effect)
                case CallSleep() | CallWakeUp():
                    self.controller.change_sleep(effect)

    def step(self) -> None:
        while self.loop:
            self.loop.pop(0)()

    def refusal(self, number: int) -> str:
        answer = self.answers[number]
        assert isinstance(answer, Error), answer
        return answer.message

    def pause(self, update: str = "") -> None:
        asked = self.ask(Pause(epoch=1, mode="keep", kv="recompute", timeout=9.0, update=update))
        self.step()
        assert self.answers[asked] == Ack()

    def prepare(self) -> None:
        sender = Sender(transfer=Disk(path="/"))
        self.ask(Begin(epoch=1, update="u", version="v1", senders={0: sender}, timeout=60.0))
        for step in ("begin", "prepare"):
            self.ask(Prepare(epoch=1, update="u", buckets={0: 0}))
            self.take(self.participant.worker_done(WorkerDone(update="u", rank=0, step=step, manifest="m")))


@pytest.mark.parametrize(
    ("kv", "update", "root"), [("recompute", "u", "u"), ("keep", "u", "u"), ("reuse", "u", ""), ("recompute", "", "")]
)
def test_an_update_moves_the_root_of_the_prefix_cache_before_it_commits(kv: Any, update: str, root: str) -> None:
    rig = Rig()
    rig.prepare()
    rig.ask(Pause(epoch=1, mode="keep", kv=kv, timeout=9.0, update=update))
    assert rig.controller._prefix_root.root == ""
    rig.step()
    assert rig.controller._prefix_root.root == root


def test_a_pause_and_a_resume() -> None:
    rig = Rig()
    rig.pause()
    assert rig.engine.paused
    asked = rig.ask(Resume(epoch=1))
    rig.step()
    assert rig.answers[asked] == Ack()
    assert not rig.engine.paused


def test_a_resume_that_was_decided_before_the_weights_were_discarded_is_not_carried_out() -> None:
    rig = Rig()
    rig.pause()
    asked = rig.ask(Resume(epoch=1))
    rig.engine.sleep(2)
    rig.engine.wake_up()
    rig.step()
    assert "not resumed: vLLM's sleep level 2 discarded its weights; send an update" in rig.refusal(asked)
    assert rig.engine.paused
    assert rig.participant.generation == "paused"


def test_an_update_brings_discarded_weights_back() -> None:
    rig = Rig()
    rig.pause()
    rig.engine.sleep(2)
    rig.engine.wake_up()
    rig.prepare()
    rig.pause("u")
    committed = rig.ask(Commit(epoch=1, update="u"))
    rig.step()
    assert isinstance(rig.answers[committed], Ack)
    asked = rig.ask(Resume(epoch=1))
    rig.step()
    assert rig.answers[asked] == Ack()
    assert not rig.engine.paused


def test_a_users_resume_that_meets_an_engine_asleep_says_so() -> None:
    rig = Rig()
    rig.pause()
    asked = rig.ask(Resume(epoch=1))
    rig.engine.sleep(1)
    rig.step()
    assert "this engine sleeps (vLLM's sleep mode): wake it up instead" in rig.refusal(asked)
    assert rig.engine.paused


@pytest.mark.parametrize("why", ["paused", "asleep", "asleep, past every interface"])
def test_an_updates_resume_leaves_an_engine_alone_that_another_user_paused_or_put_to_sleep(why: str) -> None:
    rig = Rig()
    rig.prepare()
    rig.pause("u")
    rig.ask(Commit(epoch=1, update="u"))
    rig.step()
    asked = rig.ask(Resume(epoch=1, update="u"))
    if why == "paused":
        rig.engine.pause_scheduler("keep")
    elif why == "asleep":
        rig.engine.sleep(1)
    else:
        rig.engine.model_executor.sleep(1)
    rig.step()
    assert rig.answers[asked] == Ack()
    assert rig.engine.paused
    assert rig.participant.generation == "paused"


def test_no_commit_on_an_engine_that_runs() -> None:
    rig = Rig()
    rig.prepare()
    rig.pause("u")
    asked = rig.ask(Commit(epoch=1, update="u"))
    rig.engine.paused = False  # past every interface
    rig.step()
    assert "another user has resumed it, past vLLM's own interfaces" in rig.refusal(asked)
    assert "areal_commit" not in rig.engine.model_executor.done


def test_an_engine_that_runs_does_not_fall_asleep() -> None:
    rig = Rig()
    rig.pause()
    asked = rig.ask(Sleep(epoch=1, level=1, timeout=time.monotonic() + 60.0))
    rig.engine.resume_scheduler()
    rig.step()
    assert "the engine runs: another user has resumed it" in rig.refusal(asked)
    assert rig.engine.model_executor.done == []
    assert rig.participant.sleep.state == "awake"


def test_a_sleep_that_the_loop_came_to_too_late_does_nothing() -> None:
    rig = Rig()
    rig.pause()
    asked = rig.ask(Sleep(epoch=1, level=1, timeout=time.monotonic() - 60.0))
    rig.step()
    assert "its time was over when the engine's loop came to it" in rig.refusal(asked)
    assert rig.engine.model_executor.done == []


def test_a_method_whose_caller_has_given_up_is_not_called() -> None:
    rig = Rig()
    late = time.monotonic() - 1.0
    rig.controller.call_method(CallMethod(call="c", method="m", arguments=b"", ends=late, longest_answer=9))
    rig.step()
    assert rig.engine.model_executor.done == []


@pytest.mark.parametrize(("paused", "discarded"), [(True, ""), (False, "vLLM's sleep level 2 discarded its weights")])
def test_a_late_pause_is_not_taken_back_where_another_user_needs_it(paused: bool, discarded: str) -> None:
    rig = Rig()
    rig.engine.scheduler.set_pause_state = lambda state: pytest.fail(f"the engine is {state}")
    rig.controller._idle_callback = callback = lambda: None
    rig.engine._idle_state_callbacks = [callback]  # type: ignore[attr-defined]
    rig.controller._foreign.paused, rig.controller._foreign.discarded = paused, discarded
    rig.controller.cancel_pause(1)
    rig.step()
    assert rig.engine._idle_state_callbacks == [callback]  # type: ignore[attr-defined]


def test_a_sleep_that_failed_on_a_worker_is_woken_up() -> None:
    """vLLM does not note such a sleep, and would wake no worker up."""
    rig = Rig()
    rig.pause()
    rig.engine.model_executor.sleep = lambda _: rig.engine.collective_rpc("")[9]  # type: ignore[assignment]
    end = time.monotonic() + 60.0
    asked = rig.ask(Sleep(epoch=1, level=1, timeout=end))
    rig.step()
    assert "IndexError" in rig.refusal(asked)
    again = rig.ask(Sleep(epoch=1, level=1, timeout=end))
    assert "not every worker of this engine fell asleep (IndexError" in rig.refusal(again)
    woken = rig.ask(WakeUp(epoch=1, timeout=end))
    rig.step()
    assert rig.answers[woken] == Ack()
    assert "wake up" in rig.engine.model_executor.done


@pytest.mark.parametrize("paused", [True, False])
def test_what_was_fetched_becomes_live_on_a_paused_engine_only(paused: bool) -> None:
    rig = Rig()
    errors: list[str] = []
    rig.controller.endpoint.peering = SimpleNamespace(  # type: ignore[assignment]
        returning=SimpleNamespace(committed=lambda error, _, **__: errors.append(error) or [])
    )
    versions: list[str] = []
    rig.engine.set_weight_version = versions.append  # type: ignore[attr-defined]
    rig.engine.paused = paused
    adapters = {"math": ServedAdapter(version="v3", manifest="m")}
    rig.controller.commit_fetched(CallCommitFetched("fetch", "v7", "u7", adapters))
    rig.step()
    if paused:
        assert errors == [""]
        assert rig.engine.model_executor.done == ["areal_commit_fetched"]
        assert versions == ["v7"]
        assert rig.controller._adapters.versions == {"math": "v3"}
        assert rig.controller._prefix_root.root == "u7", "no request uses keys and values of other weights"
    else:
        assert "the engine runs" in errors[0]
        assert rig.engine.model_executor.done == []


def test_fetched_weights_touch_no_engine_that_another_user_has_put_to_sleep() -> None:
    rig = Rig()
    said: list[tuple[str, bool]] = []
    rig.controller.endpoint.peering = SimpleNamespace(  # type: ignore[assignment]
        returning=SimpleNamespace(committed=lambda error, _, *, touched: said.append((error, touched)) or [])
    )
    rig.engine.paused = True
    rig.engine.model_executor.sleeping_tags = {"weights"}
    rig.controller.commit_fetched(CallCommitFetched("fetch", "v7", "u7", {}))
    rig.step()
    assert said == [("RuntimeError: another user has put this engine to sleep", False)]
    assert rig.engine.model_executor.done == []


def test_a_packed_weight_is_read_on_the_loop() -> None:
    rig = Rig()
    rig.controller.read_packed(ReadPacked(fetch="fetch", rank=0, layer="lm_head", start=0, count=1))
    assert rig.engine.model_executor.done == []
    rig.step()
    assert rig.engine.model_executor.done == ["areal_read_packed"]
