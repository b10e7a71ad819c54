"""Update a real vLLM by each way of vLLM's own trainer API, and check what the engines serve after every update.

    python -m benchmarks.trainer_api --device cuda --out results.json

On two GPUs, the trainer has the first and an engine the second. In turns: vLLM's NCCL trainer engine over vLLM's routes, the
same over ``WeightSyncClient``, and ``areal`` as trainer engine. On a CPU, which has no NCCL, a checkpoint directory takes
its place. In float32 (the default) the greedy tokens must be those of Hugging Face. The last line is JSON. Exits with 1 where
an update by this package was wrong. Times are the trainer's.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from areal_vllm_ext import EngineGroup, plugin
from areal_vllm_ext.demo.deployment import free_ports
from areal_vllm_ext.integrations.vllm.client import WeightSyncClient
from harness.report import finish, table

from .serving import Place, Server, serving
from .sizes import SIZES, TrainerModel
from .ways import Weights, source_of

# Sends the weights; returns how long generation was held, in milliseconds; None if for all of the time.
Send = Callable[[Weights], float | None]


@contextlib.contextmanager
def nccl(server: Server, client: Any, weights: Weights, *, packed: bool) -> Iterator[Send]:
    """vLLM's NCCL trainer engine over ``client``."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(
        rank=0,
        master_address=server.host,
        master_port=free_ports(1)[0],
        world_size=1 + server.place.engines * server.place.tp,
        packed=packed,
        packed_buffer_size_bytes=max(1 << 30, *(tensor.nbytes for _, tensor in weights)),  # the largest must fit
    )
    engine: Any = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source_of(weights))
    routes = not isinstance(client, WeightSyncClient)

    def send(new: Weights) -> None:
        engine.source = source_of(new)
        if routes:  # generation is the caller's business there
            server.post("/pause", mode="keep")
        engine.send_weights()
        if routes:
            server.post("/resume")

    try:
        yield send
    finally:
        client.shutdown_weight_transfer_engine()
        engine.shutdown()


@contextlib.contextmanager
def checkpoint(server: Server, client: Any, folder: Path) -> Iterator[Send]:
    """The worker's backend ``areal`` over ``client``: what a CPU can do."""
    routes = not isinstance(client, WeightSyncClient)
    client.init_weight_transfer_engine({})

    def send(new: Weights) -> None:
        save_file({name: tensor.contiguous() for name, tensor in new}, folder / "model.safetensors", {"format": "pt"})
        if routes:
            server.post("/pause", mode="keep")
        client.start_weight_update()
        client.update_weights({"checkpoint": str(folder)})
        client.finish_weight_update()
        if routes:
            server.post("/resume")

    yield send


@contextlib.contextmanager
def areal(group_client: WeightSyncClient, weights: Weights) -> Iterator[Send]:
    """The trainer engine ``areal``."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from areal_vllm_ext.integrations.vllm.trainer import ArealTrainerInitInfo

    info = ArealTrainerInitInfo(rank=0)
    engine: Any = WeightTransferTrainerFactory.trainer_init(info, client=group_client, source=source_of(weights))

    def send(new: Weights) -> float:
        engine.source = source_of(new)
        return float(engine.send_weights().pause_ms)

    yield send


def rounds_of(
    server: Server, trainer: TrainerModel, name: str, way: contextlib.AbstractContextManager[Send], rounds: int
) -> dict[str, Any]:
    """Send ``rounds`` updates, each of other weights, and check each."""
    totals, pauses, problem = list[float](), list[float](), ""
    try:
        with way as send:
            for _ in range(rounds):
                trainer.set(trainer.version + 1)
                weights = trainer.weights()
                started = time.perf_counter()
                held = send(weights)
                totals.append((time.perf_counter() - started) * 1e3)
                pauses.append(totals[-1] if held is None else held)
                problem = problem or server.wrong(trainer)
    except Exception as error:
        problem = f"failed: {type(error).__name__}: {str(error)[:500]}"
    print(f"{name}: {problem or 'right'}, {[round(total) for total in totals]} ms", file=sys.stderr, flush=True)
    row: dict[str, Any] = {"way": name, "right": not problem, "problem": problem or None}
    if totals:
        row |= {"first_ms": round(totals[0], 1), "total_ms": round(statistics.median(totals[1:] or totals), 1)}
        row |= {"pause_ms": round(statistics.median(pauses[1:] or pauses), 1), "all_ms": [round(t, 1) for t in totals]}
    return row


def compare(server: Server, trainer: TrainerModel, group: EngineGroup, rounds: int) -> list[dict[str, Any]]:
    """Let each way send its updates in a row, because only one of vLLM's transfers can be open at a time."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    routes, ours = HTTPVLLMWeightSyncClient(server.url), WeightSyncClient(group, timeout=120)
    weights = trainer.weights()
    with tempfile.TemporaryDirectory(prefix="areal-trainer-api-") as folder:
        ways: list[tuple[str, contextlib.AbstractContextManager[Send]]] = []
        for packed in (True, False):
            kind = "nccl, packed" if packed else "nccl"
            if server.place.device == "cuda":
                ways.append((f"vLLM's {kind}, its routes", nccl(server, routes, weights, packed=packed)))
                ways.append((f"vLLM's {kind}, our client", nccl(server, ours, weights, packed=packed)))
            elif packed:
                ways.append(("checkpoint, vLLM's routes", checkpoint(server, routes, Path(folder))))
                ways.append(("checkpoint, our client", checkpoint(server, ours, Path(folder))))
        ways.append(("areal as trainer engine", areal(ours, weights)))
        return [rounds_of(server, trainer, name, way, rounds) for name, way in ways]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: tiny on CPU, 1gb-dense on GPUs")
    parser.add_argument("--dtype", default="float32", help="float32 compares tokens, bfloat16 log-probabilities")
    parser.add_argument("--engines", type=int, default=1, help="data-parallel engines, each on a GPU of its own")
    parser.add_argument("--rounds", type=int, default=4, help="updates by each way; the first is not in the median")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    options = parser.parse_args()
    plugin.register_backends()
    cuda = options.device == "cuda"
    place = Place(options.device, engines=options.engines, eager=True)
    trainer = TrainerModel(
        options.size or ("1gb-dense" if cuda else "tiny"), getattr(torch, options.dtype), place.trainer_device
    )
    print(f"{trainer.tensors} tensors, {trainer.nbytes / 1e6:.1f} MB", flush=True)
    with (
        serving(trainer, place, options.logs, native="nccl" if cuda else "areal") as server,
        server.connect() as group,
    ):
        group.wait_ready(engines=options.engines, timeout=60)
        rows = compare(server, trainer, group, options.rounds)
    print(table(rows, ["way", "right", "first_ms", "total_ms", "pause_ms"]), flush=True)
    finish({"bytes": trainer.nbytes, "tensors": trainer.tensors, "dtype": options.dtype, "rows": rows}, options.out)
    return 0 if all(row["right"] for row in rows if "routes" not in row["way"]) else 1


if __name__ == "__main__":
    sys.exit(main())
