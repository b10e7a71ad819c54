"""A replica of its own that joins a running group late: one engine on the other node, with the group's directory."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from cluster import Cluster

from areal_vllm_ext.demo.deployment import Deployment, Node

if TYPE_CHECKING:
    from collections.abc import Iterator

    from areal_vllm_ext import EngineGroup, EngineState

NAME = "late"


@contextlib.contextmanager
def late_replica(cluster: Cluster, number: int = 0) -> Iterator[Cluster]:
    """Start the replica, wait until vLLM is up, and end it with the context. It keeps its name, so each start is a restart."""
    node = cluster.deployment.nodes[1]
    env = {**node.env, "AREAL_VLLM_DIRECTORY": cluster.deployment.directory, "AREAL_VLLM_REPLICA": NAME}
    logs = cluster.deployment.log_dir / f"{NAME}-{number}"
    deployment = Deployment(cluster.deployment.model_dir, [Node(node.address, node.prefix, env)], log_dir=logs)
    with deployment:
        deployment.wait(timeout=240)
        yield Cluster(deployment, cluster.model, cluster.key_file, cluster.two_nodes)


def state_of_late(group: EngineGroup) -> EngineState | None:
    return next((state for state in group.status() if state.replica == NAME), None)


def wait_until_it_serves(group: EngineGroup, version: object, seconds: float) -> float:
    """Wait until the replica serves ``version``; return how long that took."""
    started = time.monotonic()
    while (state := state_of_late(group)) is None or (state.version, state.generation) != (version, "running"):
        assert time.monotonic() - started < seconds, f"not back within {seconds} s: {state}"
        time.sleep(0.05)
    return time.monotonic() - started


def leave(group: EngineGroup) -> None:
    """Wait until the group has no such replica any more, which may have been killed."""
    ends = time.monotonic() + 30
    while state_of_late(group) is not None:
        assert time.monotonic() < ends, "the replica does not leave"
        time.sleep(0.2)
        with contextlib.suppress(Exception):
            group.forget(NAME)
