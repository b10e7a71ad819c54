"""An engine that joins late, and one that was killed, serve the group's version: a peer has it, and no trainer runs."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from returning import late_replica, leave, state_of_late, wait_until_it_serves

if TYPE_CHECKING:
    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(600)]

BACK_SECONDS = 10.0


def test_an_engine_is_back_by_a_peer(cluster: Cluster, group: EngineGroup) -> None:
    version = cluster.train()
    group.update_weights(cluster.model, version=version, timeout=60)
    expected = cluster.oracle()
    try:
        for number in range(2):
            with late_replica(cluster, number) as late:
                # Its requests wait until it may serve, so the first answers must be right.
                assert late.generated(0) == expected
                assert wait_until_it_serves(group, version, BACK_SECONDS) < BACK_SECONDS
                state = state_of_late(group)
                assert state is not None
                assert state.loaded.startswith("peer: DP rank ")
                assert group.verify(timeout=60).equal
                assert cluster.generated(0) == cluster.generated(1) == expected
                if number == 0:
                    (engine,) = (engine for engine in group.engines() if engine.replica == state.replica)
                    os.kill(engine.pid, signal.SIGKILL)
                else:
                    version = cluster.train()
                    group.update_weights(cluster.model, version=version, timeout=60)
                    assert late.generated(0) == cluster.oracle(), "it takes part in the next update"
    finally:
        leave(group)
    cluster.assert_serves_trainers_weights()
