"""Faults in the middle of the shipped code: every engine keeps its weights, or the update is only slower."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from real_receivers import (
    Served,
    assert_untouched,
    checkpoint,
    group,
    send,
    served,
    set_bucket_bytes,
    shared_engines,
    weights,
)

from areal_vllm_ext import UpdateAborted
from areal_vllm_ext.observability.fault_points import injected
from areal_vllm_ext.worker.staged_update import StagedUpdate

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from areal_vllm_ext import EngineGroup

__all__ = ["checkpoint", "group", "served", "shared_engines"]  # the fixtures


def fails(error: Exception) -> object:
    def fault(_: int) -> int:
        raise error

    return fault


def slowly(nbytes: int) -> int:
    time.sleep(0.05)
    return nbytes


CAUSE = r"DP rank \d of replica \w+ .*: worker \d: bucket 0: MemoryError: out of memory"


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_a_staging_that_runs_out_of_memory_ends_the_update(served: Served, group: EngineGroup, transport: str) -> None:
    with injected("staging", fails(MemoryError("out of memory"))), pytest.raises(UpdateAborted, match=CAUSE):  # type: ignore[arg-type]
        send(group, weights(1), transport=transport)
    assert_untouched(served)
    send(group, weights(2), version=2, transport=transport)
    assert served.serves(weights(2))


def test_the_cause_is_named_where_the_trainer_first_sees_a_closed_connection(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = StagedUpdate.report

    def late(self: StagedUpdate, step: str, *problem: Any, **more: Any) -> None:
        time.sleep(0.3 if problem else 0.0)
        report(self, step, *problem, **more)

    def one_by_one() -> Iterator[tuple[str, torch.Tensor]]:
        for entry in weights(7).items():
            yield entry
            time.sleep(0.05)

    monkeypatch.setattr(StagedUpdate, "report", late)
    opened = group.update(7, timeout=20.0, transport="broadcast")
    set_bucket_bytes(opened, 256)

    def update() -> None:
        with opened:
            opened.send(one_by_one())

    with injected("staging", fails(MemoryError("out of memory"))), pytest.raises(UpdateAborted, match=CAUSE):  # type: ignore[arg-type]
        update()
    assert_untouched(served)


def test_short_reads_bring_all_bytes(served: Served, group: EngineGroup) -> None:
    read: list[int] = []

    def short(nbytes: int) -> int:
        read.append(nbytes)
        return min(nbytes, 1000)

    with injected("read", short):
        send(group, weights(3), version=3, transport="broadcast")
    assert served.serves(weights(3))
    assert read


def test_a_connection_that_breaks_in_the_middle_ends_the_update(served: Served, group: EngineGroup) -> None:
    send(group, weights(4), version=4, transport="broadcast")
    served.weights.clear()
    with injected("read", fails(ConnectionResetError("reset"))), pytest.raises(UpdateAborted):  # type: ignore[arg-type]
        send(group, weights(5), version=5, transport="broadcast", timeout=10)
    assert served.weights == {}


def test_slow_digests_only_take_time(served: Served, group: EngineGroup) -> None:
    with injected("digest", slowly):
        send(group, weights(6), version=6, transport="shared_memory")
    assert served.serves(weights(6))
