"""Place trainers and vLLM workers on the same devices with Ray's fractions, update over CUDA IPC, and compare tokens.

    python -m benchmarks.colocated_ray --devices 1                    # one GPU: a trainer and an engine
    python -m benchmarks.colocated_ray --devices 2 --strategy STRICT_PACK
    python -m benchmarks.colocated_ray --devices 2 --cpu              # dry run, as root: shared memory, two namespaces as nodes

Each trainer has a whole model and TRAINER_SHARE of a device. Each TP worker of the replica has WORKER_SHARE of the same
device, which is checked before any update. All trainers train alike, and each sends to the worker on its device. The
engine's greedy tokens must be those that Hugging Face generates from the first trainer's model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import free_ports
from areal_vllm_ext.demo.model import greedy_tokens, make_model
from areal_vllm_ext.launcher import Placement, launch
from areal_vllm_ext.transport.device import own_device_id
from harness.cpu_vllm import CPU_ENV, PROMPTS, TOKENS, train
from harness.leftovers import Footprint, processes
from harness.ray_cluster import ray_cluster
from harness.report import finish

if TYPE_CHECKING:
    from areal_vllm_ext.launcher import DirectoryEndpoint

TRAINER_SHARE = WORKER_SHARE = 0.4
UPDATES = 3


class Trainer:
    """One trainer rank."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device).eval()
        self._group: EngineGroup | None = None

    def place(self) -> tuple[str, str]:
        """Return this trainer's node and device."""
        return ray.util.get_node_ip_address(), own_device_id()

    def tokens(self) -> list[list[int]]:
        """Return the oracle's tokens: what an engine with these weights must generate."""
        return greedy_tokens(self.model, PROMPTS, TOKENS)

    def join(self, meeting: str, rank: int, ranks: int) -> None:
        """Join the process group of the trainers."""
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)

    def step(self, version: int, directory: DirectoryEndpoint) -> dict[str, float]:
        """Train and update every engine; all trainers call this at the same time."""
        self._group = self._group or EngineGroup.connect(directory.address, key=directory.key)
        self.model.cpu()  # on the CPU, because a GPU draws other random numbers
        train(self.model, version)
        self.model.to(self.device)
        with self._group.update(version, process_group=dist.group.WORLD, senders="colocated", timeout=60) as update:
            update.send(self.model)
        return {"total_ms": update.result.total_ms, "pause_ms": update.result.pause_ms}


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Launch, update and compare, on the Ray cluster of this process."""
    placement = Placement.colocated(options.devices, WORKER_SHARE, strategy=options.strategy)
    group = placement.reserve()
    trainers = [
        ray.remote(Trainer).options(**placement.options(group, rank, TRAINER_SHARE)).remote(folder)
        for rank in range(options.devices)
    ]
    trainers_on = ray.get([trainer.place.remote() for trainer in trainers])
    for rank, place in enumerate(trainers_on):
        print(f"trainer {rank} is on {place}", flush=True)
    arguments = ("--enforce-eager", "--max-model-len", "512", "--dtype", "float32")
    settings: dict[str, Any] = {"vllm_args": (*arguments, "--kv-cache-memory-bytes", str(1 << 28))}
    # Triton's kernels multiply float32 in TF32 by default, which changes tokens where two are nearly tied.
    settings["env"] = {"TRITON_F32_DEFAULT": "ieee"}
    if options.cpu:
        settings["env"] |= CPU_ENV
    else:
        settings["vllm_args"] += ("--gpu-memory-utilization", "0.3")
    started = time.monotonic()
    with launch(
        folder, placement.within(group), tensor_parallel_size=options.devices, timeout=400, **settings
    ) as replica:
        seconds = time.monotonic() - started
        workers_on = list(replica.status().devices)
        for rank, place in enumerate(workers_on):
            print(f"vLLM worker {rank} is on {place}", flush=True)
        completions = Completions(replica.url)
        exact, took = [], []
        meeting = f"tcp://{trainers_on[0][0]}:{free_ports(1)[0]}"
        ray.get([trainer.join.remote(meeting, rank, options.devices) for rank, trainer in enumerate(trainers)])
        for version in range(UPDATES + 1):
            if version:
                took.append(ray.get([trainer.step.remote(version, replica.directory) for trainer in trainers])[0])
            said = completions.greedy(PROMPTS, tokens=TOKENS)
            exact.append(said == ray.get(trainers[0].tokens.remote()))
            print(
                f"version {version}: {'exact' if exact[-1] else 'WRONG TOKENS'} {took[-1] if took else ''}", flush=True
            )
        footprint = Footprint.of(replica.name)
    left = [f"process {pid}" for pid in processes(replica.name)]
    left += [f"shared memory {path}" for path in footprint.shared_memory if path.exists()]
    return {
        "devices": options.devices,
        "strategy": options.strategy,
        "senders": "colocated",
        "trainers_on": trainers_on,
        "workers_on": workers_on,
        "placement_proven": workers_on == trainers_on,
        "token_exact": exact,
        "launch_seconds": round(seconds, 1),
        "total_ms_median": round(statistics.median(one["total_ms"] for one in took), 1),
        "pause_ms_median": round(statistics.median(one["pause_ms"] for one in took), 1),
        "left": left,
        "ray": ray.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--devices", type=int, default=1, help="number of trainers, and of TP workers (default: %(default)s)"
    )
    parser.add_argument("--strategy", default="PACK", choices=("PACK", "STRICT_PACK"))
    parser.add_argument("--cpu", action="store_true", help="a dry run without GPUs, over shared memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        # Ray's workers import this file and, on CPU, the plugin that gives vLLM's CPU platform Ray devices.
        sys.path.insert(0, str(Path(__file__).parent / "ray_on_cpu"))
        make_model(folder)
        if options.cpu:
            # Start one node only: nodes of one machine share the folder from which vLLM's driver reads Ray's address.
            stack.enter_context(ray_cluster(devices=options.devices, resource="GPU", nodes="a"))
        else:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            stack.callback(ray.shutdown)
        facts = measure(options, folder)
    finish(facts, None)
    return 0 if all(facts["token_exact"]) and facts["placement_proven"] and not facts["left"] else 1


if __name__ == "__main__":
    sys.exit(main())
