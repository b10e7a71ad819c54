"""Other users of the engine: what vLLM's own pause, resume, sleep and reload do beside updates of this package.

The real participant and the real ``ForeignCalls``, over vLLM's methods of an engine without a model.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from engine_infos import engine_info

from areal_vllm_ext.engine_core.effects import CallCommit, CallPause, CallResume, Effect, Order, Reply
from areal_vllm_ext.engine_core.foreign_calls import ForeignCalls
from areal_vllm_ext.engine_core.participant import Participant, ParticipantRequest
from areal_vllm_ext.engine_core.status import guard_of, status_of
from areal_vllm_ext.protocol import (
    Abort,
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
    Status,
    WeightsMismatch,
    WorkerDone,
)
from areal_vllm_ext.protocol.server import ReplyTo


class Scheduler:
    """vLLM's methods on an engine without a model; ``done`` is what they did, in order."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.paused = False
        self.sleeping: Future[Any] | None = None
        self.model_executor = SimpleNamespace(sleeping_tags=set())

    def pause_scheduler(self, mode: str = "abort") -> None:
        self.done.append(f"pause {mode}")
        self.paused = True

    def resume_scheduler(self) -> None:
        self.done.append("resume")
        self.paused = False

    def is_scheduler_paused(self) -> bool:
        return self.paused

    def sleep(self, level: int = 1, mode: str = "abort") -> Future[Any] | None:
        self.pause_scheduler(mode)
        if level:
            self.model_executor.sleeping_tags |= {"weights", "kv_cache"}
        return None

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.model_executor.sleeping_tags -= set(tags or ("weights", "kv_cache"))
        if awake := not self.model_executor.sleeping_tags:
            self.resume_scheduler()
        return awake

    def collective_rpc(self, method: str) -> list[str]:
        self.done.append(method)
        return [method]

    def set_weight_version(self, weight_version: str) -> None:
        self.done.append(f"version {weight_version}")


class Rig:
    """An engine: participant, foreign calls, and a loop that carries out every call at once."""

    def __init__(self, *, can_wait: bool = True) -> None:
        self.participant = Participant("v0", frozenset({0}))
        self.vllm = Scheduler()
        self.foreign = ForeignCalls(self.vllm, lambda event: self.take(event(self.participant)), can_wait=can_wait)
        self.answers: dict[ReplyTo, Answer] = {}
        self.calls: list[Effect] = []
        self._numbers = itertools.count()

    def ask(self, message: ParticipantRequest) -> Answer | None:
        caller = ReplyTo(b"peer", str(next(self._numbers)).encode())
        self.take(self.participant.handle(caller, message, 0.0))
        return self.answers.get(caller)

    def take(self, effects: list[Effect]) -> None:
        self.foreign.guard(guard_of(self.participant))
        for effect in effects:
            if isinstance(effect, Reply):
                self.answers[effect.caller] = effect.answer
            elif not isinstance(effect, Order):
                self.calls.append(effect)
                self.carry_out(effect)

    def carry_out(self, call: Effect) -> None:
        """As ``Controller`` does."""
        pauses = self.participant.pauses
        with self.foreign.ours():
            match call:
                case CallPause():
                    self.vllm.pause_scheduler(call.mode)
                    self.foreign.paused = self.foreign.paused or call.users
                    self.take(pauses.pause_done(call.call, ""))
                case CallResume():
                    self.foreign.paused = self.foreign.paused and not call.lifts
                    if not self.foreign.paused:
                        self.vllm.resume_scheduler()
                    self.take(pauses.resume_done(call.call, "", paused=self.foreign.paused))
                case CallCommit():
                    self.take(self.participant.commit_done("", 0.0))

    def status(self) -> Status:
        return status_of(self.participant, engine_info(), scheduler_paused=self.vllm.paused)

    def begin(self) -> Answer | None:
        message = Begin(epoch=1, update="u", version="v1", senders={0: Sender(transfer=Disk(path="/"))}, timeout=60.0)
        answer = self.ask(message)
        self.worker("begin")
        return answer

    def worker(self, step: str, manifest: str = "m") -> None:
        self.take(self.participant.worker_done(WorkerDone(update="u", rank=0, step=step, manifest=manifest)))

    def prepare(self) -> None:
        self.begin()
        self.ask(Prepare(epoch=1, update="u", buckets={0: 0}))
        self.worker("prepare")

    def pause_for_update(self) -> Answer | None:
        return self.ask(Pause(epoch=1, mode="keep", kv="recompute", timeout=9.0, update="u"))

    def update(self) -> None:
        self.prepare()
        assert self.pause_for_update() == Ack()
        assert self.ask(Commit(epoch=1, update="u")) == Ack()
        assert self.ask(Resume(epoch=1, update="u")) == Ack()


