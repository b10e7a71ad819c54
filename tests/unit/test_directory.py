"""The directory: who is there, who is lost, and who may command."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import pytest
from engine_infos import engine_info
from raw_client import RawClient
from waiting import eventually

from areal_vllm_ext import protocol
from areal_vllm_ext.control.awake_clock import LONGEST_STEP_SECONDS, AwakeClock
from areal_vllm_ext.control.directory import Directory, new_incarnation
from areal_vllm_ext.control.membership import describe_missing
from areal_vllm_ext.protocol import (
    Ack,
    AcquireLease,
    Discover,
    EngineInfo,
    Engines,
    Error,
    Forget,
    Lease,
    Pause,
    Register,
    Registered,
    ReleaseLease,
    RenewLease,
    Welcome,
)
from areal_vllm_ext.protocol.timing import FORGOTTEN_AFTER_SECONDS, HEARTBEAT_SECONDS, LOST_AFTER_SECONDS

if TYPE_CHECKING:
    from harness.simulated_engine import Deployment

Raw = Callable[..., RawClient]


def engine(rank: int = 0, incarnation: str = "1", replica: str = "replica") -> EngineInfo:
    return engine_info(rank, replica=replica, incarnation=incarnation)


def beat(
    directory: Directory, info: EngineInfo, now: float, epoch: int = 0, *, committed_epoch: int = 0, stale: bool = False
) -> protocol.Answer:
    message = Register(engine=info, epoch=epoch, committed_epoch=committed_epoch, stale=stale)
    return directory.handle(message, now)


def seen(directory: Directory, now: float) -> Engines:
    answer = directory.handle(Discover(), now)
    assert isinstance(answer, Engines)
    return answer


def acquire(directory: Directory, holder: str, now: float, seconds: float = 10.0) -> protocol.Answer:
    return directory.handle(AcquireLease(holder=holder, seconds=seconds), now)


def granted(directory: Directory, holder: str, now: float, seconds: float = 10.0) -> int:
    """The epoch of a lease that must be granted."""
    answer = acquire(directory, holder, now, seconds)
    assert isinstance(answer, Lease), answer
    assert answer.seconds == seconds
    return answer.epoch


# Who is there


def test_engines_are_told_by_replica_and_rank() -> None:
    directory = Directory()
    for info in (engine(1, replica="z"), engine(1), engine(0)):
        assert isinstance(beat(directory, info, 0.0), Registered)
    assert seen(directory, 0.0).alive == (engine(0), engine(1), engine(1, replica="z"))


def test_an_engine_that_is_silent_is_lost_and_says_since_when() -> None:
    directory = Directory()
    beat(directory, engine(), 100.0)
    assert seen(directory, 100.0 + LOST_AFTER_SECONDS).alive == (engine(),)
    later = seen(directory, 100.0 + LOST_AFTER_SECONDS + 0.5)
    assert later.alive == ()
    assert later.lost == ((engine(), LOST_AFTER_SECONDS + 0.5),)
    assert LOST_AFTER_SECONDS == 5.0


def test_a_lost_engine_that_beats_again_is_alive() -> None:
    directory = Directory()
    beat(directory, engine(), 0.0)
    assert seen(directory, 20.0).lost
    beat(directory, engine(), 20.0)
    assert seen(directory, 20.0) == Engines(alive=(engine(),))


def test_a_lost_engine_stays_named_until_a_user_gives_it_up() -> None:
    directory = Directory()
    beat(directory, engine(0), 0.0)
    beat(directory, engine(1), 86_400.0)
    assert seen(directory, 86_400.0).lost == ((engine(0), 86_400.0),)
    answer = directory.handle(Forget(replica="replica", dp_rank=0), 86_400.0)
    assert answer == Engines(alive=(engine(1),), forgotten=(("replica", 0),))
    assert describe_missing(seen(directory, 86_400.0)) == ""
    beat(directory, engine(0, incarnation="2"), 86_401.0)
    assert seen(directory, 86_401.0) == Engines(alive=(engine(0, incarnation="2"), engine(1))), "it came back"


def test_a_whole_replica_is_given_up_at_once() -> None:
    directory = Directory()
    for rank in (0, 1):
        beat(directory, engine(rank), 0.0)
        beat(directory, engine(rank, replica="other"), 100.0)
    answer = directory.handle(Forget(replica="replica"), 100.0)
    assert isinstance(answer, Engines)
    assert answer.forgotten == (("replica", 0), ("replica", 1))
    assert describe_missing(answer) == ""


def test_a_rank_that_a_restarted_directory_never_heard_of_can_be_given_up() -> None:
    directory = Directory()
    beat(directory, engine(0), 0.0)
    assert "DP rank 1 of replica replica never registered" in describe_missing(seen(directory, 0.0))
    directory.handle(Forget(replica="replica", dp_rank=1), 0.0)
    assert describe_missing(seen(directory, 0.0)) == ""


def test_an_engine_that_is_alive_is_not_given_up_and_an_unknown_replica_is_named() -> None:
    directory = Directory()
    for rank in (0, 1):
        beat(directory, engine(rank), float(rank))
    for request in (Forget(replica="replica", dp_rank=1), Forget(replica="replica")):
        refusal = directory.handle(request, 5.5)
        assert isinstance(refusal, Error)
        assert "DP rank 1 of replica replica" in refusal.message
        assert "is alive: stop it" in refusal.message
    refusal = directory.handle(Forget(replica="typo"), 5.5)
    assert isinstance(refusal, Error)
    assert refusal.message == "this directory knows no replica typo"
    assert seen(directory, 5.5).forgotten == ()


def test_a_directory_that_is_full_makes_room_by_removing_the_long_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_vllm_ext.control.directory.MOST_ENGINES", 2)
    directory = Directory()
    for rank in (0, 1):
        beat(directory, engine(rank), 0.0)
    assert isinstance(beat(directory, engine(0, replica="new"), FORGOTTEN_AFTER_SECONDS), Error)
    assert isinstance(beat(directory, engine(0, replica="new"), FORGOTTEN_AFTER_SECONDS + 1), Registered)


def test_a_restarted_engine_replaces_its_former_incarnation() -> None:
    directory = Directory()
    beat(directory, engine(incarnation="1"), 0.0)
    beat(directory, engine(incarnation="2"), 1.0)
    assert seen(directory, 1.0) == Engines(alive=(engine(incarnation="2"),))


def test_a_late_beat_of_a_former_incarnation_does_not_bring_it_back() -> None:
    directory = Directory()
    beat(directory, engine(incarnation="2"), 0.0)
    refusal = beat(directory, engine(incarnation="1"), 1.0)
    assert isinstance(refusal, Error)
    assert refusal.kind == "state"
    assert seen(directory, 1.0).alive == (engine(incarnation="2"),)


def test_two_replicas_of_one_name_are_reported_with_the_setting() -> None:
    directory = Directory()
    beat(directory, engine(incarnation="1"), 0.0)
    beat(directory, engine(incarnation="2"), 0.0)
    refusal = beat(directory, engine(incarnation="1"), 1.0)
    assert isinstance(refusal, Error)
    assert "AREAL_VLLM_REPLICA" in refusal.message
    assert seen(directory, 1.0).displaced == (engine(incarnation="1"),)
    assert seen(directory, 1.0 + LOST_AFTER_SECONDS + 0.1).displaced == (), "its process has ended meanwhile"


def test_a_lost_engine_is_replaced_by_whoever_comes_however_its_clock_goes() -> None:
    directory = Directory()
    beat(directory, engine(incarnation="2"), 0.0)
    now = LOST_AFTER_SECONDS + 1.0
    assert isinstance(beat(directory, engine(incarnation="1"), now), Registered)
    assert seen(directory, now).alive == (engine(incarnation="1"),)


def test_incarnations_sort_by_their_start() -> None:
    assert new_incarnation(1.0) < new_incarnation(1.001) < new_incarnation(1e9) < new_incarnation(1e11)


# Who may command


def test_a_lease_is_for_one_holder() -> None:
    directory = Directory()
    epoch = granted(directory, "first", 0.0)
    refusal = acquire(directory, "second", 4.0)
    assert isinstance(refusal, Error)
    assert (refusal.kind, refusal.holder, refusal.epoch) == ("held", "first", epoch)
    assert "first commands these engines" in refusal.message
    assert "6.0 s" in refusal.message


def test_a_lease_ends_by_itself_and_the_next_epoch_is_higher() -> None:
    directory = Directory()
    epoch = granted(directory, "dead", 0.0)
    assert isinstance(acquire(directory, "next", 9.999), Error)
    assert granted(directory, "next", 10.0) > epoch


def test_a_renewed_lease_goes_on() -> None:
    directory = Directory()
    epoch = granted(directory, "first", 0.0)
    assert directory.handle(RenewLease(epoch=epoch, holder="first", seconds=10.0), 9.0) == Lease(
        epoch=epoch, seconds=10.0
    )
    assert isinstance(acquire(directory, "second", 18.0), Error)
    assert isinstance(acquire(directory, "second", 19.0), Lease)


def test_a_lease_that_another_got_cannot_be_renewed() -> None:
    directory = Directory()
    epoch = granted(directory, "slow", 0.0)
    newer = granted(directory, "next", 10.0)
    refusal = directory.handle(RenewLease(epoch=epoch, holder="first", seconds=10.0), 11.0)
    assert isinstance(refusal, Error)
    assert (refusal.kind, refusal.epoch) == ("fenced", newer)


def test_a_released_lease_is_free_at_once_and_only_its_own_holder_releases_it() -> None:
    directory = Directory()
    first = granted(directory, "first", 0.0)
    directory.handle(ReleaseLease(epoch=first), 1.0)
    second = granted(directory, "second", 1.0)
    directory.handle(ReleaseLease(epoch=first), 2.0)  # late, or twice
    assert isinstance(acquire(directory, "third", 2.0), Error)
    assert second > first


def test_every_lease_has_an_epoch_of_its_own() -> None:
    directory = Directory()
    epochs = [granted(directory, "same", float(now)) for now in range(5)]
    assert epochs == sorted(set(epochs)), "the same holder twice: its older commands must be fenced too"


def test_the_epoch_exceeds_what_the_engines_have_seen() -> None:
    """A restarted directory begins at 0: its engines bring the epoch back."""
    directory = Directory()
    beat(directory, engine(0), 0.0, epoch=41)
    beat(directory, engine(1), 0.0, epoch=7)
    assert granted(directory, "trainer", 0.0) == 42


def test_a_lease_that_was_granted_before_a_restart_can_be_renewed_after_it() -> None:
    directory = Directory()
    beat(directory, engine(), 0.0, epoch=41)
    assert directory.handle(RenewLease(epoch=41, holder="trainer", seconds=10.0), 0.0) == Lease(epoch=41, seconds=10.0)
    assert isinstance(acquire(directory, "other", 5.0), Error)


def test_no_epoch_is_too_large_for_an_answer() -> None:
    directory = Directory()
    encoded = protocol.encoder.encode(Register(engine=engine(), epoch=2**64 - 1))
    try:
        request = protocol.directory_decoder.decode(encoded)
    except msgspec.ValidationError:
        return
    protocol.encoder.encode(directory.handle(request, 0.0))


@pytest.mark.parametrize("seconds", [float("inf"), 1e300])
def test_no_lease_is_for_ever(seconds: float) -> None:
    directory = Directory()
    encoded = protocol.encoder.encode(AcquireLease(holder="h", seconds=seconds))
    try:
        directory.handle(protocol.directory_decoder.decode(encoded), 0.0)
    except msgspec.ValidationError:
        return
    assert isinstance(acquire(directory, "next", 86_400.0), Lease)


# Behind its socket


def test_a_directory_that_restarts_knows_its_engines_and_their_epoch_within_two_seconds(
    deployment: Deployment, raw: Raw
) -> None:
    client = raw(deployment.engines[0].endpoint.address)
    assert isinstance(client.ask(Pause(epoch=17, mode="keep", kv="keep", timeout=5.0)), Ack)
    asking = raw(deployment.directory)
    eventually(lambda: len(asking.ask(Discover()).alive) == 2)  # type: ignore[union-attr]
    deployment.stop_directory()
    port = int(deployment.directory.rpartition(":")[2])
    assert deployment.start_directory(port) == deployment.directory
    again = raw(deployment.directory)
    eventually(lambda: len(again.ask(Discover()).alive) == 2, timeout=2.0)  # type: ignore[union-attr]
    lease = again.ask(AcquireLease(holder="trainer", seconds=1.0))
    assert isinstance(lease, Lease)
    assert lease.epoch == 18


def test_an_engine_is_told_of_once_its_workers_have_attached(deployment: Deployment, raw: Raw) -> None:
    client = raw(deployment.directory)

    def alive() -> tuple[EngineInfo, ...]:
        answer = client.ask(Discover())
        assert isinstance(answer, Engines)
        return answer.alive

    eventually(lambda: len(alive()) == 2)
    for info in alive():
        assert [worker.rank for worker in info.workers] == [0]
        assert info.address == deployment.engines[info.dp_rank].endpoint.address


def test_an_engine_that_restarts_takes_its_place_back(deployment: Deployment, raw: Raw) -> None:
    client = raw(deployment.directory)

    def incarnations() -> dict[int, str]:
        answer = client.ask(Discover())
        assert isinstance(answer, Engines)
        return {info.dp_rank: info.incarnation for info in answer.alive}

    eventually(lambda: len(incarnations()) == 2)
    before = incarnations()
    deployment.stop_engine(1)
    deployment.start_engine(1)
    eventually(lambda: incarnations()[1] > before[1])
    assert incarnations()[0] == before[0]


def test_an_engine_whose_name_is_taken_says_so_in_its_log(
    deployment: Deployment, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    client = raw(deployment.directory)
    eventually(lambda: len(client.ask(Discover()).alive) == 2)  # type: ignore[union-attr]
    usurper = msgspec.structs.replace(deployment.engines[0].endpoint.info, incarnation="9")
    assert isinstance(client.ask(Register(engine=usurper, epoch=0)), Registered)
    eventually(lambda: "took the place of" in caplog.text)
    eventually(lambda: client.ask(Discover()).displaced)  # type: ignore[union-attr]


def test_a_directory_answers_hello(deployment: Deployment, raw: Raw) -> None:
    welcome = raw(deployment.directory).ask(protocol.Hello())
    assert isinstance(welcome, Welcome)
    assert welcome.engine is None


def test_a_directory_answers_a_malformed_request_and_goes_on(deployment: Deployment, raw: Raw) -> None:
    client = raw(deployment.directory)
    client.send(os.urandom(16), protocol.encoder.encode(protocol.GetStatus()))
    answer = client.answer()
    assert isinstance(answer, Error)
    assert answer.kind == "malformed"
    assert isinstance(client.ask(Discover()), Engines)
    assert HEARTBEAT_SECONDS < LOST_AFTER_SECONDS / 2, "one lost beat must not make an engine lost"


# What the engines agreed on, and what a client has left


def told(directory: Directory, rank: int, now: float, **beat: object) -> protocol.Answer:
    return directory.handle(Register(engine=engine(rank), epoch=0, **beat), now)  # type: ignore[arg-type]


def test_engines_hear_of_the_newest_update_that_any_of_them_ever_had() -> None:
    directory = Directory()
    told(directory, 0, 0.0, version="v2", committed_epoch=7)
    assert told(directory, 1, 0.0, version="v0", committed_epoch=0) == Registered(version="v2", committed_epoch=7)
    restarted = msgspec.structs.replace(engine(0), incarnation="2")
    answer = directory.handle(Register(engine=restarted, epoch=0, version="v0"), 1.0)
    assert answer == Registered(version="v2", committed_epoch=7), "nobody is left who has it, but it was served"
    directory.handle(protocol.Unregister(engine=restarted), 2.0)
    assert told(directory, 1, 3.0, version="v0", committed_epoch=0) == Registered(version="v2", committed_epoch=7)
    assert told(directory, 1, 4.0, version="v3", committed_epoch=8) == Registered(version="v3", committed_epoch=8)


def test_a_directory_that_has_just_started_first_listens() -> None:
    directory = Directory(started=100.0, settle_seconds=2.5)
    assert told(directory, 0, 102.4) == Ack()
    assert isinstance(told(directory, 0, 102.5), Registered)


def test_recovery_is_due_when_no_lease_is_in_force_and_an_engine_says_so_since() -> None:
    directory = Directory()
    for rank in (0, 1):
        told(directory, rank, 1.0, needs_recovery=False)  # both have joined
    granted(directory, "trainer", 10.0, seconds=10.0)
    for rank in (0, 1):
        told(directory, rank, 19.0, needs_recovery=True)
    assert not directory.recovery_due(19.9)
    assert not directory.recovery_due(20.5), "what was told while the lease was in force may be settled since"
    told(directory, 0, 20.6, needs_recovery=True)
    assert directory.recovery_due(20.6)
    told(directory, 0, 21.6, needs_recovery=False)
    assert not directory.recovery_due(21.6)


def test_an_engine_that_is_lost_asks_for_nothing() -> None:
    directory = Directory()
    for rank in (0, 1):
        told(directory, rank, 1.0, needs_recovery=True)
    assert directory.recovery_due(1.0 + LOST_AFTER_SECONDS)
    assert not directory.recovery_due(1.1 + LOST_AFTER_SECONDS)


def test_a_directory_that_has_just_started_waits_for_ranks_that_it_has_not_heard_of() -> None:
    directory = Directory(started=100.0)
    told(directory, 0, 101.0, needs_recovery=True)
    assert not directory.recovery_due(101.0)
    told(directory, 0, 100.1 + LOST_AFTER_SECONDS, needs_recovery=True)
    assert directory.recovery_due(100.1 + LOST_AFTER_SECONDS)
    fresh = Directory(started=100.0)
    for rank in (0, 1):
        told(fresh, rank, 101.0, needs_recovery=True)
    assert fresh.recovery_due(101.0)


def test_an_engine_that_says_farewell_is_gone_but_not_its_successor() -> None:
    directory = Directory()
    successor = msgspec.structs.replace(engine(0), incarnation="2")
    directory.handle(Register(engine=successor, epoch=0), 0.0)
    assert directory.handle(protocol.Unregister(engine=engine(0)), 0.0) == Ack()
    assert seen(directory, 0.0).alive == (successor,)
    assert directory.handle(protocol.Unregister(engine=successor), 0.0) == Ack()
    assert seen(directory, 0.0) == Engines(alive=())


def joining(directory: Directory, now: float) -> list[int]:
    answer = directory.handle(Discover(), now)
    assert isinstance(answer, Engines)
    return [info.dp_rank for info in answer.joining]


def test_nobody_joins_while_a_client_is_at_work_nor_before_all_have_told_what_it_did() -> None:
    directory = Directory()
    told(directory, 0, 1.0)
    granted(directory, "trainer", 2.0, seconds=10.0)
    assert told(directory, 1, 3.0) == Ack()
    assert joining(directory, 3.0) == [1]
    assert [info.dp_rank for info in seen(directory, 3.0).alive] == [0]
    told(directory, 0, 3.9)  # before it switched
    directory.handle(ReleaseLease(epoch=1), 4.0)
    assert told(directory, 1, 4.1) == Ack(), "rank 0 has not told what it serves since"
    told(directory, 0, 4.9, version="v1", committed_epoch=1)  # may have been on its way for long
    assert told(directory, 1, 5.0) == Ack()
    told(directory, 0, 5.9, version="v1", committed_epoch=1)
    assert told(directory, 1, 6.0) == Registered(version="v1", committed_epoch=1)
    assert joining(directory, 6.0) == []
    granted(directory, "trainer", 7.0)
    assert isinstance(told(directory, 1, 7.5), Registered), "who has joined stays"


def test_one_that_is_lost_holds_nobody_up() -> None:
    directory = Directory()
    told(directory, 0, 1.0)
    granted(directory, "trainer", 2.0)
    directory.handle(ReleaseLease(epoch=1), 4.0)
    assert told(directory, 1, 5.9) == Ack()
    assert isinstance(told(directory, 1, 1.1 + LOST_AFTER_SECONDS), Registered)


def test_a_restarted_engine_joins_anew() -> None:
    directory = Directory()
    told(directory, 0, 1.0)
    granted(directory, "trainer", 2.0)
    successor = msgspec.structs.replace(engine(0), incarnation="2")
    assert directory.handle(Register(engine=successor, epoch=0), 2.5) == Ack()
    assert joining(directory, 2.5) == [0]


def test_time_stands_still_for_a_directory_that_is_stopped() -> None:
    """It has not read the heartbeats of that time yet, so nobody is lost, no lease is over, and it has not settled."""
    reading = [100.0]
    clock = AwakeClock(lambda: reading[0])
    assert clock() == 100.0
    reading[0] += 0.2
    assert clock() == pytest.approx(100.2)
    reading[0] += 3600.0
    assert clock() == pytest.approx(100.2 + LONGEST_STEP_SECONDS)
    reading[0] += 0.2
    assert clock() == pytest.approx(100.4 + LONGEST_STEP_SECONDS)


def test_a_directory_that_was_stopped_settles_before_an_engine_joins() -> None:
    reading = [0.0]
    clock = AwakeClock(lambda: reading[0])
    directory = Directory(clock(), settle_seconds=2.5)
    reading[0] = 60.0
    assert told(directory, 0, clock()) == Ack(), "the engine that knows the newest version may be next in the queue"
    assert told(directory, 1, clock(), version="v1", committed_epoch=1) == Ack()
    for _ in range(4):
        reading[0] += 0.5
        clock()
    assert told(directory, 0, clock()) == Registered(version="v1", committed_epoch=1)


def test_an_engine_joins_though_clients_command_without_a_break() -> None:
    """Each client comes later than the engine, so the engine is first; the client gets the lease after it."""
    directory = Directory()
    beat(directory, engine(0), 0.0)
    lease = granted(directory, "client", 0.5)
    waits_since, granted_at, joined_at = 0.0, 0.0, 0.0
    for tick in range(20, 400):
        now = tick / 20
        if tick % 20 == 0:
            beat(directory, engine(0), now)
            joined_at = joined_at or (isinstance(beat(directory, engine(1), now), Registered) and now) or 0.0
        if lease:
            directory.handle(ReleaseLease(epoch=lease), now)
            lease, waits_since = 0, now
        message = AcquireLease(holder="client", seconds=10.0, waited=now - waits_since)
        answer = directory.handle(message, now)
        if isinstance(answer, Lease):
            lease, granted_at = answer.epoch, granted_at or (joined_at and now)
        elif not joined_at:
            assert isinstance(answer, Error)
            assert (answer.kind, answer.message) == (
                "held",
                f"{engine(1).name} has just started, or fetched its weights, and joins first",
            )
    assert 1.0 <= joined_at <= 4.0
    assert joined_at <= granted_at < joined_at + 0.2


def test_an_engine_that_has_fetched_its_weights_serves_them_though_clients_command_without_a_break() -> None:
    directory = Directory()
    beat(directory, engine(0), 0.0, epoch=3, committed_epoch=3)
    beat(directory, engine(1), 0.0)
    lease = granted(directory, "first", 0.5)

    def fetched(now: float) -> bool:
        beat(directory, engine(0), now, epoch=3, committed_epoch=3)
        answer = beat(directory, engine(1), now, epoch=3, committed_epoch=3, stale=True)
        return isinstance(answer, Registered) and answer.settled

    assert not fetched(0.9)
    directory.handle(ReleaseLease(epoch=lease), 1.0)
    refusal = acquire(directory, "second", 1.1)
    assert isinstance(refusal, Error)
    assert "joins first" in refusal.message
    assert not fetched(1.9)
    assert fetched(2.9)
    assert isinstance(acquire(directory, "second", 3.0), Lease)


def test_a_stale_engine_that_has_fetched_nothing_holds_no_client_up() -> None:
    directory = Directory()
    beat(directory, engine(0), 0.0, epoch=3, committed_epoch=3)
    beat(directory, engine(1), 0.0)
    lease = granted(directory, "first", 0.5)
    beat(directory, engine(1), 0.9, stale=True)
    directory.handle(ReleaseLease(epoch=lease), 1.0)
    assert isinstance(acquire(directory, "second", 1.1), Lease)


def test_a_client_that_came_before_an_engine_is_not_held_up_by_it() -> None:
    directory = Directory()
    beat(directory, engine(0), 0.0)
    first = granted(directory, "first", 0.5)
    assert isinstance(acquire(directory, "second", 1.0), Error)
    assert isinstance(beat(directory, engine(1), 1.5), protocol.Ack)
    directory.handle(ReleaseLease(epoch=first), 2.0)
    assert isinstance(directory.handle(AcquireLease(holder="second", seconds=10.0, waited=1.0), 2.0), Lease)


@pytest.mark.parametrize("ends", ["lost", "unregistered"])
def test_an_engine_that_ends_before_it_joins_holds_no_client_up(ends: str) -> None:
    directory = Directory()
    beat(directory, engine(0), 0.0)
    granted(directory, "first", 0.5)
    assert isinstance(beat(directory, engine(1), 1.0), protocol.Ack)
    directory.handle(protocol.LeaveQueue(holder="first"), 1.5)
    refusal = acquire(directory, "second", 2.0)
    assert isinstance(refusal, Error)
    assert "joins first" in refusal.message
    if ends == "lost":
        granted(directory, "second", 1.1 + LOST_AFTER_SECONDS)
    else:
        directory.handle(protocol.Unregister(engine=engine(1)), 2.1)
        granted(directory, "second", 2.2)


def test_ranks_that_compute_together_serve_when_all_of_them_have_the_weights() -> None:
    directory = Directory()
    moe = [msgspec.structs.replace(engine(rank), lockstep=True) for rank in (0, 1)]
    beat(directory, msgspec.structs.replace(engine(0), replica="another"), 0.0, epoch=3, committed_epoch=3)
    for info in moe:
        beat(directory, info, 0.1)

    def settled(info: EngineInfo, committed_epoch: int, now: float) -> bool:
        answer = beat(directory, info, now, epoch=3, committed_epoch=committed_epoch, stale=True)
        assert isinstance(answer, Registered)
        return answer.settled

    assert not settled(moe[0], 3, 1.0)
    assert settled(moe[1], 3, 1.1)
    assert settled(moe[0], 3, 2.0)
    assert not settled(moe[1], 0, 2.1), "restarted since"
    assert not settled(moe[0], 3, 3.0)
    assert settled(moe[0], 3, 9.0), "a rank that is lost stops its replica anyway"
