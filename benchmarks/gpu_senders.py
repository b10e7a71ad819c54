"""Update a real vLLM from a trainer of two ranks with sharded weights, for each choice of ``senders``.

    python -m benchmarks.gpu_senders --out results.json

Rank 0 sends, or each rank sends its share, or each rank sends to the workers on its GPU. Every update is compared token by
token with Hugging Face. With two GPUs, each has a rank and an engine (CUDA IPC). With four, the first two have a rank each,
and the others a worker each of one engine (TP, NCCL). Without GPUs there are two engines on the CPU. The last line is JSON.
Exits with 1 where a token was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.client.weights import named_parts
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment, Node, free_ports
from harness.report import finish, table

from .gpu_smoke import expected_tokens, first_difference, make_model, served_tokens
from .ranks import RANKS, device_of, joined

UPDATES = 3
SECONDS = 400

# By number of GPUs: the nodes' devices, vLLM's arguments, and pairs of senders and transport.
LAYOUTS: dict[int, tuple[list[str], list[str], list[tuple[str, str]]]] = {
    0: (["", ""], [], [("rank0", "broadcast"), ("partitioned", "broadcast"), ("colocated", "auto")]),
    2: (["0", "1"], [], [("rank0", "auto"), ("partitioned", "auto"), ("colocated", "auto")]),
    4: (["2,3"], ["--tensor-parallel-size", "2"], [("rank0", "auto"), ("partitioned", "auto")]),
}


def rank_main(
    rank: int, port: int, directory: str, url: str, folder: str, cases: list[list[str]], engines: int
) -> None:
    """Be one rank of the trainer; rank 0 prints a line of JSON for each update."""
    device = device_of(rank)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    model.generation_config.pad_token_id = 0
    dice = torch.Generator().manual_seed(1)  # every rank draws the same numbers
    completions = Completions(url)
    with joined(rank, port), EngineGroup.connect(directory) as group:
        mesh = init_device_mesh(device.type, (RANKS,))
        group.wait_ready(engines, timeout=60)
        for senders, transport in cases:
            for number in range(1, UPDATES + 1):
                before = expected_tokens(model) if rank == 0 else []
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_((torch.randn(parameter.shape, generator=dice) * 0.02).to(device))
                shards = {
                    name: distribute_tensor(tensor.detach(), mesh, [Shard(0) if tensor.ndim else Replicate()])
                    for name, tensor in dict(named_parts(model)).items()
                }
                options: dict[str, Any] = {"senders": senders, "transport": transport, "timeout": 120}
                with group.update(f"{senders}-{number}", process_group=dist.group.WORLD, **options) as update:
                    update.send(shards)
                if rank == 0:
                    after = expected_tokens(model)
                    served = [served_tokens(completions, engine) for engine in range(engines)]
                    differences = [first_difference(model, after, tokens) for tokens in served]
                    row = {
                        "senders": senders,
                        "transport": transport,
                        "update": number,
                        "engines": engines,
                        "bytes": update.result.nbytes,
                        "total_ms": round(update.result.total_ms, 1),
                        "pause_ms": round(update.result.pause_ms, 1),
                        "token_exact": not any(differences),
                        "tokens_changed": before != after,
                        "differences": [text for text in differences if text],
                    }
                    print(json.dumps(row), flush=True)
                dist.barrier()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank_main(**json.loads(options.rank))
        return 0
    devices, arguments, cases = LAYOUTS[torch.cuda.device_count()]
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-senders-")))
        make_model(folder / "model", moe=False, dtype=torch.float32)
        nodes = [Node(env={"CUDA_VISIBLE_DEVICES": own} if own else {}) for own in devices]
        vllm_args = ["--skip-tokenizer-init", *arguments]
        logs = options.logs or folder / "logs"
        # Triton's kernels multiply float32 in TF32 by default, which changes tokens where two are nearly tied.
        made = Deployment(
            folder / "model", nodes, log_dir=logs, vllm_args=vllm_args, env={"TRITON_F32_DEFAULT": "ieee"}
        )
        deployment = stack.enter_context(made)
        deployment.wait(timeout=240)
        given = {
            "port": free_ports(1)[0],
            "directory": deployment.directory,
            "url": deployment.url,
            "folder": str(folder / "model"),
            "cases": cases,
            "engines": len(nodes),
        }
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.gpu_senders", "--rank", json.dumps({"rank": rank, **given})],
                    stdout=subprocess.PIPE if rank == 0 else None,
                    text=True,
                )
            )
            for rank in range(RANKS)
        ]
        try:
            said, _ = ranks[0].communicate(timeout=SECONDS)
            rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        finally:
            for process in ranks:
                process.kill()
    print(table(rows, ["senders", "transport", "update", "total_ms", "pause_ms", "token_exact"]), flush=True)
    exact = len(rows) == len(cases) * UPDATES and all(row["token_exact"] and row["tokens_changed"] for row in rows)
    finish({"rows": rows, "token_exact": exact}, options.out)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