def test_who_had_paused_by_vllms_own_call_is_paused_after_an_update() -> None:
    rig = Rig()
    rig.vllm.pause_scheduler("abort")
    assert (rig.status().generation, rig.status().paused_for) == ("paused", "")
    rig.update()
    assert (rig.vllm.paused, rig.participant.generation, rig.status().version) == (True, "paused", "v1")
    rig.vllm.resume_scheduler()
    assert (rig.vllm.paused, rig.status().generation) == (False, "running")


def test_a_pause_that_ran_before_the_guard_was_set_outlasts_the_update_too() -> None:
    """Its report and the update's pause cross: the engine's loop has the last word."""
    rig = Rig()
    rig.prepare()
    report = rig.foreign._report
    late: list[Any] = []
    rig.foreign._report = late.append
    rig.vllm.pause_scheduler("abort")
    rig.foreign._report = report
    assert rig.pause_for_update() == Ack()
    rig.ask(Commit(epoch=1, update="u"))
    assert rig.ask(Resume(epoch=1, update="u")) == Ack()
    assert (rig.vllm.paused, rig.status().generation) == (True, "paused")
    for event in late:
        rig.take(event(rig.participant))
    assert rig.status().paused_for == ""
    assert rig.ask(Resume(epoch=1)) == Ack()
    assert not rig.vllm.paused, "a user's resume ends every pause"


def test_a_resume_by_vllms_own_call_ends_a_users_pause_and_status_says_so() -> None:
    rig = Rig()
    rig.ask(Pause(epoch=1, mode="keep", kv="keep", timeout=9.0, holder="h", lease=30.0))
    assert rig.status().generation == "paused"
    rig.vllm.resume_scheduler()
    assert (rig.vllm.paused, rig.status().generation) == (False, "running")


@pytest.mark.parametrize("call", ["pause", "resume", "sleep", "wake_up", "reload", "version"])
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_calls_wait_from_the_updates_pause_until_its_resume(call: str, end: str) -> None:
    rig = Rig()
    rig.prepare()
    rig.pause_for_update()
    rig.vllm.done.clear()
    future = {
        "pause": lambda: rig.vllm.pause_scheduler("wait"),
        "resume": rig.vllm.resume_scheduler,
        "sleep": lambda: rig.vllm.sleep(1),
        "wake_up": rig.vllm.wake_up,
        "reload": lambda: rig.vllm.collective_rpc("reload_weights"),
        "version": lambda: rig.vllm.set_weight_version("w"),
    }[call]()
    assert isinstance(future, Future), call
    assert rig.vllm.done == []
    if end == "commit":
        assert rig.ask(Commit(epoch=1, update="u")) == Ack()
        assert rig.participant.version == "v1"
    else:
        rig.participant.update = None
        rig.participant.update_phase = "idle"
    assert not future.done()
    rig.ask(Resume(epoch=1, update="u"))
    assert future.done()
    assert future.exception() is None
    assert rig.vllm.paused == (call in ("pause", "sleep"))
    assert rig.status().generation == ("paused" if rig.vllm.paused else "running")
    assert bool(rig.participant.foreign) == (call in ("reload", "version"))


def test_a_call_that_has_to_wait_is_named_where_the_update_is_given_up() -> None:
    rig = Rig()
    rig.prepare()
    rig.pause_for_update()
    rig.vllm.resume_scheduler()
    rig.vllm.resume_scheduler()
    rig.ask(Abort(epoch=2, update="u", reason="its client stood still"))
    refusal = rig.ask(Commit(epoch=1, update="u"))
    assert isinstance(refusal, Error)
    assert (
        "was given up: its client stood still; /resume, called through vLLM by another user, had to wait"
        in refusal.message
    )
    assert refusal.message == rig.status().error


