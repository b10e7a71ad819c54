"""Updates that two ranks of a trainer send together: real collectives (gloo), real receivers, and one rank that fails."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from ranks import Ranks, adapter_tensors
from real_receivers import Served, assert_untouched, checkpoint, served, shared_engines, weights

from areal_vllm_ext.protocol import timing
from areal_vllm_ext.worker.adapters.store import AdapterStore

if TYPE_CHECKING:
    from harness.simulated_engine import Deployment

__all__ = ["checkpoint", "served", "shared_engines"]  # the fixtures


def options(seed: int, timeout: float = 20.0, bucket: int = 300) -> dict[str, object]:
    return {"seed": seed, "timeout": timeout, "bucket": bucket}


def start(deployment: Deployment, key_file: Path) -> Ranks:
    from areal_vllm_ext.demo.deployment import free_ports

    return Ranks(free_ports(1)[0], deployment.directory, os.fspath(key_file))


@pytest.fixture(scope="module")
def ranks(shared_engines: Served, key_file: Path) -> Iterator[Ranks]:
    """For tests after which both are in step again."""
    pair = start(shared_engines.deployment, key_file)
    yield pair
    pair.close()


@pytest.fixture
def mortal(served: Served, key_file: Path) -> Iterator[Ranks]:
    pair = start(served.deployment, key_file)
    yield pair
    pair.close()


def end_lease(served: Served) -> None:
    """Have the directory's clock go on to the end of a lease of 10 s, whose holder was killed.

    In steps, with a heartbeat after each: an engine that was not heard for 5 s would be lost.
    """
    for _ in range(3):
        served.deployment.clock_skew += 3.5
        time.sleep(timing.HEARTBEAT_SECONDS + 0.1)


def assert_works(ranks: Ranks, served: Served, seed: int, work: str = "rows", bucket: int = 300) -> None:
    outcomes = ranks.both(work, **options(seed, bucket=bucket))
    assert [outcome[:2] for outcome in outcomes] == [("", str(seed))] * 2
    assert served.serves(weights(seed))


@pytest.mark.parametrize("bucket", [300, 1 << 20], ids=["many rounds", "one round"])
@pytest.mark.parametrize("work", ["fsdp", "rows", "columns", "one_by_one", "in_double", "whole"])
def test_weights_are_gathered_where_they_are_sharded_and_every_rank_has_the_result(
    ranks: Ranks, served: Served, work: str, bucket: int
) -> None:
    for seed in (1, 2):
        assert_works(ranks, served, seed, work, bucket)


@pytest.mark.parametrize("work", ["with_adapter", "adapter_alone"])
def test_an_adapter_is_gathered_too(ranks: Ranks, served: Served, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterStore, "load", lambda _, __, given, ___: dict(given))
    outcomes = ranks.both(work, **options(7))
    assert [outcome[:2] for outcome in outcomes] == [("", "7")] * 2
    assert served.adapters
    for held in served.adapters.values():
        assert all(torch.equal(held["math"][name], one) for name, one in adapter_tensors(7).items())
    for engine in served.deployment.engines.values():
        assert list(engine.endpoint.participant.adapters) == ["math"]
        engine.endpoint.participant.adapters = {}


FAILURES = {
    "rank 0 finds a value that cannot be": (("not_finite",), "InvalidWeights", "UpdateAborted", "norm holds NaN"),
    "rank 0 fails while the iterators gather": (
        ("gathers_at_each_step",),
        "InvalidWeights",
        "UpdateAborted",
        "embed holds NaN",
    ),
    "rank 0 lacks a tensor": (("fewer",), "InvalidWeights", "UpdateAborted", "1 of 5 tensors are missing: norm"),
    "rank 0 raises": (("raises", "one_by_one"), "ZeroDivisionError", "UpdateAborted", "ZeroDivisionError"),
    "rank 1 raises": (("one_by_one", "raises"), "UpdateAborted", "ZeroDivisionError", "rank 1 .* ZeroDivisionError"),
    "rank 1 raises after it has sent": (
        ("rows", "raises_afterwards"),
        "UpdateAborted",
        "ZeroDivisionError",
        "rank 1 .* ZeroDivisionError",
    ),
    "rank 1 raises and hides it": (
        ("one_by_one", "raises_and_hides_it"),
        "UpdateAborted",
        "UpdateAborted",
        "rank 1 .* ZeroDivisionError",
    ),
    "rank 0 raises after it has sent": (
        ("raises_afterwards", "rows"),
        "ZeroDivisionError",
        "UpdateAborted",
        "rank 0 .* ZeroDivisionError",
    ),
    "the ranks have other tensors": (("rows", "fewer"), "UpdateAborted", "UpdateAborted", "has other tensors than"),
    "one rank has parts, the other all": (
        ("whole_where_others_have_rows", "rows"),
        "UpdateAborted",
        "UpdateAborted",
        "has other tensors than",
    ),
    "no rank sends": (("sends_nothing",), "InvalidWeights", "UpdateAborted", "the update sent nothing"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_rank_that_fails_fails_all_at_once_and_the_next_update_works(ranks: Ranks, served: Served, case: str) -> None:
    work, first, second, message = FAILURES[case]
    outcomes = ranks.both(*work, **options(3))
    assert [outcome[0] for outcome in outcomes] == [first, second], outcomes
    told = [text for kind, text, _ in outcomes if kind == "UpdateAborted"]
    assert all(re.search(message, text) for text in told), told
    assert max(outcome[2] for outcome in outcomes) < 5.0, "by its deadline only"
    assert_untouched(served)
    assert_works(ranks, served, 4)


def test_an_engine_that_votes_no_fails_all_ranks(ranks: Ranks, served: Served) -> None:
    engine = served.deployment.engines[1]
    engine.errors["pause"] = "no pause today"
    try:
        outcomes = ranks.both("rows", **options(5))
    finally:
        engine.errors.clear()
    assert [outcome[0] for outcome in outcomes] == ["UpdateAborted"] * 2
    assert all("no pause today" in outcome[1] for outcome in outcomes)
    assert served.weights == {}
    assert_works(ranks, served, 6)


def test_a_rank_that_is_killed_leaves_no_other_hanging(mortal: Ranks, served: Served) -> None:
    mortal.begin("one_by_one", "dies", **options(7, timeout=2.0))
    kind, message, seconds = mortal.outcome(0)
    assert kind == "UpdateAborted", message
    assert seconds < 6.0
    assert_untouched(served)


def test_rank_0_that_is_killed_leaves_no_other_hanging_and_engines_recover(
    mortal: Ranks, ranks: Ranks, served: Served
) -> None:
    mortal.begin("dies", "one_by_one", **options(7, timeout=2.0))
    kind, message, seconds = mortal.outcome(1)
    assert kind == "UpdateAborted", message
    assert seconds < 6.0
    end_lease(served)
    assert_works(ranks, served, 8)


def test_a_rank_that_never_comes_is_named(mortal: Ranks, served: Served) -> None:
    os.kill(mortal.pids[1] or 0, signal.SIGSTOP)
    mortal.begin("whole", **options(9, timeout=1.5))
    kind, message, seconds = mortal.outcome(0)
    assert kind == "UpdateAborted"
    assert "did not agree in time: rank 1 of the trainer did not come to step 1" in message
    assert seconds < 6.0
    assert_untouched(served)


@pytest.mark.parametrize("stalling", [0, 1])
def test_a_rank_that_stalls_is_given_up_by_all(mortal: Ranks, served: Served, stalling: int) -> None:
    work = ["one_by_one", "one_by_one"]
    work[stalling] = "waits"
    mortal.begin(*work, **options(9, timeout=1.5))
    mortal.heard(stalling, "waiting")
    for rank in range(2):
        kind, _, seconds = mortal.outcome(rank)
        assert kind == "UpdateAborted"
        assert seconds < 4.5
    assert_untouched(served)


def test_a_rank_that_is_stuck_in_a_collective_is_given_up_by_its_deadline(mortal: Ranks, served: Served) -> None:
    mortal.begin("rows", "leaves_the_collective", **options(9, timeout=1.5, bucket=1 << 20))
    mortal.heard(1, "left")
    for rank in range(2):
        kind, message, seconds = mortal.outcome(rank)
        assert kind == "UpdateAborted"
        assert "a collective after it did not end" in message
        assert seconds < 4.5
    assert_untouched(served)
