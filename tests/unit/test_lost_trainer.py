"""A trainer or an engine is lost, and nobody comes after it: the directory settles it, and nothing old is served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from groups import update
from raw_client import RawClient
from waiting import eventually

from areal_vllm_ext import ArealError, EngineGroup, PauseFailed, UpdateAborted, UpdateInDoubt
from areal_vllm_ext.client import driver
from areal_vllm_ext.config import Settings
from areal_vllm_ext.protocol import (
    Abort,
    Ack,
    AcquireLease,
    Begin,
    Commit,
    Disk,
    EngineRequest,
    Fence,
    KeepPaused,
    Lease,
    Pause,
    Prepare,
    Resume,
    Sender,
    security,
)
from areal_vllm_ext.protocol.timing import LOST_AFTER_SECONDS
from harness.simulated_engine import NEVER, Deployment, Shape, deployed

Raw = Callable[..., RawClient]
LEASE = 4.0  # less than LOST_AFTER_SECONDS: no engine seems lost when the clock goes on by as much
# At most this long after a lease has ended everything is settled.
SETTLED = 8.0

pytestmark = pytest.mark.usefixtures("quick_timing")


class Trainer:
    """A trainer that gets as far as it is let, and is heard no more."""

    def __init__(self, deployment: Deployment, raw: Raw) -> None:
        self._deployment = deployment
        lease = raw(deployment.directory).ask(AcquireLease(holder="trainer", seconds=LEASE))
        assert isinstance(lease, Lease)
        self.epoch = lease.epoch
        self._engines = [raw(engine.endpoint.address) for engine in deployment.engines.values()]
        self.ask(Fence(epoch=self.epoch))

    def ask(self, message: EngineRequest, engines: int = 2) -> None:
        for client in self._engines[:engines]:
            client.ask(message)

    def act(self, upto: str, engines: int) -> None:
        """Go as far as the request ``upto``, which reaches ``engines`` of the two."""
        epoch = self.epoch
        steps: dict[str, EngineRequest] = {
            "begin": Begin(
                epoch=epoch, update="u", version=1, senders={0: Sender(transfer=Disk(path="/"))}, timeout=300
            ),
            "prepare": Prepare(epoch=epoch, update="u", buckets={0: 0}),
            "pause": Pause(epoch=epoch, mode="keep", kv="recompute", timeout=300, update="u"),
            "commit": Commit(epoch=epoch, update="u"),
            "resume": Resume(epoch=epoch),
        }
        for name, message in steps.items():
            self.ask(message, engines if name == upto else 2)
            if name == upto:
                return

    def lose_lease(self) -> None:
        """Have the directory's clock go on to the end of the lease."""
        self._deployment.clock_skew += LEASE + 0.1


@pytest.fixture
def ready(deployment: Deployment, key_file: Path) -> Deployment:
    """Engines that the directory knows."""
    with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
        group.wait_ready(2, timeout=10)
    return deployment


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.parametrize(
    ("upto", "version"), [("begin", 0), ("prepare", 0), ("pause", 0), ("commit", 1), ("resume", 1)]
)
def test_the_directory_settles_what_a_trainer_left_when_its_lease_runs_out(
    ready: Deployment, raw: Raw, upto: str, version: int, engines: int
) -> None:
    trainer = Trainer(ready, raw)
    trainer.act(upto, engines)
    trainer.lose_lease()
    both = list(ready.engines.values())

    def settled() -> bool:
        states = [engine.endpoint.participant for engine in both]
        return all(state.update_phase == "idle" and state.generation == "running" for state in states)

    eventually(settled, timeout=SETTLED)
    assert [engine.version for engine in both] == [version, version]
    assert all(engine.running for engine in both)


def test_engines_stay_paused_where_they_are_set_so(key: security.ClusterKey, key_file: Path, raw: Raw) -> None:
    stay = Shape(settings=Settings(trainer_lost="stay_paused"))
    with deployed(key, shape=stay) as two, EngineGroup.connect(two.directory, key_file=key_file) as group:
        group.wait_ready(2, timeout=10)
        trainer = Trainer(two, raw)
        trainer.act("pause", 2)
        trainer.lose_lease()
        eventually(
            lambda: all(e.endpoint.participant.update_phase == "idle" for e in two.engines.values()), timeout=SETTLED
        )
        time.sleep(0.3)  # some more heartbeats
        assert {(state.generation, state.update_phase) for state in group.status()} == {("paused", "idle")}
        with group.update(2, timeout=5) as update:
            update.send("/nowhere")
        assert {(state.generation, state.version) for state in group.status()} == {("running", 2)}


