"""A driver that launches a replica of two nodes, prints its process ids, and then obeys one order of ``orphans.py``."""

from __future__ import annotations

import gc
import json
import sys
import time

import ray

from areal_vllm_ext.launcher import Placement, launch
from harness.cpu_vllm import CPU_ARGS, CPU_ENV

from .orphans import STUBBORN


def main() -> None:
    address, model = sys.argv[1:]
    ray.init(address, log_to_driver=False, logging_level="ERROR")
    settings = (
        {"vllm_args": CPU_ARGS, "head_args": ("--api-server-count", "1"), "env": CPU_ENV}
        if model
        else {"worker_extension": None, "command": (sys.executable, str(STUBBORN))}
    )
    replica = launch(
        model or "none",
        Placement.deferred(nodes=2, devices_per_node=1, resource="CPU"),
        data_parallel_size=2,
        timeout=400,
        **settings,
    )
    name = replica.name
    print(json.dumps({"name": name, "launchers": [node.pid for node in replica.nodes]}), flush=True)
    actors = {"owner": name, "head": f"{name}-head.0", "headless": f"{name}-headless-1.0"}
    match sys.stdin.readline().split():
        case ["shutdown"]:
            replica.shutdown()
        case ["drop"]:
            del replica
            gc.collect()
        case ["kill", which]:
            ray.kill(ray.get_actor(actors[which]))
        case ["terminate", which]:
            ray.get_actor(actors[which]).__ray_terminate__.remote()
    time.sleep(3600)


if __name__ == "__main__":
    main()
