"""Engines that are killed; these tests are the last because they leave no deployment for others."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from cluster import Cluster, process_of

from areal_vllm_ext import EnginesMissing, EngineUnreachable

if TYPE_CHECKING:
    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(400)]


def test_killed_headless_engine_is_named(cluster: Cluster, group: EngineGroup) -> None:
    engine = group.engines()[1]
    os.kill(engine.pid, signal.SIGKILL)
    started = time.monotonic()
    while group.engines()[-1].dp_rank == 1 and time.monotonic() - started < 10:
        time.sleep(0.2)
    with pytest.raises(EnginesMissing, match=r"DP rank 1 .*is lost"), group.update("never", timeout=10) as update:
        update.send(cluster.model)
    assert time.monotonic() - started < 11
    states = group.status()
    assert [state.generation for state in states] == ["running", "unreachable"]
    assert process_of(engine.workers[0].pid) in ("", "Z") or time.monotonic() - started < 15


def test_killed_head_engine_is_named(cluster: Cluster) -> None:
    with cluster.connect() as group:
        (engine,) = group.engines()
        os.kill(engine.pid, signal.SIGKILL)
        time.sleep(1)
        started = time.monotonic()
        with pytest.raises(EngineUnreachable, match="directory"):
            group.pause("keep", timeout=3)
        assert time.monotonic() - started < 4
