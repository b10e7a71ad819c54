"""Updates in which every rank of a trainer sends: real collectives, real receivers, and ranks that fail."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist
from engine_infos import engine_info
from real_receivers import Served, assert_untouched, checkpoint, served, shared_engines, weights
from test_joint import end_lease, mortal, options, ranks

from areal_vllm_ext import InvalidWeights, UpdateAborted
from areal_vllm_ext.client.ranks.agreement import Agreement
from areal_vllm_ext.client.ranks.plan import BeginContext, RankInventory, place_of, plan
from areal_vllm_ext.protocol import TensorMeta, WorkerInfo

if TYPE_CHECKING:
    from ranks import Ranks

__all__ = ["checkpoint", "mortal", "ranks", "served", "shared_engines"]  # the fixtures

SENDERS = ("partitioned", "colocated")


def assert_all_serve(ranks: Ranks, served: Served, seed: int, work: str, **given: object) -> None:
    outcomes = ranks.both(work, **options(seed), **given)
    assert [outcome[:2] for outcome in outcomes] == [("", str(seed))] * 2
    assert served.serves(weights(seed))


@pytest.mark.parametrize("bucket", [300, 1 << 20], ids=["many rounds", "one round"])
@pytest.mark.parametrize(
    ("senders", "work"),
    [
        ("partitioned", "rows"),
        ("partitioned", "own_layers"),
        ("partitioned", "one_has_nearly_all"),
        ("partitioned", "whole"),
        ("colocated", "rows"),
        ("colocated", "whole"),
    ],
)
def test_every_rank_sends(ranks: Ranks, served: Served, senders: str, work: str, bucket: int) -> None:
    for seed in (1, 2):
        served.weights.clear()
        outcomes = ranks.both(work, **options(seed, bucket=bucket), senders=senders)
        assert [outcome[:2] for outcome in outcomes] == [("", str(seed))] * 2
        assert served.serves(weights(seed))
        several = senders == "partitioned" and work != "one_has_nearly_all"
        assert set(served.senders.values()) == {2 if several else 1}


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_parts_go_by_each_transport(ranks: Ranks, served: Served, transport: str) -> None:
    for seed in (3, 4):
        assert_all_serve(ranks, served, seed, "rows", senders="partitioned", transport=transport, staging="host")


FAILURES = {
    "partitioned, a tensor is nowhere": (
        "partitioned",
        "fewer",
        ("InvalidWeights", "InvalidWeights"),
        "1 of 5 tensors are missing: norm",
    ),
    "partitioned, tensors one by one": (
        "partitioned",
        "one_by_one",
        ("InvalidWeights", "InvalidWeights"),
        "needs all tensor names",
    ),
    "partitioned, a value that cannot be": ("partitioned", "not_finite", None, "norm holds NaN"),
    "colocated, a rank lacks tensors": (
        "colocated",
        "own_layers",
        ("InvalidWeights", "InvalidWeights"),
        "rank 0 .* lacks",
    ),
    "colocated, ranks have drifted apart": (
        "colocated",
        "not_in_step",
        ("InvalidWeights", "UpdateAborted"),
        "other weights",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_be_sent_fails_on_every_rank(ranks: Ranks, served: Served, case: str) -> None:
    senders, work, kinds, message = FAILURES[case]
    outcomes = ranks.both(work, **options(5), senders=senders)
    assert all(outcome[0] in ("InvalidWeights", "UpdateAborted") for outcome in outcomes), outcomes
    if kinds:
        assert tuple(outcome[0] for outcome in outcomes) == kinds, outcomes
    assert any(re.search(message, outcome[1]) for outcome in outcomes), outcomes
    assert max(outcome[2] for outcome in outcomes) < 5.0, "by its deadline only"
    assert_untouched(served)
    assert_all_serve(ranks, served, 6, "rows", senders=senders)


@pytest.mark.parametrize("senders", SENDERS)
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_writes_to_what_it_shares_fails_all(
    ranks: Ranks, served: Served, senders: str, failing: int
) -> None:
    work = ["whole", "whole"]
    work[failing] = "writes_to_what_it_shares"
    outcomes = ranks.both(*work, **options(7, timeout=8.0), senders=senders)
    assert [outcome[0] for outcome in outcomes] == ["UpdateAborted"] * 2, outcomes
    assert all("norm was changed before the update was over" in outcome[1] for outcome in outcomes), outcomes
    assert_untouched(served)
    assert_all_serve(ranks, served, 8, "whole", senders=senders)


@pytest.mark.parametrize("senders", SENDERS)
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_in_its_part_fails_all(ranks: Ranks, served: Served, senders: str, failing: int) -> None:
    work = ["whole", "whole"]
    work[failing] = "fails_in_its_part"
    outcomes = ranks.both(*work, **options(7, timeout=8.0), senders=senders)
    assert outcomes[failing][0] == "ZeroDivisionError"
    assert outcomes[1 - failing][0] == "UpdateAborted"
    assert_untouched(served)
    assert_all_serve(ranks, served, 8, "whole", senders=senders)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_to_meet_the_workers_is_not_waited_for(ranks: Ranks, served: Served, failing: int) -> None:
    work = ["whole", "whole"]
    work[failing] = "fails_to_meet"
    outcomes = ranks.both(*work, **options(15), senders="partitioned", transport="broadcast")
    assert outcomes[failing][0] == "ZeroDivisionError"
    assert outcomes[1 - failing][0] == "UpdateAborted"
    assert "division by zero" in outcomes[1 - failing][1]
    assert max(outcome[2] for outcome in outcomes) < 5.0, "by its deadline only"
    assert_untouched(served)
    assert_all_serve(ranks, served, 16, "whole", senders="partitioned")


@pytest.mark.parametrize("senders", SENDERS)
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_is_killed_in_its_part_leaves_no_other_hanging(
    mortal: Ranks, ranks: Ranks, served: Served, senders: str, dying: int
) -> None:
    work = ["whole", "whole"]
    work[dying] = "dies_in_its_part"
    mortal.begin(*work, **options(9, timeout=2.0), senders=senders)
    kind, message, seconds = mortal.outcome(1 - dying)
    assert kind == "UpdateAborted", message
    assert seconds < 6.0
    if dying:
        assert_untouched(served)
    else:
        end_lease(served)
    assert_all_serve(ranks, served, 10, "rows", senders=senders)


@pytest.mark.parametrize("senders", SENDERS)
def test_an_engine_that_refuses_fails_all_ranks_and_the_next_update_works(
    ranks: Ranks, served: Served, senders: str
) -> None:
    engine = served.deployment.engines[1]
    engine.errors["pause"] = "no pause today"
    try:
        outcomes = ranks.both("rows", **options(11), senders=senders)
    finally:
        engine.errors.clear()
    assert [outcome[0] for outcome in outcomes] == ["UpdateAborted"] * 2
    assert all("no pause today" in outcome[1] for outcome in outcomes)
    assert_all_serve(ranks, served, 12, "rows", senders=senders)


def test_workers_that_have_lost_their_connections_get_new_ones(ranks: Ranks, served: Served) -> None:
    assert_all_serve(ranks, served, 13, "rows", senders="partitioned", transport="broadcast")
    for receivers in served.receivers.values():
        for receiver in receivers:
            receiver.context.sources.drop(receiver.context.sources._kept[-1][1])
    assert_all_serve(ranks, served, 14, "rows", senders="partitioned", transport="broadcast")


def agreements(seconds: float) -> list[Agreement]:
    """Of two ranks, in one process."""
    store = dist.HashStore()
    return [Agreement(rank, 2, store, time.monotonic() + seconds) for rank in range(2)]


def test_one_rank_at_a_time_holds_the_lock() -> None:
    first, second = agreements(seconds=10.0)
    at_once = most = 0

    def take(agreement: Agreement) -> None:
        nonlocal at_once, most
        for _ in range(50):
            with agreement.lock():
                at_once += 1
                most = max(most, at_once)
                time.sleep(1e-4)
                at_once -= 1

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(take, one) for one in (first, second)]:
            done.result(timeout=20)
    assert most == 1


def test_a_lock_that_is_not_released_is_given_up_and_its_rank_named() -> None:
    first, second = agreements(seconds=0.2)
    with first.lock():
        with (
            pytest.raises(UpdateAborted, match="rank 0 of the trainer did not finish sending a bucket in time"),
            second.lock(),
        ):
            pass
        first.fail("broken")
        with pytest.raises(UpdateAborted, match="broken"), second.lock():
            pass


# Who sends what


def meta(name: str, size: int = 64) -> TensorMeta:
    return TensorMeta(name, "float32", (size,))


def known(*devices: tuple[str, ...], bucket_bytes: int = 512) -> BeginContext:
    """Engines whose workers are on these devices."""
    engines = {}
    for number, places in enumerate(devices):
        workers = tuple(
            WorkerInfo(rank=rank, node="n/10.0.0.1", pid=1, device="cuda", device_id=place)
            for rank, place in enumerate(places)
        )
        engines[f"engine {number}"] = (engine_info(number, workers=workers), 1)
    return BeginContext(engines, (), "float32", bucket_bytes)


def test_what_several_ranks_have_is_spread_over_them_by_size() -> None:
    sizes = {"a": 4096, "b": 1024, "c": 1024, "d": 1024, "own": 64}
    shared = tuple(meta(name, size) for name, size in sizes.items() if name != "own")
    inventories = [
        RankInventory(shared, "GPU-0", sharded=False),
        RankInventory((*shared, meta("own")), "GPU-1", sharded=False),
        RankInventory((), "GPU-2", sharded=False),
    ]
    made = plan("partitioned", known(("GPU-8", "GPU-9"), bucket_bytes=1 << 20), inventories)
    assert made.sends == [{"a"}, {"b", "c", "d", "own"}, set()]
    assert made.serves == [{"engine 0": (0, 1)}] * 3
    assert made.rounds == [["a", "b", "c", "d", "own"]]


def test_a_round_is_as_large_as_a_bucket() -> None:
    inventories = [RankInventory(tuple(meta(name) for name in "abcde"), "GPU-0", sharded=False)]
    assert plan("partitioned", known(("GPU-0",)), inventories).rounds == [["a", "b"], ["c", "d"], ["e"]]


def test_each_worker_is_served_by_the_rank_on_its_device() -> None:
    inventories = [RankInventory((meta("a"),), f"GPU-{rank}", sharded=False) for rank in range(4)]
    made = plan("colocated", known(("GPU-1", "GPU-0"), ("GPU-2", "GPU-0")), inventories)
    assert made.serves == [{"engine 0": (1,), "engine 1": (1,)}, {"engine 0": (0,)}, {"engine 1": (0,)}, {}]
    assert made.sends == [{"a"}] * 4


def test_workers_of_one_device_are_shared_out_to_the_ranks_there() -> None:
    inventories = [RankInventory((meta("a"),), place_of("cpu", "n"), sharded=False) for _ in range(2)]
    made = plan("colocated", known(("cpu", "cpu")), inventories)
    assert made.serves == [{"engine 0": (0,)}, {"engine 0": (1,)}]


def test_a_worker_without_a_rank_on_its_device_is_named() -> None:
    with pytest.raises(UpdateAborted, match="worker 1 of engine 0 runs on GPU-7, but no rank of the trainer does"):
        plan("colocated", known(("GPU-0", "GPU-7")), [RankInventory((meta("a"),), "GPU-0", sharded=False)])


def test_ranks_that_hold_different_tensors_under_one_name_are_named() -> None:
    inventories = [RankInventory((meta("a", size),), f"GPU-{size}", sharded=False) for size in (4, 5)]
    with pytest.raises(InvalidWeights, match="a has another shape or dtype on rank 1"):
        plan("partitioned", known(("GPU-0",)), inventories)