def test_a_live_trainer_is_left_alone(ready: Deployment, raw: Raw, key_file: Path) -> None:
    slow = ready.engines[0]
    slow.seconds["prepare"] = 0.5
    with (
        EngineGroup.connect(ready.directory, key_file=key_file) as group,
        group.update(1, timeout=20) as update,
    ):
        update.send("/nowhere")
    assert update.result.lost == {}


def test_a_pause_ends_with_its_holder(ready: Deployment, key_file: Path) -> None:
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        group.pause(lease=1.0)
        time.sleep(1.5)
        assert {state.generation for state in group.status()} == {"paused"}  # its holder lives
    eventually(lambda: all(engine.running for engine in ready.engines.values()), timeout=1.0 + SETTLED)


def test_a_pause_without_a_lease_stays(ready: Deployment, key_file: Path, raw: Raw) -> None:
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        group.pause(lease=None)
    time.sleep(0.5)
    assert not any(engine.running for engine in ready.engines.values())
    refusal = raw(ready.engines[0].endpoint.address).ask(KeepPaused(holder="somebody", lease=1))
    assert "not paused for somebody" in str(refusal)


def test_an_engine_that_restarts_serves_nothing_old(key: security.ClusterKey, key_file: Path) -> None:
    alone = Shape(settings=Settings(peers="off"))
    with deployed(key, shape=alone) as ready, EngineGroup.connect(ready.directory, key_file=key_file) as group:
        group.wait_ready(2, timeout=10)
        update(group, 1, timeout=5)
        ready.stop_engine(1)
        again = ready.start_engine(1)
        eventually(lambda: not again.running)
        assert [state.update_phase for state in group.status()] == ["idle", "stale"]
        with pytest.raises(PauseFailed, match=r"weights are stale \(the group is at version 1, this engine at 0\)"):
            group.resume(timeout=2)
        update(group, 2, timeout=5)
        assert [(state.update_phase, state.generation, state.version) for state in group.status()] == [
            ("idle", "running", 2)
        ] * 2
        assert again.commits == [(2, True)]


def test_engines_that_all_restart_serve_again(ready: Deployment, key_file: Path) -> None:
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        update(group, 1, timeout=5)
        for rank in (0, 1):
            ready.stop_engine(rank)
        ready.stop_directory()  # it may have heard of the update
        ready.start_directory(port=int(ready.directory.rsplit(":", 1)[1]))
        for rank in (0, 1):
            ready.start_engine(rank)
        now = {engine.endpoint.address for engine in ready.engines.values()}
        eventually(lambda: {engine.address for engine in group.engines()} == now)
        eventually(lambda: [state.generation for state in group.status()] == ["running"] * 2)
        assert [engine.version for engine in ready.engines.values()] == [0, 0]


def test_an_engine_lost_in_the_commit_is_dropped_and_the_others_go_on(ready: Deployment, key_file: Path) -> None:
    stuck = ready.engines[1]
    stuck.seconds["commit"] = NEVER
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        started = time.monotonic()
        # It dies in the commit. One that is heard after it was dropped would belong to the group again.
        dies = threading.Timer(0.5, ready.stop_engine, [1])
        with group.update(1, timeout=2, on_phase=lambda phase: dies.start() if phase == "commit" else None) as opened:
            opened.send("/nowhere")
        assert time.monotonic() - started < 3.0
        assert list(opened.result.lost) == [stuck.name]
        assert ready.engines[0].running
        ready.clock_skew += LOST_AFTER_SECONDS + 1.0
        eventually(lambda: [engine.dp_rank for engine in group.engines()] == [0], timeout=10)
        update(group, 2, timeout=5)
        assert ready.engines[0].version == 2
        again = ready.start_engine(1)
        eventually(lambda: len(group.engines()) == 2)
        eventually(lambda: not again.running)
        update(group, 3, timeout=5)
        assert [(state.update_phase, state.generation, state.version) for state in group.status()] == [
            ("idle", "running", 3)
        ] * 2
        assert [engine.version for engine in ready.engines.values()] == [3, 3]


def test_an_engine_that_was_away_while_the_others_aborted_is_stale(ready: Deployment, raw: Raw, key_file: Path) -> None:
    """It alone heard the commit. The others, with nobody to tell them, agreed to abort."""
    trainer = Trainer(ready, raw)
    trainer.act("commit", 1)
    away, other = ready.engines[0], ready.engines[1]
    ready.stop_engine(0)
    trainer.lose_lease()
    time.sleep(0.5)  # the other engine is heard meanwhile
    ready.clock_skew += LOST_AFTER_SECONDS - LEASE + 0.5
    eventually(lambda: other.endpoint.participant.update_phase == "idle", timeout=SETTLED + 6.0)
    eventually(lambda: other.running)
    assert (away.version, other.version) == (1, 0)
    participant = other.endpoint.participant
    assert participant.committed_epoch > 1, "they did not agree anew"


