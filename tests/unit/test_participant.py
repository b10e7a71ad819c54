"""An engine's side of pause and update: every transition of ``participant.py``, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from engine_infos import engine_info

from areal_vllm_ext.engine_core.effects import (
    CallCancelPause,
    CallCommit,
    CallPause,
    CallResume,
    Effect,
    Order,
    Reply,
)
from areal_vllm_ext.engine_core.participant import Participant, ParticipantRequest
from areal_vllm_ext.engine_core.status import beat_of
from areal_vllm_ext.protocol import (
    Abort,
    Ack,
    AdoptEpoch,
    Answer,
    Begin,
    Bucket,
    Commit,
    Disk,
    Error,
    KeepPaused,
    KVPolicy,
    Pause,
    PauseMode,
    Prepare,
    Resume,
    Sender,
    WeightsMismatch,
    WorkerDone,
)
from areal_vllm_ext.protocol.server import ReplyTo

OLD, NEW = "old", "new"
MINUTE = 60.0


class Rig:
    """A participant, its callers and its clock."""

    def __init__(self, workers: int = 1) -> None:
        self.participant = Participant(OLD, frozenset(range(workers)))
        self.now = 0.0
        self.calls: list[CallPause | CallResume | CallCancelPause | CallCommit] = []
        self.orders: list[object] = []
        self.answers: dict[ReplyTo, Answer] = {}
        self._numbers = itertools.count()

    @property
    def state(self) -> tuple[str, str]:
        return self.participant.update_phase, self.participant.generation

    def ask(self, message: ParticipantRequest) -> ReplyTo:
        caller = ReplyTo(b"peer", str(next(self._numbers)).encode())
        self.take(self.participant.handle(caller, message, self.now))
        return caller

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply():
                    assert effect.caller not in self.answers, "answered twice"
                    self.answers[effect.caller] = effect.answer
                case Order():
                    self.orders.append(effect.message)
                case _:
                    self.calls.append(effect)

    # What is asked

    def begin(self, update: str = "u", epoch: int = 1, timeout: float = MINUTE) -> ReplyTo:
        return self.ask(
            Begin(
                epoch=epoch, update=update, version=NEW, senders={0: Sender(transfer=Disk(path="/"))}, timeout=timeout
            )
        )

    def bucket(self, index: int = 0, update: str = "u", epoch: int = 1) -> ReplyTo:
        return self.ask(Bucket(epoch=epoch, update=update, index=index, nbytes=0, segments=()))

    def prepare(self, update: str = "u", epoch: int = 1) -> ReplyTo:
        return self.ask(Prepare(epoch=epoch, update=update, buckets={0: 1}))

    def pause(
        self,
        mode: PauseMode = "keep",
        kv: KVPolicy = "keep",
        *,
        epoch: int = 1,
        timeout: float = MINUTE,
        update: str = "",
    ) -> ReplyTo:
        return self.ask(Pause(epoch=epoch, mode=mode, kv=kv, timeout=timeout, update=update))

    def commit(self, update: str = "u", epoch: int = 1) -> ReplyTo:
        return self.ask(Commit(epoch=epoch, update=update))

    def resume(self, epoch: int = 1) -> ReplyTo:
        return self.ask(Resume(epoch=epoch))

    def abort(self, update: str = "u", epoch: int = 1) -> ReplyTo:
        return self.ask(Abort(epoch=epoch, update=update, reason="the trainer says so"))

    # What happens

    def done(self, step: str, rank: int = 0, error: str = "", update: str = "u") -> None:
        self.take(self.participant.worker_done(WorkerDone(update=update, rank=rank, step=step, error=error)))

    def paused(self, error: str = "") -> None:
        call = next(call for call in reversed(self.calls) if isinstance(call, CallPause))
        self.take(self.participant.pauses.pause_done(call.call, error))

    def resumed(self, error: str = "") -> None:
        call = next(call for call in reversed(self.calls) if isinstance(call, CallResume))
        self.take(self.participant.pauses.resume_done(call.call, error))

    def cancelled(self, cancelled: bool) -> None:
        call = next(call for call in reversed(self.calls) if isinstance(call, CallCancelPause))
        self.take(self.participant.pauses.cancel_done(call.call, cancelled))

    def committed(self, error: str = "") -> None:
        self.take(self.participant.commit_done(error, 0.25))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.participant.tick(self.now))

    # What must have come of it

    def acked(self, caller: ReplyTo) -> bool:
        return isinstance(self.answers.get(caller), Ack)

    def refusal(self, caller: ReplyTo) -> Error:
        answer = self.answers[caller]
        assert isinstance(answer, Error), answer
        return answer

    def kinds(self) -> list[str]:
        return [type(call).__name__ for call in self.calls]


def in_state(phase: str, generation: str, workers: int = 1) -> Rig:
    """A participant in the given state, with update ``u`` where one is under way."""
    rig = Rig(workers)
    if phase != "idle":
        rig.begin()
    if phase in ("prepared", "committing", "tainted"):
        for rank in range(workers):
            rig.done("begin", rank)
        rig.prepare()
        for rank in range(workers):
            rig.done("prepare", rank)
    if generation != "running" or phase in ("committing", "tainted"):
        rig.pause()
        if generation != "pausing":
            rig.paused()
        if generation == "resuming":
            rig.resume()
    if phase in ("committing", "tainted"):
        rig.commit()
    if phase == "tainted":
        rig.committed("a weight did not fit")
        assert rig.participant.tainted
        assert rig.state == ("idle", "paused")
    else:
        assert rig.state == (phase, generation)
    rig.calls.clear()
    rig.orders.clear()
    return rig


GENERATIONS = ("running", "pausing", "paused", "resuming")
REACHABLE = [(phase, generation) for phase in ("idle", "receiving", "prepared") for generation in GENERATIONS] + [
    ("committing", "paused")
]


# The way of an update


def test_an_update_goes_from_begin_to_the_new_version() -> None:
    rig = Rig()
    begin = rig.begin()
    assert rig.state == ("receiving", "running")
    assert isinstance(rig.orders[-1], Begin)
    assert begin not in rig.answers, "it is answered when the worker is ready"
    rig.done("begin")
    assert rig.acked(begin)
    bucket = rig.bucket()
    assert isinstance(rig.orders[-1], Bucket)
    rig.done("bucket 0")
    assert rig.acked(bucket)
    prepare = rig.prepare()
    assert rig.state == ("receiving", "running"), "asked is not voted"
    rig.done("prepare")
    assert rig.acked(prepare)
    assert rig.state == ("prepared", "running")
    pause = rig.pause("keep", "recompute", update="u")
    assert rig.state == ("prepared", "pausing")
    assert rig.calls == [CallPause(1, "keep", clear_cache=True, root="u")]
    rig.paused()
    assert rig.acked(pause)
    commit = rig.commit()
    assert rig.state == ("committing", "paused")
    assert rig.calls[-1] == CallCommit("u", NEW)
    assert rig.participant.version == OLD
    rig.committed()
    assert rig.answers[commit] == Ack(seconds=0.25)
    assert rig.state == ("idle", "paused")
    assert (rig.participant.version, rig.participant.last_update) == (NEW, "u")
    resume = rig.resume()
    assert rig.state == ("idle", "resuming")
    rig.resumed()
    assert rig.acked(resume)
    assert rig.state == ("idle", "running")


def test_a_bucket_waits_for_the_workers_of_its_sender_only() -> None:
    rig = Rig(workers=2)
    senders = {number: Sender(transfer=Disk(path="/"), workers=(number,)) for number in range(2)}
    rig.ask(Begin(epoch=1, update="u", version=NEW, senders=senders, timeout=MINUTE))
    first, second = (
        rig.ask(Bucket(epoch=1, update="u", index=0, nbytes=0, segments=(), sender=number)) for number in range(2)
    )
    rig.done("bucket 0 of sender 1", rank=1)
    assert rig.acked(second)
    assert first not in rig.answers
    stranger = rig.ask(Bucket(epoch=1, update="u", index=0, nbytes=0, segments=(), sender=2))
    assert "update u has no sender 2" in str(rig.answers[stranger])


def test_a_sender_to_workers_that_are_not_there_is_refused() -> None:
    rig = Rig(workers=2)
    for senders in ({}, {0: Sender(transfer=Disk(path="/"), workers=(1, 2))}):
        asked = rig.ask(Begin(epoch=1, update="u", version=NEW, senders=senders, timeout=MINUTE))
        assert "has the workers [0, 1]" in str(rig.answers[asked])
    assert rig.state == ("idle", "running")


@pytest.mark.parametrize("step", ["begin", "bucket 0", "prepare"])
def test_every_worker_must_finish_a_step(step: str) -> None:
    rig = Rig(workers=3)
    begin = rig.begin()
    asked = {"begin": lambda: begin, "bucket 0": rig.bucket, "prepare": rig.prepare}[step]()
    for rank in (2, 0, 2, 0):  # again is not another worker
        rig.done(step, rank)
        assert asked not in rig.answers
        assert rig.participant.update_phase == "receiving"
    rig.done(step, 1)
    assert rig.acked(asked)


def test_a_rank_that_is_no_worker_has_no_vote() -> None:
    rig = Rig(workers=2)
    rig.begin()
    prepare = rig.prepare()
    rig.done("prepare", 0)
    rig.done("prepare", 7)
    assert prepare not in rig.answers
    assert rig.participant.update_phase == "receiving"


def test_buckets_are_answered_each_by_itself() -> None:
    rig = Rig()
    rig.begin()
    first, second = rig.bucket(0), rig.bucket(1)
    rig.done("bucket 1")
    assert rig.acked(second)
    assert first not in rig.answers


# Fencing

REQUESTS: dict[str, Callable[[Rig, int], ReplyTo]] = {
    "pause": lambda rig, epoch: rig.pause(epoch=epoch),
    "resume": lambda rig, epoch: rig.resume(epoch),
    "begin": lambda rig, epoch: rig.begin("other", epoch),
    "bucket": lambda rig, epoch: rig.bucket(epoch=epoch),
    "prepare": lambda rig, epoch: rig.prepare(epoch=epoch),
    "commit": lambda rig, epoch: rig.commit(epoch=epoch),
    "abort": lambda rig, epoch: rig.abort(epoch=epoch),
}


@pytest.mark.parametrize("state", REACHABLE, ids=" ".join)
@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_lower_epoch_changes_nothing_in_any_state(state: tuple[str, str], request_name: str) -> None:
    rig = in_state(*state)
    assert rig.participant.fence(9) is None
    caller = REQUESTS[request_name](rig, 8)
    refusal = rig.refusal(caller)
    assert (refusal.kind, refusal.epoch) == ("fenced", 9)
    assert "epoch 8" in refusal.message
    assert "epoch 9" in refusal.message
    assert (rig.state, rig.participant.version, rig.calls, rig.orders) == (state, OLD, [], [])
    assert rig.participant.epoch == 9


@pytest.mark.parametrize("request_name", REQUESTS)
def test_every_request_raises_the_epoch_even_one_that_is_refused(request_name: str) -> None:
    rig = in_state("idle", "running")
    REQUESTS[request_name](rig, 5)
    assert rig.participant.epoch == 5
    assert rig.refusal(rig.pause(epoch=4)).kind == "fenced"


# Repetition


def test_a_repeated_begin_starts_nothing_again() -> None:
    rig = Rig()
    first = rig.begin()
    rig.done("begin")
    rig.bucket()
    rig.done("bucket 0")
    again = rig.begin()
    assert rig.acked(first)
    assert rig.acked(again)
    assert [type(order) for order in rig.orders] == [Begin, Bucket]
    assert rig.participant.update_phase == "receiving"


def test_a_step_that_is_asked_twice_is_ordered_once_and_both_are_answered() -> None:
    rig = Rig()
    rig.begin()
    for ask, step in ((rig.bucket, "bucket 0"), (rig.prepare, "prepare")):
        first, second = ask(), ask()
        rig.done(step)
        third = ask()
        assert all(rig.acked(caller) for caller in (first, second, third)), step
    assert [type(order) for order in rig.orders] == [Begin, Bucket, Prepare]


def test_a_commit_that_is_asked_twice_is_done_once() -> None:
    rig = in_state("prepared", "paused")
    first, second = rig.commit(), rig.commit()
    rig.committed()
    third = rig.commit()
    assert all(rig.acked(caller) for caller in (first, second, third))
    assert rig.kinds() == ["CallCommit"]


def test_an_abort_that_is_asked_twice_is_done_once() -> None:
    rig = in_state("receiving", "running")
    first, second = rig.abort(), rig.abort()
    assert rig.acked(first)
    assert rig.acked(second)
    assert [type(order) for order in rig.orders] == [Abort]


# Commit


@pytest.mark.parametrize(
    "state", [state for state in REACHABLE if state not in (("prepared", "paused"), ("committing", "paused"))]
)
def test_commit_needs_a_prepared_and_paused_engine(state: tuple[str, str]) -> None:
    rig = in_state(*state)
    assert rig.refusal(rig.commit()).kind == "state"
    assert rig.kinds() == []
    assert rig.state == state
    assert rig.participant.version == OLD


def test_commit_of_another_update_is_refused() -> None:
    rig = in_state("prepared", "paused")
    assert "other is not in flight" in rig.refusal(rig.commit("other")).message
    assert rig.state == ("prepared", "paused")


@pytest.mark.parametrize("ask", [lambda rig: rig.resume(), lambda rig: rig.abort(), lambda rig: rig.begin("other")])
def test_a_commit_under_way_excludes_resume_abort_and_begin(ask: Callable[[Rig], ReplyTo]) -> None:
    rig = in_state("committing", "paused")
    assert rig.refusal(ask(rig)).kind == "busy"
    assert rig.state == ("committing", "paused")
    assert rig.calls == []


def test_nothing_that_workers_say_disturbs_a_commit() -> None:
    rig = in_state("committing", "paused")
    rig.done("prepare", error="too late")
    rig.pass_time(10 * MINUTE)
    assert rig.state == ("committing", "paused")
    rig.committed()
    assert rig.participant.version == NEW


def test_a_commit_cannot_be_aborted_afterwards() -> None:
    rig = in_state("committing", "paused")
    rig.committed()
    assert "committed here" in rig.refusal(rig.abort()).message
    assert rig.participant.version == NEW


def test_a_failed_commit_leaves_a_tainted_engine_that_does_not_resume() -> None:
    rig = in_state("committing", "paused")
    waiting = rig.commit()
    rig.committed("a weight did not fit")
    assert "a weight did not fit" in rig.refusal(waiting).message
    assert rig.participant.version == OLD
    refusal = rig.refusal(rig.resume())
    assert refusal.kind == "state"
    assert "tainted" in refusal.message
    assert rig.participant.generation == "paused"


def test_another_update_heals_a_tainted_engine() -> None:
    rig = in_state("tainted", "paused")
    rig.begin("healing")
    rig.prepare("healing")
    rig.done("prepare", update="healing")
    assert rig.acked(rig.pause())
    rig.commit("healing")
    rig.committed()
    assert not rig.participant.tainted
    assert rig.participant.version == NEW
    rig.resume()
    rig.resumed()
    assert rig.state == ("idle", "running")


def test_a_healing_update_that_fails_leaves_the_engine_tainted() -> None:
    rig = in_state("tainted", "paused")
    rig.begin("healing")
    rig.abort("healing")
    assert rig.participant.tainted
    assert "tainted" in rig.refusal(rig.resume()).message


# Abort


@pytest.mark.parametrize("state", [state for state in REACHABLE if state[0] in ("receiving", "prepared")], ids=" ".join)
def test_abort_keeps_the_old_weights_and_the_flow_from_every_state(state: tuple[str, str]) -> None:
    rig = in_state(*state)
    caller = rig.abort()
    assert rig.acked(caller)
    assert rig.state == ("idle", state[1])
    assert rig.participant.version == OLD
    assert [type(order) for order in rig.orders] == [Abort], "the workers free their staging"
    assert rig.calls == []
    assert "the trainer says so" in rig.participant.error


@pytest.mark.parametrize("state", REACHABLE, ids=" ".join)
def test_abort_of_an_unknown_update_is_acknowledged_and_does_nothing(state: tuple[str, str]) -> None:
    rig = in_state(*state)
    assert rig.acked(rig.abort("unknown"))
    assert rig.state == state
    assert rig.orders == []


def test_whoever_waits_is_told_of_the_abort() -> None:
    rig = in_state("receiving", "running")
    bucket, prepare = rig.bucket(), rig.prepare()
    rig.abort()
    assert rig.refusal(bucket).message == "the trainer says so"
    assert rig.refusal(prepare).message == "the trainer says so"


# Begin over another update


@pytest.mark.parametrize(
    "state", [("receiving", generation) for generation in GENERATIONS] + [("prepared", "running")], ids=" ".join
)
def test_a_newer_update_ends_one_that_nobody_can_have_committed(state: tuple[str, str]) -> None:
    rig = in_state(*state)
    rig.begin("newer", epoch=2)
    assert [type(order) for order in rig.orders] == [Abort, Begin]
    assert rig.participant.update is not None
    assert rig.participant.update.begin.update == "newer"
    assert rig.participant.update_phase == "receiving"


@pytest.mark.parametrize("generation", ["pausing", "paused", "resuming"])
def test_a_newer_update_does_not_end_one_in_doubt(generation: str) -> None:
    rig = in_state("prepared", generation)
    refusal = rig.refusal(rig.begin("newer", epoch=2))
    assert refusal.kind == "state"
    assert "in doubt" in refusal.message
    assert rig.state == ("prepared", generation)
    assert rig.orders == []


# Workers that fail


@pytest.mark.parametrize("step", ["begin", "bucket 0", "prepare"])
def test_a_worker_that_fails_is_told_to_whoever_waits_and_to_whoever_asks_later(step: str) -> None:
    rig = Rig(workers=2)
    begin = rig.begin()
    asked = {"begin": lambda: begin, "bucket 0": rig.bucket, "prepare": rig.prepare}[step]()
    rig.done(step, 0)
    rig.done(step, 1, error="out of memory")
    for caller in (asked, rig.bucket(5), rig.prepare()):
        refusal = rig.refusal(caller)
        assert refusal.kind == "failed"
        assert refusal.message == "worker 1: out of memory"
    assert rig.participant.update_phase == "receiving"
    assert rig.acked(rig.abort())
    assert rig.participant.update_phase == "idle"


@pytest.mark.parametrize("generation", ["running", "paused"])
def test_a_worker_that_fails_after_its_vote_takes_the_vote_back(generation: str) -> None:
    rig = in_state("prepared", generation)
    rig.done("prepare", error="the staging is gone")
    assert rig.participant.update_phase == "receiving"
    rig.pause()
    if generation == "running":
        rig.paused()
    for asked in (rig.commit(), rig.pause(update="u"), rig.bucket(), rig.prepare()):
        assert rig.refusal(asked).message == "worker 0: the staging is gone", "the cause, not what follows from it"
    assert rig.participant.version == OLD


def test_a_worker_that_fails_while_the_engine_pauses_turns_the_second_vote_into_a_no() -> None:
    rig = in_state("prepared", "running")
    pause = rig.pause(update="u")
    rig.done("prepare", error="the staging is gone")
    assert rig.refusal(pause) == Error(kind="failed", message="worker 0: the staging is gone")
    rig.paused()
    assert rig.refusal(rig.commit()).kind == "state"


@pytest.mark.parametrize("epoch", [1, 2], ids=["the same client gave it up", "a newer client gave it up"])
def test_requests_of_an_update_that_was_given_up_are_told_why(epoch: int) -> None:
    rig = in_state("prepared", "paused")
    rig.ask(Abort(epoch=epoch, update="u", reason="its client stood still"))
    for asked in (rig.commit(), rig.pause(update="u"), rig.bucket(), rig.prepare()):
        refusal = rig.refusal(asked)
        assert refusal.message == "update u (version new) was given up: its client stood still"
        assert refusal.kind == ("state" if epoch == 1 else "fenced")
    assert "stood still" not in rig.refusal(rig.commit(update="another")).message


def test_a_failure_of_its_own_is_why_an_engine_gave_an_update_up() -> None:
    rig = in_state("receiving", "running")
    rig.done("begin", error="out of memory")
    rig.abort()
    assert rig.participant.error.endswith("was given up: worker 0: out of memory")


def test_a_late_vote_after_a_failure_does_not_count() -> None:
    rig = Rig(workers=2)
    rig.begin()
    rig.prepare()
    rig.done("prepare", 0, error="broken")
    rig.done("prepare", 0)
    rig.done("prepare", 1)
    assert rig.participant.update_phase == "receiving"
    assert "broken" in rig.refusal(rig.prepare()).message


def test_the_first_failure_of_several_is_the_cause() -> None:
    rig = Rig(workers=2)
    rig.begin()
    rig.done("begin", 0, error="out of memory")
    rig.done("begin", 1, error="the other worker is gone")
    assert rig.refusal(rig.prepare()).message == "worker 0: out of memory"


def test_a_step_of_another_update_reaches_no_worker() -> None:
    rig = in_state("receiving", "running")
    for asked in (rig.bucket(update="another"), rig.prepare(update="another")):
        assert rig.refusal(asked) == Error(kind="state", message="update another is not in flight here", epoch=1)
    assert rig.orders == []


@pytest.mark.parametrize(("manifests", "base"), [("aa", "a"), ("ab", "")])
def test_changes_need_one_base_on_all_workers(manifests: str, base: str) -> None:
    rig = Rig(workers=2)
    begin = rig.begin()
    for rank, manifest in enumerate(manifests):
        rig.take(rig.participant.worker_done(WorkerDone(update="u", rank=rank, step="begin", manifest=manifest)))
    assert rig.answers[begin] == Ack(manifest=base)


@pytest.mark.parametrize("error", ["", "late"])
@pytest.mark.parametrize("state", REACHABLE, ids=" ".join)
def test_what_workers_say_of_another_update_is_ignored(state: tuple[str, str], error: str) -> None:
    rig = in_state(*state)
    for step in ("begin", "bucket 0", "prepare"):
        rig.done(step, error=error, update="an older one")
    assert rig.state == state
    assert (rig.calls, rig.orders) == ([], [])


# Pause and resume


def test_a_second_pause_of_the_same_mode_joins_the_first() -> None:
    rig = Rig()
    first, second = rig.pause(epoch=1), rig.pause(epoch=2)
    assert rig.kinds() == ["CallPause"], "a new round would wait for ranks that have paused already"
    rig.paused()
    assert rig.acked(first)
    assert rig.acked(second)


def test_a_pause_of_a_paused_engine_is_done_at_once() -> None:
    rig = in_state("idle", "paused")
    assert rig.acked(rig.pause())
    assert rig.calls == []


@pytest.mark.parametrize("generation", ["pausing", "paused"])
@pytest.mark.parametrize(("mode", "kv"), [("abort", "keep"), ("wait", "keep"), ("keep", "recompute")])
def test_a_pause_of_another_mode_starts_a_new_round_however_far_this_rank_is(
    generation: str, mode: PauseMode, kv: KVPolicy
) -> None:
    rig = in_state("idle", generation)
    caller = rig.pause(mode, kv)
    assert [(call.mode, call.clear_cache) for call in rig.calls if isinstance(call, CallPause)] == [
        (mode, kv == "recompute")
    ]
    assert rig.state == ("idle", "pausing")
    rig.paused()
    assert rig.acked(caller)


def test_a_cleared_cache_needs_no_second_clearing() -> None:
    rig = Rig()
    rig.pause("keep", "recompute")
    rig.paused()
    assert rig.acked(rig.pause("keep", "recompute"))
    assert rig.acked(rig.pause("keep", "keep"))
    assert rig.kinds() == ["CallPause"]


def test_the_outcome_of_an_older_pause_does_not_answer_a_newer_one() -> None:
    rig = Rig()
    rig.pause("keep")
    newer = rig.pause("abort")
    rig.take(rig.participant.pauses.pause_done(1, ""))
    assert newer not in rig.answers
    assert rig.participant.generation == "pausing"


def test_the_outcome_of_another_call_does_not_end_a_resume() -> None:
    rig = in_state("idle", "paused")
    caller = rig.resume()
    for done in (rig.participant.pauses.resume_done(1, ""), rig.participant.pauses.cancel_done(1, True)):
        assert done == []
    assert caller not in rig.answers
    assert rig.participant.generation == "resuming"


def test_a_pause_that_fails_says_why_and_the_engine_runs() -> None:
    rig = Rig()
    caller = rig.pause()
    rig.paused("no consent")
    assert rig.refusal(caller).message == "no consent"
    assert rig.participant.generation == "running"


def test_resume_is_done_once_a_pause_and_answers_all() -> None:
    rig = in_state("idle", "paused")
    first, second = rig.resume(), rig.resume(epoch=2)
    rig.resumed()
    third = rig.resume(epoch=2)
    assert all(rig.acked(caller) for caller in (first, second, third))
    assert rig.kinds() == ["CallResume"]


def test_resume_takes_back_a_pause_that_has_not_completed() -> None:
    rig = Rig()
    pause = rig.pause()
    resume = rig.resume(epoch=2)
    assert rig.kinds() == ["CallPause", "CallResume"]
    assert "a resume cancelled the pause" in rig.refusal(pause).message
    rig.take(rig.participant.pauses.pause_done(1, ""))  # it completes late
    assert rig.participant.generation == "resuming"
    rig.resumed()
    assert rig.acked(resume)
    assert rig.state == ("idle", "running")


def test_a_resume_that_fails_says_why_and_the_engine_stays_paused() -> None:
    rig = in_state("idle", "paused")
    caller = rig.resume()
    rig.resumed("stuck")
    assert rig.refusal(caller).message == "stuck"
    assert rig.participant.generation == "paused"


def test_a_pause_while_resuming_is_refused() -> None:
    rig = in_state("idle", "resuming")
    assert rig.refusal(rig.pause()).kind == "busy"
    assert rig.state == ("idle", "resuming")
    assert rig.calls == []


def test_an_engine_that_runs_has_no_pause_mode() -> None:
    rig = Rig()
    rig.pause()
    rig.paused()
    assert rig.participant.pauses.mode == "keep"
    rig.resume()
    rig.resumed()
    assert rig.participant.pauses.mode is None


@pytest.mark.parametrize("way", ["failed", "cancelled"])
def test_an_engine_whose_pause_came_to_nothing_has_no_pause_mode(way: str) -> None:
    rig = Rig()
    rig.pause(timeout=1.0)
    if way == "failed":
        rig.paused("no consent")
    else:
        rig.pass_time(1.0)
        rig.cancelled(True)
    assert rig.state == ("idle", "running")
    assert rig.participant.pauses.mode is None


# Time


def test_a_pause_that_takes_too_long_is_taken_back() -> None:
    rig = Rig()
    caller = rig.pause(timeout=5.0)
    rig.pass_time(4.9)
    assert caller not in rig.answers
    rig.pass_time(0.1)
    assert rig.refusal(caller).kind == "timeout"
    assert rig.kinds() == ["CallPause", "CallCancelPause"]
    assert rig.participant.generation == "resuming"
    rig.cancelled(True)
    assert rig.participant.generation == "running"


def test_a_pause_that_completes_while_it_is_taken_back_stands() -> None:
    rig = Rig()
    rig.pause(timeout=5.0)
    rig.pass_time(5.0)
    rig.take(rig.participant.pauses.pause_done(1, ""))
    rig.cancelled(False)
    assert rig.participant.generation == "paused"
    rig.resume()
    rig.resumed()
    assert rig.participant.generation == "running"


def test_a_resume_that_comes_while_a_pause_is_taken_back_is_carried_out() -> None:
    rig = Rig()
    rig.pause(timeout=5.0)
    rig.pass_time(5.0)
    resume = rig.resume()
    rig.cancelled(False)  # the pause had completed after all
    assert rig.kinds()[-1] == "CallResume"
    rig.resumed()
    assert rig.acked(resume)
    assert rig.participant.generation == "running"


@pytest.mark.parametrize(
    "state", [("receiving", generation) for generation in GENERATIONS] + [("prepared", "running")], ids=" ".join
)
def test_an_update_that_nobody_can_have_committed_ends_with_its_time(state: tuple[str, str]) -> None:
    rig = in_state(*state)
    rig.pass_time(MINUTE - 0.1)
    assert rig.participant.update_phase == state[0]
    rig.pass_time(0.1)
    assert rig.participant.update_phase == "idle"
    assert rig.participant.version == OLD
    assert Abort in [type(order) for order in rig.orders]


def test_a_prepared_engine_that_was_never_paused_lets_nobody_commit_after_its_time() -> None:
    rig = in_state("prepared", "running")
    rig.pass_time(MINUTE)
    rig.pause()
    rig.paused()
    assert rig.refusal(rig.commit()).kind == "state"


@pytest.mark.parametrize("generation", ["paused", "resuming"])
def test_an_update_in_doubt_waits_for_the_coordinator_or_its_successor(generation: str) -> None:
    rig = in_state("prepared", generation)
    rig.pass_time(1000 * MINUTE)
    assert rig.participant.update_phase == "prepared"
    assert rig.orders == []


@pytest.mark.parametrize("state", REACHABLE, ids=" ".join)
def test_time_that_passes_before_a_deadline_does_nothing(state: tuple[str, str]) -> None:
    rig = in_state(*state)
    for _ in range(3):
        rig.pass_time(1.0)
    assert rig.state == state
    assert (rig.calls, rig.orders) == ([], [])


# A pause that an update needs


@pytest.mark.parametrize("state", [("idle", "running"), ("receiving", "running"), ("idle", "paused")], ids=" ".join)
def test_a_pause_for_an_update_is_a_second_vote(state: tuple[str, str]) -> None:
    rig = in_state(*state)
    refusal = rig.refusal(rig.pause(update="given up before" if state[0] == "idle" else "u"))
    assert refusal.kind == "state"
    assert rig.state == state
    assert rig.calls == []


def test_a_pause_for_an_update_remembers_it_and_a_users_own_outlasts_it() -> None:
    rig = in_state("prepared", "running")
    rig.pause(update="u")
    rig.paused()
    assert rig.participant.pauses.paused_for == "u"
    rig.pause("abort")
    rig.paused()
    assert rig.participant.pauses.paused_for == ""
    asked = rig.pause("abort", update="u")
    assert not rig.acked(asked), "only the engine's loop knows that no other user has resumed meanwhile"
    rig.paused()
    assert rig.acked(asked)
    assert rig.acked(rig.pause("abort", update="u")), "the same again"
    assert rig.participant.pauses.paused_for == ""


def test_other_users_do_not_wait_for_the_resume_of_tainted_weights() -> None:
    rig = in_state("prepared", "running")
    rig.pause(update="u")
    rig.paused()
    rig.commit()
    rig.committed("a weight did not fit")
    rig.pass_time(0.0)
    assert rig.participant.pauses.paused_for == "stale", "until an update commits, their calls are answered"


def test_a_copy_of_begin_that_comes_after_the_commit_begins_nothing() -> None:
    rig = in_state("committing", "paused")
    rig.committed()
    refusal = rig.answers[rig.begin()]
    assert isinstance(refusal, Error)
    assert "has ended here" in refusal.message
    assert rig.participant.update_phase == "idle", "its commit would be answered as a repeated one, and never happen"


# Weights that must not serve


@pytest.mark.parametrize("phase", ["tainted", "prepared", "committing"])
def test_a_pause_of_another_mode_that_times_out_does_not_set_doubtful_weights_running(phase: str) -> None:
    rig = in_state(phase, "paused")
    rig.pause("abort", timeout=5.0, epoch=2)
    rig.pass_time(5.0)
    assert "CallCancelPause" not in rig.kinds()
    assert rig.participant.generation != "resuming"


def test_a_paused_engine_stays_paused_where_a_pause_of_another_mode_fails() -> None:
    rig = in_state("idle", "paused")
    rig.pause("abort")
    rig.paused("no consent")
    assert rig.participant.generation == "paused"


@pytest.mark.parametrize("update", ["u", ""])
def test_a_pause_that_times_out_does_not_set_stale_weights_running(update: str) -> None:
    rig = Rig()
    rig.begin()
    rig.done("begin")
    rig.prepare()
    rig.done("prepare")
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    asked = rig.pause("keep", "recompute", timeout=5.0, update=update)
    rig.pass_time(5.0)
    refusal = rig.answers[asked]
    assert isinstance(refusal, Error)
    assert refusal.kind == "timeout"
    assert "CallCancelPause" not in rig.kinds()
    rig.paused()
    assert rig.participant.generation == "paused"
    assert rig.participant.pauses.paused_for == ("stale" if update else "")


def test_a_pause_for_an_update_stands_where_the_weights_became_stale() -> None:
    rig = Rig()
    rig.begin()
    rig.done("begin")
    rig.prepare()
    rig.done("prepare")
    rig.pause(update="u", timeout=5.0)
    rig.abort()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.pause("abort", timeout=5.0)
    rig.pass_time(5.0)
    assert "CallCancelPause" not in rig.kinds()


def test_an_engine_that_resumes_when_it_hears_that_it_is_behind_pauses_again() -> None:
    rig = in_state("idle", "paused")
    rig.resume()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    assert rig.participant.stale
    rig.participant.committed_epoch = 5  # it has fetched them
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    assert rig.participant.generation == "resuming", "no second resume"
    rig.take(rig.participant.on_group_epoch("newer", 6))
    rig.resumed()
    rig.pass_time(0.0)
    assert rig.participant.generation == "pausing"
    assert rig.participant.pauses.paused_for == "stale"


def test_an_engine_takes_part_in_nothing_before_it_has_joined() -> None:
    rig = Rig()
    rig.participant.joined = False
    for asked in (rig.begin(), rig.pause()):
        refusal = rig.answers[asked]
        assert isinstance(refusal, Error)
        assert "has not joined its group yet" in refusal.message
    assert rig.acked(rig.resume()), "it has nothing to resume"
    assert rig.calls == []
    rig.take(rig.participant.on_group_epoch(OLD, 0))
    rig.begin()
    assert rig.participant.update_phase == "receiving"


def test_stale_weights_are_paused_again_where_the_pause_failed() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.paused("no consent")
    assert rig.participant.generation == "running"
    rig.pass_time(0.1)
    assert rig.participant.generation == "pausing"


# What the directory says, and pauses with a lease


def test_an_engine_that_is_behind_pauses_until_an_update_commits() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    (call,) = rig.calls
    assert call == CallPause(call.call, "keep", clear_cache=False)  # type: ignore[union-attr]
    assert rig.participant.pauses.paused_for == "stale"
    assert "the group is at version new, this engine at old" in rig.participant.stale
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    assert len(rig.calls) == 1, "told once a second"
    rig.take(rig.participant.pauses.pause_done(call.call, ""))  # type: ignore[union-attr]
    refusal = rig.answers[rig.ask(Resume(epoch=6))]
    assert isinstance(refusal, Error)
    assert "stale" in refusal.message
    assert not rig.participant.needs_recovery, "only an update helps"


def test_an_engine_that_is_behind_serves_nothing_while_it_receives_an_update() -> None:
    rig = Rig()
    rig.begin()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    assert isinstance(rig.calls[-1], CallPause)
    rig.paused()
    rig.done("begin")
    rig.prepare()
    rig.done("prepare")
    rig.pause(update="u")
    rig.commit()
    rig.committed()
    assert rig.participant.stale == ""
    rig.resume()
    rig.resumed()
    assert rig.state == ("idle", "running")


def test_a_stale_engine_that_an_update_healed_is_resumed_by_recovery_if_its_trainer_is_lost() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.paused()
    assert not rig.participant.needs_recovery
    switched(rig)
    assert rig.participant.needs_recovery


def test_a_users_pause_that_ended_while_the_weights_were_stale_ends_with_the_next_update() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.paused()
    rig.pause()
    rig.paused()
    assert isinstance(rig.answers[rig.resume()], Error), "the weights are stale"
    switched(rig)
    rig.take(rig.participant.handle(ReplyTo(b"trainer", b"r"), Resume(epoch=1, update="u"), rig.now))
    assert rig.calls[-1] == CallResume(rig.calls[-1].call, lifts=True)  # type: ignore[union-attr]


def test_the_end_of_such_a_pause_leaves_an_engine_asleep() -> None:
    """An error would be one of every later recovery, so that nobody could wake the engine up any more."""
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.paused()
    rig.pause()
    rig.paused()
    rig.resume()
    switched(rig)
    done = rig.participant.pauses.resume_done
    rig.take(rig.participant.handle(ReplyTo(b"trainer", b"r"), Resume(epoch=1, update="u"), rig.now))
    first = rig.calls[-1]
    assert first == CallResume(first.call, lifts=True, asked=False)  # type: ignore[union-attr]
    rig.take(done(first.call, "", paused=True))  # type: ignore[union-attr]
    assert rig.answers[ReplyTo(b"trainer", b"r")] == Ack()
    assert rig.state == ("idle", "paused")
    # A user who resumes while such a call runs has one of their own, which says that the engine sleeps.
    rig.take([rig.participant.pauses.resume_unasked()])
    own = rig.resume()
    rig.take(done(rig.calls[-1].call, "", paused=True))  # type: ignore[union-attr]
    assert rig.calls[-1].asked  # type: ignore[union-attr]
    rig.take(done(rig.calls[-1].call, "this engine sleeps"))  # type: ignore[union-attr]
    assert isinstance(rig.answers[own], Error)


def test_a_users_pause_outlasts_an_update_that_resumes_while_the_weights_are_stale() -> None:
    rig = Rig()
    rig.pause()
    rig.paused()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.take(rig.participant.handle(ReplyTo(b"trainer", b"r"), Resume(epoch=1, update="before"), rig.now))
    assert rig.participant.pauses.paused_for == ""


def test_an_engine_in_doubt_is_not_disturbed() -> None:
    rig = Rig()
    rig.begin()
    rig.done("begin")
    rig.prepare()
    rig.done("prepare")
    rig.pause(update="u")
    rig.paused()
    assert rig.participant.on_group_epoch(NEW, 5) == []
    assert rig.participant.stale == ""


def test_an_engine_that_has_the_newest_runs() -> None:
    rig = Rig()
    rig.participant.committed_epoch = 5
    assert rig.participant.on_group_epoch(NEW, 5) == []
    assert rig.participant.on_group_epoch(NEW, 4) == []
    assert rig.state == ("idle", "running")


def test_a_stale_engine_stays_paused_when_a_restarted_directory_knows_less() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.take(rig.participant.on_group_epoch(OLD, 0))
    assert not any(isinstance(call, CallResume) for call in rig.calls)
    assert rig.participant.stale
    assert beat_of(rig.participant, engine_info(0)).epoch == 5, "the next lease is above what was committed"


def test_an_engine_that_commits_below_what_it_has_heard_is_stale_when_it_misses_the_next_update() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 50))
    rig.paused()
    switched(rig)
    assert (rig.participant.stale, rig.participant.committed_epoch) == ("", 1)
    rig.take(rig.participant.on_group_epoch("v9", 2))
    assert rig.participant.stale


def test_a_copy_of_begin_that_comes_after_the_commit_has_failed_begins_nothing() -> None:
    rig = in_state("committing", "paused")
    rig.committed("did not fit")
    refusal = rig.answers[rig.begin()]
    assert isinstance(refusal, Error)
    assert "has ended here" in refusal.message
    assert rig.participant.update is None


def test_a_tainted_engine_does_not_run_again_when_no_engine_is_ahead_any_more() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.paused()
    rig.participant.tainted = "the commit failed"
    rig.participant.committed_epoch = 5
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    assert not any(isinstance(call, CallResume) for call in rig.calls)


def test_a_user_keeps_a_stale_engine_paused() -> None:
    rig = Rig()
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    rig.ask(Pause(epoch=6, mode="keep", kv="keep", timeout=9))
    rig.participant.committed_epoch = 5
    rig.take(rig.participant.on_group_epoch(NEW, 5))
    assert rig.participant.stale == ""
    assert not any(isinstance(call, CallResume) for call in rig.calls)


def switched(rig: Rig) -> None:
    """A whole update."""
    rig.begin()
    rig.done("begin")
    rig.prepare()
    rig.done("prepare")
    rig.pause(update="u")
    rig.paused()
    rig.commit()
    rig.committed()


def test_an_engine_whose_weights_turn_out_wrong_serves_nothing_until_an_update() -> None:
    rig = Rig()
    switched(rig)
    rig.resume()
    rig.resumed()
    rig.participant.weights_mismatch(WeightsMismatch(update="u", rank=0, reason="a was not applied"))
    rig.pass_time(0.1)
    assert isinstance(rig.calls[-1], CallPause)
    rig.paused()
    assert rig.participant.tainted == "worker 0: a was not applied"
    assert "tainted" in str(rig.answers[rig.resume()])
    assert not rig.participant.needs_recovery, "only an update helps"
    rig.begin(update="v")
    rig.done("begin", update="v")
    rig.prepare(update="v")
    rig.done("prepare", update="v")
    rig.pause(kv="recompute", update="v")
    rig.paused()
    rig.commit(update="v")
    rig.committed()
    assert rig.participant.tainted == ""
    rig.resume()
    rig.resumed()
    assert rig.state == ("idle", "running")


def test_weights_that_turn_out_wrong_before_the_resume_are_not_resumed() -> None:
    rig = Rig()
    switched(rig)
    asked = rig.resume()
    rig.participant.weights_mismatch(WeightsMismatch(update="u", rank=0, reason="a was not applied"))
    rig.resumed()
    assert rig.acked(asked)
    rig.pass_time(0.1)
    assert isinstance(rig.calls[-1], CallPause), "it was on its way already"


def test_damage_of_weights_that_are_gone_is_nobodys_business() -> None:
    rig = Rig()
    switched(rig)
    rig.participant.weights_mismatch(WeightsMismatch(update="before", rank=0, reason="a was not applied"))
    assert rig.participant.tainted == ""


def test_agreeing_makes_the_weights_the_groups() -> None:
    rig = Rig()
    assert rig.answers[rig.ask(AdoptEpoch(epoch=9))] == Ack()
    assert rig.participant.committed_epoch == 9
    assert rig.participant.on_group_epoch(NEW, 9) == []
    rig.begin(epoch=9)
    assert isinstance(rig.answers[rig.ask(AdoptEpoch(epoch=10))], Error), "in the midst of an update"
    assert rig.participant.committed_epoch == 9


@pytest.mark.parametrize("unfit", ["tainted", "stale"])
def test_unfit_weights_do_not_become_the_groups(unfit: str) -> None:
    rig = Rig()
    setattr(rig.participant, unfit, "the cause")
    assert rig.refusal(rig.ask(AdoptEpoch(epoch=9))).message == "the cause"
    assert rig.participant.committed_epoch == 0


def test_a_pause_is_orphaned_when_its_holder_is_silent() -> None:
    rig = Rig()
    pause = rig.ask(Pause(epoch=1, mode="keep", kv="keep", timeout=9, holder="h", lease=3))
    rig.take(rig.participant.pauses.pause_done(rig.calls[-1].call, ""))  # type: ignore[union-attr]
    assert rig.answers[pause] == Ack()
    rig.now = 2.0
    assert rig.answers[rig.ask(KeepPaused(holder="h", lease=3))] == Ack()
    assert isinstance(rig.answers[rig.ask(KeepPaused(holder="other", lease=99))], Error)
    rig.take(rig.participant.tick(4.9))
    assert not rig.participant.needs_recovery
    rig.take(rig.participant.tick(5.0))
    assert rig.participant.pauses.orphaned
    assert rig.participant.needs_recovery
    rig.ask(Resume(epoch=1))
    rig.take(rig.participant.pauses.resume_done(rig.calls[-1].call, ""))  # type: ignore[union-attr]
    rig.take(rig.participant.tick(99.0))
    assert not rig.participant.needs_recovery


def test_orphans_are_left_alone_where_they_are_set_so() -> None:
    participant = Participant(OLD, frozenset({0}), resume_orphans=False)
    participant.handle(ReplyTo(b"", b""), Pause(epoch=1, mode="keep", kv="keep", timeout=9, holder="h", lease=3), 0.0)
    participant.tick(100.0)
    assert participant.pauses.orphaned
    assert not participant.needs_recovery


@pytest.mark.parametrize("how", ["resume", "lease"])
def test_a_users_pause_of_a_tainted_engine_ends_like_any_other(how: str) -> None:
    """So that it runs again with the weights of the next update."""
    rig = Rig()
    rig.participant.tainted = "commit failed"
    rig.ask(Pause(epoch=1, mode="keep", kv="keep", timeout=9, holder="h", lease=3))
    rig.take(rig.participant.pauses.pause_done(rig.calls[-1].call, ""))  # type: ignore[union-attr]
    assert rig.participant.pauses.paused_for == ""
    if how == "resume":
        assert isinstance(rig.answers[rig.ask(Resume(epoch=1))], Error)
    else:
        rig.take(rig.participant.tick(3.0))
    assert rig.participant.pauses.paused_for == "stale"
    assert not rig.participant.needs_recovery, "nobody can help but an update"
