"""A trainer of two ranks and an engine of two workers (TP), a GPU each; beside it, in the same run, one rank and one worker.

    python -m benchmarks.four_gpus --size qwen3-8b --out results.json

The trainer's ranks have the first two GPUs. Its weights are whole on both (data parallel) or half on each (sharded, as by
FSDP: then they are gathered on the way, which is part of the time). Rank 0 sends, or each rank a part. After the last update
of each case the engine must serve the trainer's weights (greedy tokens of Hugging Face's in float32, log-probabilities in
bf16). Without GPUs: one worker on the CPU, to try the command. Medians; the first two updates of each do not count. The last
line is JSON. Exits with 1 where weights were wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.deployment import free_ports

from .models import SIZES, TrainerModel
from .report import finish, table
from .serving import Place, Server, serving

RANKS = 2
WARM_UP = 2
CASES = [
    {"weights": "whole", "senders": "first", "transport": "ipc"},
    {"weights": "whole", "senders": "first", "transport": "broadcast"},
    {"weights": "whole", "senders": "parts", "transport": "ipc"},
    {"weights": "whole", "senders": "parts", "transport": "broadcast"},
    {"weights": "sharded", "senders": "first", "transport": "ipc"},
    {"weights": "sharded", "senders": "parts", "transport": "ipc"},
]


def cases() -> list[dict[str, str]]:
    """Without GPUs all go by broadcast."""
    return CASES if torch.cuda.is_available() else [case | {"transport": "broadcast"} for case in CASES]


@contextlib.contextmanager
def joined(rank: int, port: int) -> Iterator[None]:
    """The trainer's own process group."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()


def device_of(rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def given(trainer: TrainerModel, rank: int, kind: str) -> Any:
    """What a rank sends."""
    weights = trainer.weights()
    if kind == "whole":
        return weights
    mesh = init_device_mesh(weights[0][1].device.type, (RANKS,))
    return {name: DTensor.from_local(tensor.chunk(RANKS)[rank], mesh, [Shard(0)]) for name, tensor in weights}


def update_all(
    group: EngineGroup, trainer: TrainerModel, rank: int, rounds: int, server: Server | None
) -> list[dict[str, Any]]:
    """All cases, on every rank alike; rank 0 has the ``server`` and gets the rows."""
    rows, version = [], 100
    for case in cases():
        totals, pauses = [], []
        for _ in range(WARM_UP + rounds):
            version += 1
            trainer.set(version)
            weights = given(trainer, rank, case["weights"])
            dist.barrier()
            options: dict[str, Any] = {"senders": case["senders"], "transport": case["transport"], "deadline": 120.0}
            with group.update(version, process_group=dist.group.WORLD, **options) as update:
                update.send(weights)
            if rank == 0:
                totals.append(update.result.total_ms)
                pauses.append(update.result.pause_ms)
        if server:
            rows.append({"gpus": 4, **case, **timings(totals, pauses), "wrong": server.wrong(trainer)})
            print(rows[-1], flush=True)
        dist.barrier()
    return rows


def timings(totals: list[float], pauses: list[float]) -> dict[str, Any]:
    return {
        "total_ms": round(statistics.median(totals[WARM_UP:]), 2),
        "pause_ms": round(statistics.median(pauses[WARM_UP:]), 2),
        "all_total_ms": [round(one, 2) for one in totals],
    }


def update_alone(server: Server, trainer: TrainerModel, rounds: int) -> list[dict[str, Any]]:
    """One rank, one worker."""
    rows, version = [], 0
    for transport in dict.fromkeys(case["transport"] for case in cases()):
        with server.connect() as group:
            totals, pauses = [], []
            for _ in range(WARM_UP + rounds):
                version += 1
                trainer.set(version)
                with group.update(version, transport=transport, deadline=120.0) as update:
                    update.send(trainer.weights())
                totals.append(update.result.total_ms)
                pauses.append(update.result.pause_ms)
            case = {"gpus": 2, "weights": "whole", "senders": "first", "transport": transport}
            rows.append({**case, **timings(totals, pauses), "wrong": server.wrong(trainer)})
            print(rows[-1], flush=True)
    return rows


def other_rank(directory: str, key_file: str | None, size: str, dtype: str, port: int, rounds: int) -> None:
    with joined(1, port), EngineGroup.connect(directory, key_file=key_file) as group:
        update_all(group, TrainerModel(size, getattr(torch, dtype), device_of(1)), 1, rounds, None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        other_rank(**json.loads(options.rank))
        return 0
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    trainer = TrainerModel(options.size, dtype, device_of(0))
    place = Place("cuda" if cuda else "cpu", trainers=RANKS)
    with serving(trainer, place, options.logs) as server:
        rows = update_alone(server, trainer, options.rounds)
    with contextlib.ExitStack() as stack:
        place = Place(place.device, trainers=RANKS, tp=2 if cuda else 1)
        server = stack.enter_context(serving(trainer, place, options.logs))
        port = free_ports(1)[0]
        facts = {"directory": server.deployment.directory, "key_file": server.key_file, "size": options.size}
        facts |= {"dtype": str(dtype).removeprefix("torch."), "port": port, "rounds": options.rounds}
        command = [sys.executable, "-m", "benchmarks.four_gpus", "--rank", json.dumps(facts)]
        other = stack.enter_context(subprocess.Popen(command))
        stack.callback(other.kill)
        stack.enter_context(joined(0, port))
        rows += update_all(stack.enter_context(server.connect()), trainer, 0, options.rounds, server)
    print(table(rows, ["gpus", "weights", "senders", "transport", "total_ms", "pause_ms", "wrong"]), flush=True)
    finish({"bytes": trainer.nbytes, "tensors": trainer.tensors, "dtype": str(dtype), "rows": rows}, options.out)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
