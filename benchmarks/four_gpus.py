"""Time updates from a trainer of two ranks to an engine of two workers (TP), and from one rank to one worker.

    python -m benchmarks.four_gpus --size qwen3-8b --out results.json

Each rank and each worker has a GPU; the trainer has the first two. Both ranks hold all weights (data parallel) or half of
each tensor (sharded, as by FSDP). Sharded weights are gathered as part of the time. Rank 0 sends, or each rank sends half.
After the last update of each case the engine must serve the trainer's weights: greedy tokens of Hugging Face in float32,
log-probabilities in bf16. Without GPUs there is one worker on the CPU, to try the command. Times are medians without the
first two updates of each case. The last line is JSON. Exits with 1 where weights were wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from areal_vllm_ext import EngineGroup, UpdateResult
from areal_vllm_ext.demo.deployment import free_ports
from harness.report import finish, table

from .ranks import RANKS, device_of, joined
from .serving import Place, Server, serving
from .sizes import SIZES, TrainerModel

WARM_UP = 2
CASES = [
    {"weights": "whole", "senders": "first", "transport": "ipc"},
    {"weights": "whole", "senders": "first", "transport": "broadcast"},
    {"weights": "whole", "senders": "partitioned", "transport": "ipc"},
    {"weights": "whole", "senders": "partitioned", "transport": "broadcast"},
    {"weights": "sharded", "senders": "first", "transport": "ipc"},
    {"weights": "sharded", "senders": "partitioned", "transport": "ipc"},
]


def cases() -> list[dict[str, str]]:
    """Return the cases; without GPUs all of them use broadcast."""
    return CASES if torch.cuda.is_available() else [case | {"transport": "broadcast"} for case in CASES]


def given(trainer: TrainerModel, rank: int, kind: str) -> Any:
    """Return the weights that this rank sends."""
    weights = trainer.weights()
    if kind == "whole":
        return weights
    mesh = init_device_mesh(weights[0][1].device.type, (RANKS,))
    return {name: DTensor.from_local(tensor.chunk(RANKS)[rank], mesh, [Shard(0)]) for name, tensor in weights}


def updates(
    group: EngineGroup, trainer: TrainerModel, rank: int, kind: str, versions: Iterable[int], **options: Any
) -> list[UpdateResult]:
    """Update several times, each time to other weights."""
    results = []
    for version in versions:
        trainer.set(version)
        weights = given(trainer, rank, kind)
        if dist.is_initialized():
            dist.barrier()
        with group.update(version, timeout=120.0, **options) as update:
            update.send(weights)
        results.append(update.result)
    return results


def row(gpus: int, case: dict[str, str], results: list[UpdateResult], wrong: str) -> dict[str, Any]:
    counted = results[WARM_UP:]
    made = {
        "gpus": gpus,
        **case,
        "total_ms": round(statistics.median(one.total_ms for one in counted), 2),
        "pause_ms": round(statistics.median(one.pause_ms for one in counted), 2),
        "all_total_ms": [round(one.total_ms, 2) for one in results],
        "wrong": wrong,
    }
    print(made, flush=True)
    return made


def update_all(
    group: EngineGroup, trainer: TrainerModel, rank: int, rounds: int, server: Server | None
) -> list[dict[str, Any]]:
    """Play all cases, on every rank alike; rank 0 has the ``server`` and returns the rows."""
    rows = []
    for number, case in enumerate(cases(), 1):
        versions = range(100 * number, 100 * number + WARM_UP + rounds)
        options = {"process_group": dist.group.WORLD, "senders": case["senders"], "transport": case["transport"]}
        results = updates(group, trainer, rank, case["weights"], versions, **options)
        if server:
            rows.append(row(4, case, results, server.wrong(trainer)))
        dist.barrier()
    return rows


def update_alone(server: Server, trainer: TrainerModel, rounds: int) -> list[dict[str, Any]]:
    """Update from one rank to one worker."""
    rows = []
    for transport in dict.fromkeys(case["transport"] for case in cases()):
        with server.connect() as group:
            results = updates(group, trainer, 0, "whole", range(WARM_UP + rounds), transport=transport)
        case = {"weights": "whole", "senders": "first", "transport": transport}
        rows.append(row(2, case, results, server.wrong(trainer)))
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
