"""Update engines of vLLM's own data parallelism on Ray (``--data-parallel-backend ray``).

    python -m benchmarks.ray_data_parallel            # a MoE; as root: two network namespaces as nodes
    python -m benchmarks.ray_data_parallel --dense    # engines that do not know of each other

Each of two nodes has an engine in an actor. There is no launcher; docs/settings.md, "Ray", has the settings. vLLM has no Ray
devices for CPUs, so ``ray_on_cpu`` calls them GPUs. Three updates are compared token by token with Hugging Face on both
engines. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.deployment import Deployment, Node
from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.process.supervisor import SHARED_MEMORY, remove
from areal_vllm_ext.protocol import security
from harness.cpu_vllm import token_exact, train
from harness.ray_cluster import RayCluster, ray_cluster

SECONDS = 300
ARGUMENTS = ["--data-parallel-backend", "ray", "--data-parallel-size", "2", "--data-parallel-size-local", "1"]


def deployment(cluster: RayCluster, folder: Path, logs: Path) -> Deployment:
    """Start ``vllm serve`` on node ``a`` without a launcher."""
    host = cluster.namespaces.addresses["a"]
    # Nodes of one machine share the folder with Ray's address, so vLLM's driver would read the address of node b.
    for file in cluster.folder.glob("session_*/node_ip_address.json"):
        file.write_text(json.dumps({"node_ip_address": host}))
    security.write_key(folder / "cluster.key")
    env = {
        "AREAL_VLLM_KEY_FILE": str(folder / "cluster.key"),
        "AREAL_VLLM_REPLICA": "on-ray",
        "RAY_ADDRESS": cluster.address,
        "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "OMP_NUM_THREADS",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    arguments = [*ARGUMENTS, "--data-parallel-address", host, "--api-server-count", "1"]
    node = Node(host, cluster.namespaces.prefix("a"))
    return Deployment(folder / "model", [node], log_dir=logs, vllm_args=arguments, env=env)


def measure(cluster: RayCluster, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Serve, and update three times."""
    model = make_model(folder / "model", moe=not options.dense)
    started = time.monotonic()
    with deployment(cluster, folder, options.logs or folder / "logs") as served:
        served.wait(SECONDS)
        seconds = time.monotonic() - started
        with EngineGroup.connect(served.directory, key_file=folder / "cluster.key") as group:
            group.wait_ready(engines=2, timeout=60)
            engines = group.engines()
            exact, took = [token_exact(model, served.url, 2)], []
            for step in range(1, 4):
                train(model, step)
                with group.update(step, timeout=60) as update:
                    update.send(model)
                took.append(round(update.result.total_ms, 1))
                exact.append(token_exact(model, served.url, 2))
                print(f"version {step}: {'exact' if exact[-1] else 'WRONG TOKENS'}, {took[-1]} ms", flush=True)
    return {
        "model": "dense" if options.dense else "moe",
        "nodes": [engine.node.rpartition("/")[2] for engine in engines],
        "dp_ranks": [[engine.dp_rank, engine.dp_size] for engine in engines],
        "token_exact": exact,
        "total_ms": took,
        "launch_seconds": round(seconds, 1),
        "ray": ray.__version__,
    }


def shared_files() -> set[str]:
    """Return all files of Python's shared memory on this machine."""
    return {str(path) for path in Path("/dev/shm").glob("*") if SHARED_MEMORY.match(str(path))}  # noqa: S108 - Linux's place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dense", action="store_true", help="a dense model instead")
    parser.add_argument("--logs", type=Path, help="keep vLLM's log here")
    options = parser.parse_args()
    # Ray's workers find the platform plugin on this path.
    sys.path.insert(0, str(Path(__file__).parent / "ray_on_cpu"))
    before = shared_files()
    with tempfile.TemporaryDirectory() as folder, ray_cluster(devices=1, resource="GPU") as cluster:
        facts = measure(cluster, Path(folder), options)
    # Ray kills vLLM's actors and their resource trackers, which would have removed these files.
    remove(shared_files() - before)
    print(json.dumps(facts))
    return 0 if all(facts["token_exact"]) and len(set(facts["nodes"])) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
