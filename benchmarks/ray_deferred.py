"""Launch a mixture-of-experts replica over a Ray cluster of two nodes, update it three times, and shut it down.

    python -m benchmarks.ray_deferred [--dense]        # as root: the nodes are network namespaces

Before the first update and after each, every engine's greedy tokens are compared with those of Hugging Face on the trainer's
model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.launcher import Placement, launch
from harness.cpu_vllm import CPU_ARGS, CPU_ENV, token_exact, train
from harness.leftovers import Footprint
from harness.ray_cluster import ray_cluster


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dense", action="store_true", help="a dense model instead")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ray_cluster(devices=1, resource="CPU") as cluster:
        model = make_model(Path(folder) / "model", moe=not options.dense)
        print(f"{time.monotonic() - started:4.0f} s  a Ray cluster of two nodes", flush=True)
        replica = launch(
            str(Path(folder) / "model"),
            Placement.deferred(nodes=2, devices_per_node=1, resource="CPU"),
            data_parallel_size=2,
            vllm_args=CPU_ARGS,
            head_args=("--api-server-count", "1"),
            env=CPU_ENV,
            log_dir=f"{folder}/logs",
            timeout=400,
        )
        with replica:
            print(f"{time.monotonic() - started:4.0f} s  both engines serve at {replica.url}", flush=True)
            nodes = {engine.dp_rank: engine.node.rpartition("/")[2] for engine in replica.group.engines()}
            exact = [token_exact(model, replica.url, 2)]
            for step in range(1, 4):
                train(model, step)
                with replica.group.update(step, timeout=60) as update:
                    update.send(model)
                exact.append(token_exact(model, replica.url, 2))
                print(
                    f"{time.monotonic() - started:4.0f} s  version {step}: {'exact' if exact[-1] else 'WRONG TOKENS'}"
                )
            footprint = Footprint.of(replica.name)
        print(f"{time.monotonic() - started:4.0f} s  shut down", flush=True)
        left = footprint.left(cluster.namespaces)
    seconds = time.monotonic() - started
    facts = {
        "model": "dense" if options.dense else "moe",
        "nodes": nodes,
        "token_exact": exact,
        "processes": len(footprint.processes),
        "ports": len(footprint.ports),
        "shared_memory": len(footprint.shared_memory),
        "left": left,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(facts))
    return 0 if all(exact) and not left and len(set(nodes.values())) == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
