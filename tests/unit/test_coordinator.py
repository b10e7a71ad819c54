"""The trainer's side of an update: who is asked what, and what comes of a no, of silence and of a loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from areal_vllm_ext.client.coordinator import Coordinator, Member
from areal_vllm_ext.protocol import (
    Abort,
    Ack,
    Begin,
    Commit,
    Disk,
    EngineRequest,
    Error,
    Pause,
    Prepare,
    Resume,
    Sender,
    Weights,
)

LEFT = 9.0
NAMES = ("a", "b", "c")
PHASES_BEFORE_COMMIT = ("begin", "send", "prepare", "pause")
NO = Error(kind="failed", message="no room")


class Trainer:
    """Drives a coordinator: what it asks goes to ``asked``."""

    def __init__(self, **running: bool) -> None:
        members = {name: Member(epoch=number, running=running.get(name, True)) for number, name in enumerate(NAMES, 5)}
        self.coordinator = Coordinator("u", "v1", members)
        self.asked: dict[str, EngineRequest] = {}
        self.all_asked: list[tuple[str, EngineRequest]] = []
        self.take(self.coordinator.begin({name: {0: Sender(transfer=Disk(path="/"))} for name in NAMES}, timeout=LEFT))

    def take(self, requests: dict[str, EngineRequest]) -> None:
        if requests:
            self.asked = requests
            self.all_asked += requests.items()

    def answer(self, name: str, answer: object = Ack()) -> None:
        self.take(self.coordinator.answered(name, answer, LEFT))  # type: ignore[arg-type]

    def silence(self, name: str) -> None:
        self.take(self.coordinator.silent(name, "did not answer", LEFT))

    def all_agree(self) -> None:
        for name in sorted(self.coordinator.awaited):
            self.answer(name)

    def to(self, phase: str) -> Trainer:
        """Go on, with every engine agreeing, until ``phase``."""
        while self.coordinator.phase != phase:
            if self.coordinator.phase == "send":
                self.take(self.coordinator.sent(buckets={0: 3}))
            else:
                self.all_agree()
        return self

    def requests(self, kind: type[EngineRequest]) -> list[str]:
        return [name for name, request in self.all_asked if isinstance(request, kind)]


def test_every_engine_is_asked_step_by_step_and_commit_comes_after_the_last_pause() -> None:
    trainer = Trainer()
    for phase, kind in (
        ("begin", Begin),
        ("prepare", Prepare),
        ("pause", Pause),
        ("commit", Commit),
        ("resume", Resume),
    ):
        trainer.to(phase)
        assert sorted(trainer.asked) == list(NAMES)
        assert {type(request) for request in trainer.asked.values()} == {kind}
        assert [trainer.asked[name].epoch for name in NAMES] == [5, 6, 7], "each has its own directory's epoch"
        asked = dict(trainer.asked)
        for name in NAMES[:-1]:
            trainer.answer(name)
            assert trainer.asked == asked, f"{phase} went on before the last engine answered"
            assert trainer.coordinator.phase == phase
    trainer.to("done")
    assert trainer.coordinator.committed == list(NAMES)
    assert trainer.coordinator.lost == {}
    assert trainer.coordinator.reason == ""


def test_requests_carry_what_the_update_was_asked_for() -> None:
    members = {"a": Member(epoch=1)}
    coordinator = Coordinator("u", "v1", members, mode="abort", kv="keep")
    begin = coordinator.begin({"a": {0: Sender(transfer=Disk(path="/x"))}}, timeout=LEFT)["a"]
    assert begin == Begin(
        epoch=1, update="u", version="v1", senders={0: Sender(transfer=Disk(path="/x"))}, timeout=LEFT
    )
    assert coordinator.answered("a", Ack(), LEFT) == {}
    assert coordinator.sent({0: 4}) == {"a": Prepare(epoch=1, update="u", buckets={0: 4})}
    assert coordinator.answered("a", Ack(), 3.0) == {
        "a": Pause(epoch=1, mode="abort", kv="keep", timeout=3.0, update="u")
    }
    assert coordinator.answered("a", Ack(), LEFT) == {"a": Commit(epoch=1, update="u")}


def test_an_update_is_held_after_the_votes_until_it_is_committed_or_given_up() -> None:
    for ending in ("commit", "give up"):
        trainer = Trainer().to("send")
        trainer.take(trainer.coordinator.sent(buckets={0: 3}, hold=True))
        trainer.all_agree()
        assert trainer.coordinator.phase == "prepared"
        assert trainer.requests(Pause) == [], "nothing is sent while it is held"
        if ending == "commit":
            trainer.take(trainer.coordinator.commit(LEFT))
            trainer.to("done")
            assert trainer.coordinator.committed == list(NAMES)
        else:
            trainer.take(trainer.coordinator.give_up("not today"))
            trainer.to("done")
            assert trainer.requests(Pause) == trainer.requests(Commit) == []
            assert trainer.coordinator.committed == []


def test_an_update_that_is_to_be_held_is_aborted_by_a_no() -> None:
    trainer = Trainer().to("send")
    trainer.take(trainer.coordinator.sent(buckets={0: 3}, hold=True))
    no(trainer)
    assert trainer.coordinator.phase == "abort"


def no(trainer: Trainer) -> None:
    trainer.answer("b", NO)


def nonsense(trainer: Trainer) -> None:
    trainer.answer("b", Weights(tensors=()))


def silence(trainer: Trainer) -> None:
    trainer.silence("b")


@pytest.mark.parametrize("trouble", [no, nonsense, silence])
@pytest.mark.parametrize("answered_before", [0, 2])
@pytest.mark.parametrize("phase", ["begin", "prepare", "pause"])
def test_one_no_or_silence_before_the_commit_aborts_everywhere(
    phase: str, answered_before: int, trouble: Callable[[Trainer], None]
) -> None:
    trainer = Trainer().to(phase)
    for name in ("a", "c")[:answered_before]:
        trainer.answer(name)
    trouble(trainer)
    assert trainer.coordinator.phase == "abort"
    assert trainer.coordinator.reason.startswith("b: ")
    assert sorted(trainer.asked) == list(NAMES), "also those that have not answered: they may have heard"
    assert {type(request) for request in trainer.asked.values()} == {Abort}
    assert trainer.requests(Commit) == []
    trainer.to("done")
    assert trainer.coordinator.committed == []
    assert sorted(trainer.requests(Resume)) == (list(NAMES) if phase == "pause" else [])


@pytest.mark.parametrize("phase", PHASES_BEFORE_COMMIT)
def test_the_trainer_can_give_up_until_it_commits(phase: str) -> None:
    trainer = Trainer().to(phase)
    trainer.take(trainer.coordinator.give_up("Ctrl-C"))
    trainer.to("done")
    assert sorted(trainer.requests(Abort)) == list(NAMES)
    assert trainer.requests(Commit) == []
    assert trainer.coordinator.reason == "Ctrl-C"


@pytest.mark.parametrize("phase", ["commit", "resume", "done"])
def test_there_is_no_way_back_from_the_first_commit_on(phase: str) -> None:
    trainer = Trainer().to(phase)
    with pytest.raises(AssertionError):
        trainer.coordinator.give_up("too late")


@pytest.mark.parametrize("aborted", [False, True])
def test_only_those_run_again_that_ran_before(aborted: bool) -> None:
    trainer = Trainer(b=False).to("pause")
    assert sorted(trainer.requests(Pause)) == list(NAMES), "one that was paused pauses too: in the update's mode"
    if aborted:
        trainer.answer("c", NO)
    trainer.to("done")
    assert sorted(trainer.requests(Resume)) == ["a", "c"]


def test_an_update_whose_time_is_over_when_all_have_paused_is_given_up() -> None:
    trainer = Trainer().to("pause")
    for name in NAMES[:-1]:
        trainer.answer(name)
    trainer.take(trainer.coordinator.answered(NAMES[-1], Ack(), 0.0))
    assert "its timeout was over" in trainer.coordinator.reason
    assert {type(request) for request in trainer.asked.values()} == {Abort}


@pytest.mark.parametrize(("manifests", "base"), [("mmm", "m"), ("mmn", ""), (("m", "m", ""), "")])
def test_changes_need_one_base_on_all_engines(manifests: str, base: str) -> None:
    trainer = Trainer()
    for name, manifest in zip(NAMES, manifests, strict=True):
        trainer.answer(name, Ack(manifest=manifest))
    assert trainer.coordinator.base == base


@pytest.mark.parametrize("aborted", [False, True])
def test_an_engine_that_is_behind_runs_only_after_a_commit(aborted: bool) -> None:
    coordinator = Coordinator("u", "v1", {"a": Member(5), "b": Member(5, behind=True)})
    senders = {name: {0: Sender(transfer=Disk(path="/"))} for name in ("a", "b")}
    requests = coordinator.begin(senders, timeout=LEFT)
    while coordinator.phase != "pause":
        requests = coordinator.sent(buckets={0: 3}) if coordinator.phase == "send" else requests
        for name in sorted(coordinator.awaited):
            requests = coordinator.answered(name, Ack(), LEFT) or requests
    coordinator.answered("a", NO if aborted else Ack(), LEFT)
    while coordinator.phase in ("pause", "commit", "abort") and not any(
        isinstance(request, Resume) for request in requests.values()
    ):
        for name in sorted(coordinator.awaited):
            requests = coordinator.answered(name, Ack(), LEFT) or requests
    assert sorted(name for name, request in requests.items() if isinstance(request, Resume)) == (
        ["a"] if aborted else ["a", "b"]
    )


@pytest.mark.parametrize("aborted", [False, True])
def test_engines_that_did_not_run_are_not_resumed(aborted: bool) -> None:
    trainer = Trainer(a=False, b=False, c=False).to("pause")
    if aborted:
        trainer.answer("c", NO)
    trainer.to("done")
    assert trainer.requests(Resume) == []


@pytest.mark.parametrize("trouble", [no, nonsense, silence])
def test_an_engine_lost_at_commit_is_dropped_and_reported_and_stays_paused(trouble: Callable[[Trainer], None]) -> None:
    trainer = Trainer().to("commit")
    trainer.answer("a")
    trouble(trainer)
    trainer.answer("c")
    assert trainer.coordinator.phase == "resume"
    trainer.to("done")
    assert trainer.coordinator.committed == ["a", "c"]
    assert list(trainer.coordinator.lost) == ["b"]
    assert trainer.requests(Resume) == ["a", "c"], "it must not run on old weights"
    assert trainer.requests(Abort) == []
    assert trainer.coordinator.reason == ""


@pytest.mark.parametrize("trouble", [no, silence])
def test_an_engine_lost_at_resume_is_reported(trouble: Callable[[Trainer], None]) -> None:
    trainer = Trainer().to("resume")
    trouble(trainer)
    trainer.to("done")
    assert list(trainer.coordinator.lost) == ["b"]
    assert trainer.coordinator.committed == list(NAMES)


def test_if_every_engine_is_lost_at_commit_none_committed() -> None:
    trainer = Trainer().to("commit")
    for name in NAMES:
        trainer.silence(name)
    assert trainer.coordinator.phase == "done"
    assert trainer.coordinator.committed == []
    assert list(trainer.coordinator.lost) == list(NAMES)


def test_where_every_engine_refuses_the_commit_the_update_is_aborted() -> None:
    trainer = Trainer().to("commit")
    for name in NAMES:
        trainer.answer(name, Error(kind="state", message="somebody else resumed this engine"))
    assert trainer.coordinator.phase == "abort"
    assert trainer.requests(Abort) == list(NAMES)
    trainer.to("done")
    assert trainer.coordinator.committed == []
    assert "a: somebody else resumed this engine" in trainer.coordinator.reason
    assert trainer.coordinator.commit_sent


@pytest.mark.parametrize("kind", ["busy", "fenced", "silent"])
def test_an_engine_that_may_still_commit_keeps_the_update_from_being_aborted(kind: str) -> None:
    trainer = Trainer().to("commit")
    trainer.answer("a", NO)
    trainer.answer("c", NO)
    if kind == "silent":
        trainer.silence("b")
    else:
        trainer.answer("b", Error(kind=kind, message="another client"))  # type: ignore[arg-type]
    assert trainer.coordinator.phase == "done"
    assert trainer.requests(Abort) == []


def test_abort_goes_on_whatever_the_engines_answer() -> None:
    trainer = Trainer().to("pause")
    trainer.answer("a", NO)
    trainer.answer("a", NO)
    trainer.silence("b")
    trainer.answer("c")
    assert sorted(trainer.asked) == list(NAMES)
    assert {type(request) for request in trainer.asked.values()} == {Resume}
    trainer.silence("a")
    trainer.answer("b", NO)
    trainer.answer("c")
    assert trainer.coordinator.phase == "done"


@pytest.mark.parametrize("phase", ["begin", "prepare", "pause", "commit", "resume"])
def test_a_second_answer_or_one_of_a_stranger_changes_nothing(phase: str) -> None:
    trainer = Trainer().to(phase)
    trainer.answer("a")
    before = (trainer.coordinator.phase, trainer.coordinator.awaited, list(trainer.coordinator.committed))
    trainer.answer("a")
    trainer.answer("a", NO)
    trainer.silence("a")
    trainer.answer("stranger", NO)
    assert (trainer.coordinator.phase, trainer.coordinator.awaited, trainer.coordinator.committed) == before
    assert trainer.coordinator.awaited == {"b", "c"}
