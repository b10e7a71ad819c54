"""Faults in the middle of the shipped code: every engine keeps its weights, or the update is only slower."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from real_receivers import (
    Served,
    assert_untouched,
    checkpoint,
    group,
    send,
    served,
    shared_engines,
    weights,
)

from areal_vllm_ext import UpdateAborted
from areal_vllm_ext.observability.fault_points import injected

if TYPE_CHECKING:
    from areal_vllm_ext import EngineGroup

__all__ = ["checkpoint", "group", "served", "shared_engines"]  # the fixtures


def fails(error: Exception) -> object:
    def fault(_: int) -> int:
        raise error

    return fault


def slowly(nbytes: int) -> int:
    time.sleep(0.05)
    return nbytes


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_a_staging_that_runs_out_of_memory_ends_the_update(served: Served, group: EngineGroup, transport: str) -> None:
    # By broadcast, the trainer may see the connection close before it hears of the cause.
    cause = "out of memory" if transport == "shared_memory" else ""
    with injected("staging", fails(MemoryError("out of memory"))), pytest.raises(UpdateAborted, match=cause):  # type: ignore[arg-type]
        send(group, weights(1), transport=transport)
    assert_untouched(served)
    send(group, weights(2), version=2, transport=transport)
    assert served.serves(weights(2))


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
