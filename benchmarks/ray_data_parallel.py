"""vLLM's own data parallelism on Ray (``--data-parallel-backend ray``): an engine in an actor on each of two nodes, updated.

    python -m benchmarks.ray_data_parallel            # a MoE; as root: two network namespaces as nodes
    python -m benchmarks.ray_data_parallel --dense    # engines that do not know of each other

No launcher: the settings of docs/settings.md, "Ray". vLLM has no Ray devices for CPUs, so ``ray_on_cpu`` calls them GPUs. Three
updates, each compared token by token with Hugging Face on both engines. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from areal_vllm_ext import EngineGroup, security
from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.serving import answers
from areal_vllm_ext.supervised import Supervised

from .ray_cluster import RayCluster, ray_cluster
from .ray_deferred import CPU_ARGS, CPU_ENV, token_exact, train

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT, DIRECTORY_PORT = 8000, 29700
SECONDS = 300


def command_and_env(cluster: RayCluster, folder: Path) -> tuple[list[str], dict[str, str]]:
    """``vllm serve`` on node ``a``, as somebody would start it who has no launcher."""
    host = cluster.namespaces.addresses["a"]
    own = {
        "AREAL_VLLM_KEY_FILE": str(folder / "cluster.key"),
        "AREAL_VLLM_DIRECTORY": f"tcp://{host}:{DIRECTORY_PORT}",
        "AREAL_VLLM_REPLICA": "on-ray",
    }
    env = {**os.environ, **CPU_ENV, **own, "RAY_ADDRESS": cluster.address, "VLLM_HOST_IP": host}
    env["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] = "OMP_NUM_THREADS"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [*cluster.namespaces.prefix("a"), sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command += [str(folder / "model"), *CPU_ARGS, "--host", host, "--port", str(PORT), "--api-server-count", "1"]
    command += ["--data-parallel-backend", "ray", "--data-parallel-size", "2", "--data-parallel-size-local", "1"]
    command += ["--data-parallel-address", host]
    command += ["--worker-extension-cls", "areal_vllm_ext.worker.WorkerExtension"]
    return command, env


@contextlib.contextmanager
def serving(cluster: RayCluster, folder: Path, log: Path) -> Iterator[str]:
    """The server, with its URL, once it answers."""
    # Ray keeps a node's address in a folder that nodes on one machine share: vLLM's driver would read that of node b.
    host = cluster.namespaces.addresses["a"]
    for file in cluster.folder.glob("session_*/node_ip_address.json"):
        file.write_text(json.dumps({"node_ip_address": host}))
    security.write_key(folder / "cluster.key")
    command, env = command_and_env(cluster, folder)
    server = Supervised(command, log=log, env=env)
    try:
        ends = time.monotonic() + SECONDS
        while not answers(host, PORT, "/health"):
            if server.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"{server.cause()}\n{server.last_lines(40)}")
            time.sleep(1)
        yield f"http://{host}:{PORT}"
    finally:
        server.end()


def measure(cluster: RayCluster, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Serve, and update three times."""
    model = make_model(folder / "model", moe=not options.dense)
    started = time.monotonic()
    with serving(cluster, folder, options.log or folder / "vllm.log") as url:
        seconds = time.monotonic() - started
        directory = f"tcp://{cluster.namespaces.addresses['a']}:{DIRECTORY_PORT}"
        with EngineGroup.connect(directory, key_file=folder / "cluster.key") as group:
            group.wait_ready(engines=2, timeout=60)
            engines = group.engines()
            exact, took = [token_exact(model, url, 2)], []
            for step in range(1, 4):
                train(model, step)
                with group.update(step, deadline=60) as update:
                    update.send(model)
                took.append(round(update.result.total_ms, 1))
                exact.append(token_exact(model, url, 2))
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dense", action="store_true", help="a dense model instead")
    parser.add_argument("--log", type=Path, help="keep vLLM's log here")
    options = parser.parse_args()
    # Ray's workers find the platform on their path.
    sys.path.insert(0, str(Path(__file__).parent / "ray_on_cpu"))
    with tempfile.TemporaryDirectory() as folder, ray_cluster(devices=1, resource="GPU") as cluster:
        facts = measure(cluster, Path(folder), options)
    print(json.dumps(facts))
    return 0 if all(facts["token_exact"]) and len(set(facts["nodes"])) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
