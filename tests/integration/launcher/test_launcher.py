"""The launcher on a real Ray cluster of two nodes; servers that are cheaper than vLLM, unless a test is about vLLM itself."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray

from areal_vllm_ext import LaunchError
from areal_vllm_ext.errors import SettingsError
from areal_vllm_ext.launcher import HTTPServerLauncher, Placement, Replica, launch, launch_async
from areal_vllm_ext.process import supervisor
from harness.leftovers import Footprint, processes
from harness.network import missing

if TYPE_CHECKING:
    from harness.ray_cluster import RayCluster

pytestmark = [
    pytest.mark.ray,
    pytest.mark.netns,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

STUBBORN = (sys.executable, str(Path(__file__).parents[3] / "chaos" / "stubborn_server.py"))
# For tests that are not about the end: it ends on SIGTERM, instead of 5 s later on SIGKILL.
POLITE = {"AREAL_TEST_POLITE": "1"}
TWO_NODES = Placement.deferred(nodes=2, devices_per_node=1, resource="CPU")


class Trainer:
    def node(self) -> str:
        return str(ray.util.get_node_ip_address())


def stubborn(placement: Placement = TWO_NODES, **settings: Any) -> Replica:
    settings = {"worker_extension": None, "command": STUBBORN, "timeout": 90, **settings}
    return launch("none", placement, data_parallel_size=placement.bundles, **settings)


def wait_for(condition: Any, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.1)


def assert_free(cluster: RayCluster) -> None:
    """All devices can be had again."""
    wait_for(lambda: ray.available_resources().get("CPU", 0) == 2)


def test_nodes_ranks_and_the_end(cluster: RayCluster) -> None:
    with stubborn() as replica:
        head, headless = replica.nodes
        assert {head.address, headless.address} == set(cluster.namespaces.addresses.values())
        assert replica.url.startswith(f"http://{head.address}:")
        assert "--data-parallel-size 2" in head.last_lines
        assert "--data-parallel-size-local 1" in head.last_lines
        assert "--headless" in headless.last_lines
        assert "--data-parallel-start-rank 1" in headless.last_lines
        for line in (head.last_lines, headless.last_lines):
            assert replica.directory.key.secret.decode() not in line
        footprint = Footprint.of(replica.name)
        assert len(footprint.processes) >= 4
    assert footprint.left(cluster.namespaces) == []
    assert_free(cluster)


def test_async_form(cluster: RayCluster) -> None:
    async def use() -> str:
        settings: dict[str, Any] = {
            "worker_extension": None,
            "command": STUBBORN,
            "timeout": 90,
            "env": POLITE,
            "data_parallel_size": 2,
        }
        async with await launch_async("none", TWO_NODES, **settings) as replica:
            return replica.name

    assert not processes(asyncio.run(use()))


def test_existing_group_is_used_and_kept(cluster: RayCluster) -> None:
    group = TWO_NODES.reserve()
    with stubborn(TWO_NODES.within(group, [1, 0]), env=POLITE) as replica:
        table = ray.util.placement_group_table(group)["bundles_to_node_id"]
        by_id = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        assert [node.address for node in replica.nodes] == [by_id[table[1]], by_id[table[0]]]
    assert ray.util.placement_group_table(group)["state"] == "CREATED"
    ray.util.remove_placement_group(group)


def test_killed_server_starts_again_at_the_same_url(cluster: RayCluster) -> None:
    with stubborn(restart="replica", env=POLITE) as replica:
        url, (_, headless) = replica.url, replica.nodes
        node = Path(f"/proc/{headless.pid}/ns/net").readlink()
        # Server, grandchild and supervisor.
        killed = [pid for pid in processes(replica.name) if Path(f"/proc/{pid}/ns/net").readlink() == node]
        memory = supervisor.shared_memory(killed)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: replica.status().restarts == 1 and replica.status().phase == "serving", 60)
        assert replica.url == url
        assert "headless-1" in replica.status().error
    assert not processes(replica.name)
    assert memory
    assert not any(Path(path).exists() for path in memory), "its supervisor was killed, so its owner has to remove it"


def test_killed_node_is_named_and_the_others_end(cluster: RayCluster) -> None:
    with stubborn() as replica:
        os.kill(replica.nodes[1].pid, signal.SIGKILL)
        wait_for(lambda: replica.status().phase == "failed", 15)
        assert "headless-1 on 10.77.0." in replica.status().error
        # The supervisor of the node that was killed ends its process tree by itself, after SIGTERM within 5 s.
        wait_for(lambda: not processes(replica.name), 10)
    assert_free(cluster)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"data_parallel_size": 3}, SettingsError, "DP 3 x TP 1 x PP 1 are 3 devices, but it has 2 x 1"),
        ({"vllm_args": ("--port=8000",)}, SettingsError, "vLLM argument --port=8000: .*leave it out"),
        ({"restart": "node"}, SettingsError, "vLLM takes no lost node back"),
        ({"placement": Placement.shared(2, resource="CPU")}, SettingsError, "'shared' is for trainer ranks"),
        (
            {"placement": Placement.deferred(2, 4, resource="CPU"), "data_parallel_size": 8},
            LaunchError,
            "the cluster is too small: asked for 2 bundle.s. of 4 CPU .STRICT_SPREAD.; 10.77.0.. has 1, 10.77.0.. has 1",
        ),
        ({"model": "/no/such/model"}, LaunchError, "node 10.77.0..: there is no /no/such/model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(cluster: RayCluster, settings: Any, error: Any, says: str) -> None:
    wanted = {"model": "none", "placement": TWO_NODES, "data_parallel_size": 2, "worker_extension": None, **settings}
    with pytest.raises(error, match=says) as raised:
        launch(**wanted, command=STUBBORN, timeout=60)
    assert "\n" not in str(raised.value)
    assert_free(cluster)


def test_colocated_shares_bundles_with_trainers(cluster: RayCluster) -> None:
    place = Placement.colocated(2, worker_share=0.4, resource="CPU")
    group = place.reserve()
    trainers = [ray.remote(Trainer).options(**place.options(group, rank, 0.5)).remote() for rank in range(2)]
    with launch(
        "none",
        place.within(group),
        tensor_parallel_size=2,
        worker_extension=None,
        command=STUBBORN,
        env=POLITE,
        timeout=90,
    ) as replica:
        assert [node for node, _ in replica.status().devices] == ray.get([one.node.remote() for one in trainers])
        assert "--tensor-parallel-size 2 --distributed-executor-backend ray" in replica.nodes[0].last_lines
        environ = Path(f"/proc/{min(processes(replica.name))}/environ").read_text().split("\0")
        assert "VLLM_RAY_BUNDLE_INDICES=0,1" in environ
        assert "VLLM_RAY_PER_WORKER_GPUS=0.4" in environ
        assert f"AREAL_VLLM_PLACEMENT_GROUP={group.id.hex()}" in environ
    ray.util.remove_placement_group(group)
    assert_free(cluster)


def test_scale_adds_a_replica_to_the_same_directory(cluster: RayCluster) -> None:
    place = Placement.separate(1, resource="CPU")
    with stubborn(place, env=POLITE) as first, first.scale(nodes=1) as second:
        assert first.directory == second.directory
        assert first.url != second.url
    assert_free(cluster)


def test_dropped_handle(cluster: RayCluster) -> None:
    replica = stubborn()
    footprint = Footprint.of(replica.name)
    del replica
    gc.collect()
    wait_for(lambda: not footprint.left(cluster.namespaces))
    assert_free(cluster)


def test_no_room_at_the_deadline(cluster: RayCluster) -> None:
    group = TWO_NODES.reserve()
    with pytest.raises(LaunchError, match=r"placement group: still PENDING after 3 s: .*free in all: 0"):
        stubborn(timeout=4)
    ray.util.remove_placement_group(group)
    assert_free(cluster)


def test_server_that_ends_at_once_says_why(cluster: RayCluster) -> None:
    says = "vllm serve: error: unrecognized arguments: --no-such"
    script = f"import sys; print('usage:'); print({says!r}); print('bye'); sys.exit(2)"
    with pytest.raises(LaunchError, match=rf"10.77.0.. ended with exit code 2: {says}\n"):
        stubborn(command=(sys.executable, "-c", script))
    assert_free(cluster)


def test_http_server(cluster: RayCluster) -> None:
    proxy = ray.remote(HTTPServerLauncher).options(num_cpus=0).remote("proxy")
    command = [*STUBBORN, "none", "--host", "{host}", "--port", "{port}"]
    env = {"AREAL_VLLM_REPLICA": "a-proxy", "VLLM_HOST_IP": "127.0.0.1"}
    url = ray.get(proxy.serve.remote(command, env=env))
    host, port = url.removeprefix("http://").split(":")
    socket.create_connection((host, int(port)), 5).close()
    footprint = Footprint.of("a-proxy")
    ray.kill(proxy)
    wait_for(lambda: not footprint.left(cluster.namespaces))


def test_http_server_that_ends_says_why(cluster: RayCluster) -> None:
    proxy = ray.remote(HTTPServerLauncher).options(num_cpus=0).remote("proxy")
    with pytest.raises(LaunchError, match=r"proxy on 10.77.0.. ended with exit code 1: ValueError: no config"):
        ray.get(proxy.serve.remote([sys.executable, "-c", "raise ValueError('no config')"]))