def test_calls_that_change_no_weights_do_not_wait() -> None:
    rig = Rig()
    rig.prepare()
    rig.pause_for_update()
    assert rig.vllm.collective_rpc("areal_digest") == ["areal_digest"]  # type: ignore[comparison-overlap]
    assert rig.participant.foreign == ""


def test_an_engine_in_the_users_own_process_refuses_what_would_have_to_wait() -> None:
    rig = Rig(can_wait=False)
    rig.prepare()
    rig.pause_for_update()
    with pytest.raises(RuntimeError, match="an update is being committed on this engine; call again"):
        rig.vllm.resume_scheduler()
    assert rig.vllm.paused


@pytest.mark.parametrize("why", ["stale", "tainted"])
@pytest.mark.parametrize("before", ["running", "users pause", "vllm's pause"])
def test_no_other_user_resumes_weights_that_must_not_be_served(why: str, before: str) -> None:
    rig = Rig()
    if before == "users pause":
        rig.ask(Pause(epoch=1, mode="keep", kv="keep", timeout=9.0, holder="h", lease=30.0))
    elif before == "vllm's pause":
        rig.vllm.pause_scheduler("keep")
    if why == "stale":
        rig.take(rig.participant.on_group_epoch("v9", 9))
    else:
        rig.participant.last_update = "u0"
        rig.participant.weights_mismatch(WeightsMismatch(update="u0", rank=0, reason="differ"))
        rig.take(rig.participant.tick(0.0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"not resumed: its weights are {why}"):
            rig.vllm.resume_scheduler()
    assert rig.vllm.paused
    rig.vllm.sleep(1)
    rig.vllm.wake_up()
    assert rig.vllm.paused
    assert "resume" not in rig.vllm.done, "not for a moment"
    rig.update()
    if rig.vllm.paused:
        rig.vllm.resume_scheduler()
    assert not rig.vllm.paused


def test_a_resume_that_is_refused_for_the_weights_ends_the_users_own_pause() -> None:
    rig = Rig()
    rig.vllm.pause_scheduler("keep")
    rig.take(rig.participant.on_group_epoch("v9", 9))
    with pytest.raises(RuntimeError, match="not resumed: its weights are stale"):
        rig.vllm.resume_scheduler()
    rig.update()
    assert not rig.vllm.paused


def test_a_resume_that_crosses_the_news_that_the_weights_are_stale_is_taken_back() -> None:
    rig = Rig()
    rig.vllm.pause_scheduler("keep")
    rig.participant.on_group_epoch("v9", 9)  # the guard is on its way to the loop
    rig.vllm.resume_scheduler()
    assert rig.vllm.paused, "paused again"
    assert rig.status().update_phase == "stale"


@pytest.mark.parametrize("call", ["reload_weights", "update_weights", "finish_weight_update", "load_model"])
def test_weights_that_another_user_has_changed_are_foreign_until_an_update(call: str) -> None:
    rig = Rig()
    rig.update()
    assert rig.status().weights == "m"
    rig.vllm.collective_rpc(call)
    status = rig.status()
    assert (status.update_phase, status.weights) == ("foreign", "")
    assert f"{call} was called through vLLM" in status.error
    assert "send an update" in status.error
    rig.participant.last_update = ""
    rig.update()
    assert (rig.status().update_phase, rig.status().error, rig.status().weights) == ("idle", "", "m")


def test_a_failed_reload_leaves_foreign_weights_as_well() -> None:
    rig = Rig()

    def fail(method: str) -> None:
        raise ValueError(method)

    rig.vllm = SimpleNamespace(collective_rpc=fail)  # type: ignore[assignment]
    ForeignCalls(rig.vllm, lambda event: rig.take(event(rig.participant)), can_wait=True)
    with pytest.raises(ValueError, match="reload_weights"):
        rig.vllm.collective_rpc("reload_weights")
    assert rig.participant.foreign


def test_foreign_weights_are_no_base_of_a_delta_update() -> None:
    rig = Rig()
    rig.vllm.collective_rpc("reload_weights")
    caller = ReplyTo(b"peer", b"begin")
    begin = Begin(epoch=1, update="u", version="v1", senders={0: Sender(transfer=Disk(path="/"))}, timeout=60.0)
    rig.take(rig.participant.handle(caller, begin, 0.0))
    rig.worker("begin", manifest="what is there")
    assert rig.answers[caller] == Ack(manifest="")


def test_a_reload_during_an_update_is_a_no_until_the_updates_pause() -> None:
    rig = Rig()
    rig.prepare()
    rig.vllm.collective_rpc("reload_weights")
    answer = rig.pause_for_update()
    assert isinstance(answer, Error)
    assert "reload_weights was called through vLLM during the update; send it again" in answer.message
    assert not rig.vllm.paused
    assert "reload_weights was called through vLLM during the update" in str(
        rig.ask(Prepare(epoch=1, update="u", buckets={0: 0}))
    )


def test_an_update_to_an_engine_that_sleeps_is_refused_before_anything_is_touched() -> None:
    rig = Rig()
    rig.vllm.sleep(1)
    assert rig.status().sleep == "asleep_1"
    answer = rig.begin()
    assert isinstance(answer, Error)
    assert (answer.kind, rig.participant.update) == ("state", None)
    assert "wake_up" in answer.message
    rig.vllm.wake_up(["weights"])
    assert rig.status().sleep == "weights_only", "the weights are there, and cached keys and values are not needed"
    rig.update()
    assert rig.vllm.paused
    rig.vllm.wake_up(["kv_cache"])
    assert (rig.vllm.paused, rig.status().generation, rig.status().version) == (False, "running", "v1")


def test_an_engine_that_falls_asleep_during_an_update_votes_no() -> None:
    rig = Rig()
    rig.prepare()
    rig.vllm.sleep(1)
    answer = rig.pause_for_update()
    assert isinstance(answer, Error)
    assert "this engine sleeps" in answer.message


def test_weights_that_sleep_discarded_are_not_served_before_the_participant_has_heard() -> None:
    """The next call can come before the guard does, which passes the endpoint's thread."""
    vllm, reports = Scheduler(), list[object]()
    foreign = ForeignCalls(vllm, reports.append, can_wait=True)
    vllm.sleep(2)
    vllm.wake_up()
    assert vllm.paused
    with pytest.raises(RuntimeError, match="sleep level 2 discarded its weights"):
        vllm.resume_scheduler()
    foreign.discarded = ""  # an update has committed
    vllm.resume_scheduler()
    assert not vllm.paused


def test_nobody_resumes_an_engine_that_sleeps() -> None:
    rig = Rig()
    rig.vllm.sleep(1)
    with pytest.raises(RuntimeError, match="this engine sleeps"):
        rig.vllm.resume_scheduler()
    assert rig.vllm.paused


def test_weights_that_sleep_discarded_are_not_served_before_an_update() -> None:
    rig = Rig()
    rig.vllm.sleep(2)
    rig.vllm.wake_up()
    assert rig.vllm.paused
    assert (rig.status().update_phase, rig.status().sleep) == ("tainted", "awake")
    rig.update()
    assert (rig.vllm.paused, rig.status().update_phase) == (False, "idle")


def test_status_says_what_the_scheduler_does() -> None:
    rig = Rig()
    rig.vllm.paused = True  # past every interface
    assert rig.status().generation == "paused"
    rig.vllm.paused = False
    rig.ask(Pause(epoch=1, mode="keep", kv="keep", timeout=9.0, holder="h", lease=30.0))
    rig.vllm.paused = False
    assert rig.status().generation == "running"


def test_a_resume_of_an_engine_that_runs_does_not_reach_vllm() -> None:
    """There it would wait for the other ranks of an MoE group."""
    rig = Rig()
    rig.vllm.resume_scheduler()
    rig.vllm.wake_up()
    assert rig.vllm.done == []
