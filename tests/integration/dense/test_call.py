"""Calls of a user's own method on real workers, headless ones too; and sleep, which a CPU does not have."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from areal_vllm_ext import CallFailed, SleepFailed

if TYPE_CHECKING:
    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_a_users_method_runs_on_every_worker(cluster: Cluster, group: EngineGroup) -> None:
    answers = group.call("describe", 2, ["x"]).answers
    assert [(answer.dp_rank, answer.rank) for answer in answers] == [(0, 0), (1, 0)]
    assert {answer.value["rank"] for answer in answers} == {0}
    assert [answer.value["arguments"] for answer in answers] == [[2, ["x"]]] * 2
    assert len({answer.value["pid"] for answer in answers}) == 2


def test_an_exception_is_an_answer_and_the_engines_go_on(cluster: Cluster, group: EngineGroup) -> None:
    for answer in group.call("fail", "no").answers:
        assert (answer.error_type, answer.error) == ("ValueError", "no")
    for method in ("get_model", "determine_available_memory"):
        assert {answer.error_type for answer in group.call(method).answers} == {"LookupError"}
    assert cluster.generated(1) == cluster.generated(0)


def test_a_method_that_blocks_ends_the_call_in_time(cluster: Cluster, group: EngineGroup) -> None:
    started = time.monotonic()
    with pytest.raises(CallFailed, match="did not answer the call in time"):
        group.call("block", 3.0, timeout=1.0)
    assert time.monotonic() - started < 2.0
    assert len(group.call("describe", timeout=30).answers) == 2
    assert time.monotonic() - started > 3.0, "when the workers were free"


def test_a_call_runs_while_engines_generate(cluster: Cluster, group: EngineGroup) -> None:
    expected = cluster.generated(0, tokens=64)
    found: list[object] = []
    asking = threading.Thread(target=lambda: found.append(cluster.generated(0, tokens=64)))
    asking.start()
    while asking.is_alive():
        assert not group.call("describe", lease=False, timeout=30).errors
    assert found == [expected]


def test_engines_without_sleep_mode_refuse_before_anything_is_done(cluster: Cluster, group: EngineGroup) -> None:
    with pytest.raises(SleepFailed, match=r"nothing was done: .*: start it with --enable-sleep-mode, on a GPU"):
        group.sleep()
    group.wake_up()
    assert {(state.sleep, state.generation) for state in group.status()} == {("awake", "running")}
