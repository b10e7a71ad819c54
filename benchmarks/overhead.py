"""What the extension costs when nothing is updated: a server with it and one without, under the same load in turns.

    python -m benchmarks.overhead --device cpu [--size tiny] [--rounds 10] [--seconds 5]

Both servers are up all the time and alike but for ``--worker-extension-cls``; a client is connected to the one with it. A
round is a load on one and then on the other, which comes first alternates. The last line is JSON; ``ratio`` is the median
of the rounds' ratios of tokens per second, with the extension to without.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

import torch

from areal_vllm_ext.demo.deployment import WORKER_EXTENSION

from .load import load
from .models import SIZES, TrainerModel
from .report import finish, table
from .serving import Place, Server, serving

_SETTLE_SECONDS = 0.5


def tokens_per_second(server: Server, requests: int, tokens: int, seconds: float) -> float:
    """Under a load of its own."""
    with load(server.url, server.model, 1, requests, tokens) as felt:
        time.sleep(_SETTLE_SECONDS)
        start = time.monotonic()
        time.sleep(seconds)
        end = time.monotonic()
    return felt.tokens(start, end) / (end - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--load", type=int, default=8, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=300, help="of each of those requests")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    options = parser.parse_args()
    place = Place(options.device, colocated=options.device == "cuda")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    trainer = TrainerModel(options.size, dtype, place.trainer_device)
    speeds: dict[str, list[float]] = {"with": [], "without": []}
    with contextlib.ExitStack() as stack:
        logs = options.logs
        servers = {
            name: stack.enter_context(serving(trainer, place, logs and logs / name, extension=extension))
            for name, extension in (("with", WORKER_EXTENSION), ("without", None))
        }
        stack.enter_context(servers["with"].connect()).wait_ready(engines=1, timeout=60)
        for server in servers.values():
            tokens_per_second(server, options.load, options.tokens, options.seconds)
        for number in range(options.rounds):
            for name in ("with", "without") if number % 2 else ("without", "with"):
                speed = tokens_per_second(servers[name], options.load, options.tokens, options.seconds)
                speeds[name].append(round(speed, 1))
    ratios = [with_it / without for with_it, without in zip(speeds["with"], speeds["without"], strict=True)]
    rows = [{"extension": name, "tokens_per_s": statistics.median(values)} for name, values in speeds.items()]
    print(table(rows, ["extension", "tokens_per_s"]))
    ratio = statistics.median(ratios)
    print(f"with / without: {ratio:.4f}, of each round {', '.join(f'{one:.3f}' for one in ratios)}")
    finish({"ratio": round(ratio, 4), "ratios": [round(one, 4) for one in ratios], "speeds": speeds}, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
