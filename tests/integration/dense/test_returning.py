"""An engine that joins late, and one that was killed, serve the group's version: a peer has it, and no trainer runs."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from returning import NAME, late_replica, leave, state_of_late, wait_until_it_serves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(450)]

BACK_SECONDS = 10.0


@pytest.fixture
def version(cluster: Cluster, group: EngineGroup) -> Iterator[int]:
    """The version of the group, which is not the checkpoint's. The replica that came late has left afterwards."""
    trained = cluster.train()
    group.update_weights(cluster.model, version=trained, timeout=60)
    yield trained
    leave(group)


def assert_back(late: Cluster, cluster: Cluster, group: EngineGroup, version: int) -> None:
    # Its requests wait until it may serve, so the first answers must be right.
    assert late.generated(0) == cluster.oracle()
    wait_until_it_serves(group, version, BACK_SECONDS)
    state = state_of_late(group)
    assert state is not None
    assert state.loaded.startswith("peer: DP rank ")
    assert group.verify(timeout=60).equal
    cluster.assert_serves_trainers_weights()


def test_an_engine_that_joins_late_serves_what_a_peer_serves(
    cluster: Cluster, group: EngineGroup, version: int
) -> None:
    with late_replica(cluster) as late:
        assert_back(late, cluster, group, version)
        following = cluster.train()
        group.update_weights(cluster.model, version=following, timeout=60)
        assert late.generated(0) == cluster.oracle(), "it takes part in the next update"
        (engine,) = (engine for engine in group.engines() if engine.replica == NAME)
        os.kill(engine.pid, signal.SIGKILL)


def test_an_engine_that_was_killed_is_back_by_a_peer(cluster: Cluster, group: EngineGroup, version: int) -> None:
    with late_replica(cluster, 1) as late:
        assert_back(late, cluster, group, version)
