"""The lease is granted first come, first served."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from areal_vllm_ext.control.lease import MAX_WAITING, PLACE_SECONDS, Leases
from areal_vllm_ext.protocol import AcquireLease, Error, Lease, RenewLease


def ask(leases: Leases, holder: str, now: float, waited: float = 0.0) -> Lease | Error:
    return leases.acquire(AcquireLease(holder=holder, seconds=10.0, waited=waited), now)


def epoch_of(answer: Lease | Error) -> int:
    assert isinstance(answer, Lease), answer
    return answer.epoch


def order(leases: Leases, holders: list[str], now: float) -> list[str]:
    """The order in which waiting clients get the lease, each releasing it at once. All ask, in the given order."""
    served = []
    waiting = list(holders)
    while waiting:
        for holder in list(waiting):
            answer = ask(leases, holder, now)
            if isinstance(answer, Lease):
                leases.release(answer.epoch, now)
                served.append(holder)
                waiting.remove(holder)
        now += 0.05
    return served


def test_clients_are_served_in_the_order_in_which_they_came() -> None:
    leases = Leases(0.0)
    first = epoch_of(ask(leases, "first", 0.0))
    for number, holder in enumerate(("second", "third", "fourth")):
        refusal = ask(leases, holder, 1.0 + number / 10)
        assert isinstance(refusal, Error)
        assert (refusal.kind, refusal.holder) == ("held", "first")
    leases.release(first, 2.0)
    assert order(leases, ["fourth", "third", "first", "second"], 2.0) == ["second", "third", "fourth", "first"]


def test_two_clients_that_always_want_the_lease_alternate() -> None:
    leases = Leases(0.0)
    now, served = 0.0, []
    held: dict[str, int] = {}
    for _ in range(400):
        now += 0.01
        for holder in ("a", "b"):
            if holder in held:
                leases.release(held.pop(holder), now)
            answer = ask(leases, holder, now)
            if isinstance(answer, Lease):
                held[holder] = answer.epoch
                served.append(holder)
    assert len(served) > 100
    assert served == ["a", "b"] * (len(served) // 2) + ["a"] * (len(served) % 2)


def test_a_holder_that_asks_for_its_next_command_goes_behind_those_that_wait() -> None:
    leases = Leases(0.0)
    assert isinstance(ask(leases, "greedy", 0.0), Lease)
    assert isinstance(ask(leases, "patient", 1.0), Error)
    refusal = ask(leases, "greedy", 1.1)  # its release was lost
    assert isinstance(refusal, Error)
    assert "patient has waited for longer" in refusal.message
    assert isinstance(ask(leases, "patient", 1.2), Lease)


def test_a_client_that_stops_asking_loses_its_place() -> None:
    leases = Leases(0.0)
    first = epoch_of(ask(leases, "first", 0.0))
    assert isinstance(ask(leases, "killed", 1.0), Error)
    leases.release(first, 1.1)
    assert isinstance(ask(leases, "third", 1.0 + PLACE_SECONDS), Error)
    assert isinstance(ask(leases, "third", 1.1 + PLACE_SECONDS), Lease)


def test_a_client_that_gives_up_holds_nobody_up() -> None:
    leases = Leases(0.0)
    first = epoch_of(ask(leases, "first", 0.0))
    assert isinstance(ask(leases, "second", 1.0), Error)
    leases.leave("second", 1.1)
    leases.release(first, 1.2)
    assert isinstance(ask(leases, "third", 1.2), Lease)
    leases.leave("third", 1.3)  # its lease was granted to a request whose answer came too late
    assert isinstance(ask(leases, "fourth", 1.4), Lease)


def test_the_order_survives_a_restart_of_the_directory() -> None:
    restarted = Leases(102.5)
    for now in (100.2, 101.0, 102.4):
        for holder, since in (("came last", 99.0), ("came first", 90.0), ("came second", 95.0)):
            refusal = ask(restarted, holder, now, waited=now - since)
            assert isinstance(refusal, Error)
            assert "has just started" in refusal.message
    assert order(restarted, ["came last", "came second", "came first"], 102.5) == [
        "came first",
        "came second",
        "came last",
    ]


def test_the_holder_from_before_a_restart_keeps_the_lease_by_renewing_it() -> None:
    restarted = Leases(102.5)
    restarted.epoch = 41  # the engines brought it back
    assert isinstance(ask(restarted, "waiting", 101.0, waited=5.0), Error)
    assert isinstance(restarted.renew(RenewLease(epoch=41, holder="working", seconds=10.0), 101.5), Lease)
    refusal = ask(restarted, "waiting", 102.6, waited=7.0)
    assert isinstance(refusal, Error)
    assert refusal.holder == "working"
    restarted.release(41, 103.0)
    assert epoch_of(ask(restarted, "waiting", 103.0, waited=7.5)) == 42


def test_a_renewal_that_comes_after_the_release_does_not_bring_the_lease_back() -> None:
    leases = Leases(0.0)
    epoch = epoch_of(ask(leases, "holder", 1.0))
    leases.release(epoch, 2.0)
    assert isinstance(leases.renew(RenewLease(epoch=epoch, holder="holder", seconds=10.0), 2.1), Error)
    assert epoch_of(ask(leases, "next", 2.2)) == epoch + 1


def test_at_most_so_many_wait() -> None:
    leases = Leases(0.0)
    ask(leases, "holder", 0.0)
    for number in range(MAX_WAITING + 10):
        assert isinstance(ask(leases, str(number), 1.0), Error)
    assert len(leases._waiting) == MAX_WAITING


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["ask", "release", "leave", "renew"]), st.floats(0.0, 3.0)),
        max_size=60,
    )
)
def test_there_is_one_holder_at_a_time_and_epochs_rise(steps: list[tuple[str, str, float]]) -> None:
    leases, now, epoch = Leases(0.0), 0.0, 0
    ends: dict[str, tuple[int, float]] = {}
    for holder, what, passed in steps:
        now += passed
        if what == "ask":
            ends.pop(holder, None)  # its last command is over
            answer = ask(leases, holder, now)
            if isinstance(answer, Lease):
                assert not [other for other, (_, until) in ends.items() if other != holder and now < until]
                assert answer.epoch > epoch
                epoch, ends[holder] = answer.epoch, (answer.epoch, now + 10.0)
        elif what == "leave":
            leases.leave(holder, now)
            ends.pop(holder, None)
        elif holder in ends and what == "release":
            leases.release(ends.pop(holder)[0], now)
        elif holder in ends:
            answer = leases.renew(RenewLease(epoch=ends[holder][0], holder=holder, seconds=10.0), now)
            if isinstance(answer, Lease):
                ends[holder] = ends[holder][0], now + 10.0
            else:
                del ends[holder]