@pytest.mark.parametrize("phase", ["prepare", "pause", "commit"])
def test_an_engine_that_ends_says_why(
    ready: Deployment, key_file: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process ends by itself, because a worker was lost, for example."""
    monkeypatch.setattr(driver, "_ABORT_SECONDS", 0.2)
    ready.engines[1].seconds[phase] = NEVER
    if phase == "commit":
        ready.engines[0].errors["commit"] = "out of memory"

    def end(reached: str) -> None:
        if reached == phase:
            threading.Timer(
                0.3, ready.engines[1].endpoint.stop, ["its process ends (RuntimeError: Executor failed.)"]
            ).start()

    with (
        EngineGroup.connect(ready.directory, key_file=key_file) as group,
        pytest.raises(ArealError, match=r"pid .*: its process ends \(RuntimeError: Executor failed.\)"),
        group.update(1, timeout=1.5, on_phase=end) as opened,
    ):
        opened.send("/nowhere")


def test_commits_that_nobody_answers_are_an_error_of_their_own(ready: Deployment, key_file: Path) -> None:
    for engine in ready.engines.values():
        engine.seconds["commit"] = 2.0
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        started = time.monotonic()
        with (
            pytest.raises(UpdateInDoubt, match="all other engines commit, or none"),
            group.update(1, timeout=1) as opened,
        ):
            opened.send("/nowhere")
        assert time.monotonic() - started < 2.0
        eventually(lambda: all(engine.running for engine in ready.engines.values()), timeout=8)
        assert [engine.version for engine in ready.engines.values()] == [1, 1]


def test_the_answer_to_a_commit_may_be_lost(ready: Deployment, raw: Raw) -> None:
    trainer = Trainer(ready, raw)
    trainer.act("commit", 2)
    client = raw(ready.engines[0].endpoint.address)
    assert isinstance(client.ask(Commit(epoch=trainer.epoch, update="u")), Ack)
    assert ready.engines[0].commits == [(1, True)]


def test_the_directory_leaves_engines_alone_that_are_settled(
    ready: Deployment, key_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beats from the midst of an update come, or count, until the next ones: they are no reason to fence anybody."""
    ready.engines[0].seconds["prepare"] = 0.3  # so that beats tell of an update
    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        update(group, 1, timeout=5)
        epoch = ready.engines[0].endpoint.participant.epoch
        time.sleep(0.5)
    assert ready.engines[0].endpoint.participant.epoch == epoch
    assert "was gone" not in caplog.text


@pytest.mark.parametrize("committed", [0, 1])
def test_a_trainer_that_slept_through_its_lease_hears_what_became_of_its_update(
    ready: Deployment, key_file: Path, raw: Raw, committed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have paused when it falls asleep. A successor settles; its own commits are refused when it wakes up."""
    monkeypatch.setattr(driver, "_SILENT_SECONDS", 0.0)

    def successor_comes(phase: str) -> None:
        if phase != "commit":
            return
        lease = raw(ready.directory).ask(AcquireLease(holder=group._group._commander.holder, seconds=5))
        assert isinstance(lease, Lease)
        for number, engine in enumerate(ready.engines.values()):
            client, update = raw(engine.endpoint.address), engine.endpoint.participant.update
            assert update is not None
            if number < committed:
                client.ask(Commit(epoch=update.begin.epoch, update=update.begin.update))
            client.ask(Fence(epoch=lease.epoch))
        for engine in ready.engines.values():
            client, update = raw(engine.endpoint.address), engine.endpoint.participant.update
            if update is not None:
                name = update.begin.update
                settle = (
                    Commit(epoch=lease.epoch, update=name)
                    if committed
                    else Abort(epoch=lease.epoch, update=name, reason="gone")
                )
                client.ask(settle)
            client.ask(Resume(epoch=lease.epoch))

    with EngineGroup.connect(ready.directory, key_file=key_file) as group:
        opened = group.update(1, timeout=10, on_phase=successor_comes)
        if committed:
            with opened:
                opened.send("/nowhere")
            assert opened.result.lost == {}
        else:
            with (
                pytest.raises(UpdateAborted, match=r"was given up: gone.*has not renewed its lease for \d+\.\d s"),
                opened,
            ):
                opened.send("/nowhere")
        assert {engine.version for engine in ready.engines.values()} == {committed}
