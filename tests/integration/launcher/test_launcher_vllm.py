"""Real vLLM, launched over two Ray nodes: token-exact updates, an engine that is lost and comes back, and the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import ray

from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.launcher import Placement, launch
from areal_vllm_ext.process.serving import responds_ok
from harness.cpu_vllm import CPU_ARGS, CPU_ENV, token_exact, train
from harness.leftovers import Footprint
from harness.network import missing

if TYPE_CHECKING:
    from pathlib import Path

    from harness.ray_cluster import RayCluster

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


def test_moe_replica_over_two_nodes(cluster: RayCluster, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", moe=True)
    with launch(
        str(tmp_path / "model"),
        Placement.deferred(nodes=2, devices_per_node=1, resource="CPU"),
        data_parallel_size=2,
        vllm_args=CPU_ARGS,
        head_args=("--api-server-count", "1"),
        env=CPU_ENV,
        restart="replica",
        log_dir=str(tmp_path),
        timeout=240,
    ) as replica:
        assert len({engine.node for engine in replica.group.engines()}) == 2
        for version in (1, 2, 3):
            train(model, version)
            with replica.group.update(version, timeout=60) as update:
                update.send(model)
            assert token_exact(model, replica.url, 2)

        (headless,) = (engine for engine in replica.group.engines() if engine.headless)
        os.kill(headless.pid, signal.SIGKILL)
        ends = time.monotonic() + 240
        while not ((state := replica.status()).restarts == 1 and state.phase == "serving"):
            assert state.phase != "failed", state.error
            assert time.monotonic() < ends, state
            time.sleep(0.5)
        # All engines were started anew, and none serves what it was started with.
        while {(one.update_phase, one.generation) for one in replica.group.status()} != {("stale", "paused")}:
            assert time.monotonic() < ends, replica.group.status()
            time.sleep(0.2)
        train(model, 4)
        with replica.group.update(4, timeout=60) as update:
            update.send(model)
        host, port = replica.url.removeprefix("http://").split(":")
        while not responds_ok(host, int(port), "/health"):
            assert time.monotonic() < ends
            time.sleep(0.5)
        assert token_exact(model, replica.url, 2)
        footprint = Footprint.of(replica.name)
    assert footprint.left(cluster.namespaces) == []


def test_wrong_argument_is_vllms_own_message(cluster: RayCluster, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    config = {"model": str(tmp_path / "model"), "placement": {"resource": "CPU"}, "vllm_args": ["--no-such-argument"]}
    (tmp_path / "replica.yaml").write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "areal_vllm_ext.cli", "launch", "--config", str(tmp_path / "replica.yaml")]
    ended = subprocess.run(
        [*command, "--ray-address", cluster.address], capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 1
    line = next(line for line in ended.stderr.splitlines() if line.startswith("areal-vllm:"))
    assert line.endswith("ended with exit code 2: main.py: error: unrecognized arguments: --no-such-argument")
    ends = time.monotonic() + 15
    while ray.available_resources().get("CPU", 0) != 2:
        assert time.monotonic() < ends
        time.sleep(0.2)
