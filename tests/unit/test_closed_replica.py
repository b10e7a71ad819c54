"""The owner of a launched replica gives up its engines when it closes the replica, so that other replicas go on."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import pytest

from areal_vllm_ext import ArealError, EngineGroup
from areal_vllm_ext.launcher.owner import ReplicaOwner, forget_closed
from areal_vllm_ext.launcher.spec import ReplicaSpec
from areal_vllm_ext.launcher.state import DirectoryEndpoint
from areal_vllm_ext.protocol import timing
from harness.simulated_engine import Deployment, Shape, deployed

if TYPE_CHECKING:
    from pathlib import Path

    from areal_vllm_ext.protocol import security


def owner_of(replica: str, directory: DirectoryEndpoint) -> ReplicaOwner:
    """The owner of a replica that joined another one's directory."""
    owner = ReplicaOwner()
    owner._spec, owner._directory, owner._joined = ReplicaSpec(model="none", name=replica), directory, True
    return owner


def test_a_replica_that_is_closed_is_forgotten(
    deployment: Deployment, key: security.ClusterKey, key_file: Path
) -> None:
    directory = DirectoryEndpoint(deployment.directory, key)
    with (
        deployed(key, 2, shape=Shape(replica="second"), directory=deployment.directory) as second,
        EngineGroup.connect(deployment.directory, key_file=key_file) as group,
    ):
        group.wait_ready(4, timeout=10)
        for rank in (0, 1):
            second.stop_engine(rank)  # as SIGKILL does
        with pytest.raises(ArealError, match="replica second"):
            group.pause(timeout=1)

        def later() -> None:
            deployment.clock_skew += timing.LOST_AFTER_SECONDS + 1.0

        threading.Timer(0.7, later).start()
        asyncio.run(owner_of("second", directory).shutdown())
        group.pause(timeout=5)
        group.resume(timeout=5)
        assert {state.replica for state in group.status()} == {"simulated"}


def test_a_replica_whose_engines_said_good_bye_is_not_waited_for(
    deployment: Deployment, key: security.ClusterKey
) -> None:
    started = time.monotonic()
    asyncio.run(forget_closed(DirectoryEndpoint(deployment.directory, key), "second"))
    assert time.monotonic() - started < 2.0


def test_a_replica_whose_engines_do_not_end_is_not_forgotten(
    deployment: Deployment, key: security.ClusterKey, key_file: Path
) -> None:
    asyncio.run(forget_closed(DirectoryEndpoint(deployment.directory, key), "simulated", seconds=1.0))
    with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
        assert len(group.wait_ready(2, timeout=10)) == 2


def test_a_directory_that_has_ended_does_not_keep_the_owner_from_closing(key: security.ClusterKey) -> None:
    owner = owner_of("second", DirectoryEndpoint("tcp://127.0.0.1:9", key))
    asyncio.run(owner.shutdown())
    assert asyncio.run(owner.state()).phase == "ended"
