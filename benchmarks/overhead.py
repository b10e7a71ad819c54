"""Measure the cost of the extension without updates: a server with it and a server without, under load in turns.

    python -m benchmarks.overhead --device cpu [--size tiny] [--rounds 10] [--seconds 5]

Both servers run all the time and differ only in ``--worker-extension-cls``; a client is connected to the server with the
extension. Each round loads one server and then the other, in alternating order. ``ratio`` is the median over the rounds of
tokens per second with the extension, divided by those without. ``cpu_ratio`` is the same of CPU time per token, over all
processes of a server; it is steadier on a shared machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from areal_vllm_ext.demo.deployment import WORKER_EXTENSION
from harness.report import finish, table

from .load import load
from .serving import Place, Server, serving
from .sizes import SIZES, TrainerModel

FIGURES = ("tokens_per_s", "cpu_ms_per_token")
_SETTLE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Speed:
    """The speed of one server under its load."""

    tokens_per_s: float
    cpu_ms_per_token: float


def cpu_seconds(server: Server) -> float:
    """Return the CPU seconds that all processes of the server's process group have used so far."""
    (process,) = server.deployment.processes
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == process.pid)
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(server: Server, requests: int, tokens: int, seconds: float) -> Speed:
    """Put a load on ``server`` for some seconds."""
    with load(server.url, server.model, 1, requests, tokens) as felt:
        time.sleep(_SETTLE_SECONDS)
        start, before = time.monotonic(), cpu_seconds(server)
        time.sleep(seconds)
        end, after = time.monotonic(), cpu_seconds(server)
    came = felt.tokens(start, end)
    return Speed(round(came / (end - start), 1), round((after - before) / came * 1e3, 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--load", type=int, default=8, help="requests at a time")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of each request")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    options = parser.parse_args()
    place = Place(options.device, colocated=options.device == "cuda")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    trainer = TrainerModel(options.size, dtype, place.trainer_device)
    speeds: dict[str, list[Speed]] = {"with": [], "without": []}
    with contextlib.ExitStack() as stack:
        logs = options.logs
        servers = {
            name: stack.enter_context(serving(trainer, place, logs and logs / name, extension=extension))
            for name, extension in (("with", WORKER_EXTENSION), ("without", None))
        }
        stack.enter_context(servers["with"].connect()).wait_ready(engines=1, timeout=60)
        for server in servers.values():
            measure(server, options.load, options.tokens, options.seconds)
        for number in range(options.rounds):
            for name in ("with", "without") if number % 2 else ("without", "with"):
                speeds[name].append(measure(servers[name], options.load, options.tokens, options.seconds))
    rows = [
        {"extension": name} | {what: statistics.median(getattr(speed, what) for speed in values) for what in FIGURES}
        for name, values in speeds.items()
    ]
    print(table(rows, ["extension", *FIGURES]))
    pairs = list(zip(speeds["with"], speeds["without"], strict=True))
    ratios, cpu_ratios = ([getattr(a, what) / getattr(b, what) for a, b in pairs] for what in FIGURES)
    print(f"with / without: {statistics.median(ratios):.4f}, of each round {', '.join(f'{one:.3f}' for one in ratios)}")
    results: dict[str, Any] = {"ratio": statistics.median(ratios), "cpu_ratio": statistics.median(cpu_ratios)}
    results |= {"ratios": [round(one, 4) for one in ratios], "cpu_ratios": [round(one, 4) for one in cpu_ratios]}
    finish(
        {**results, "rounds": {name: [dataclasses.asdict(one) for one in speeds[name]] for name in speeds}}, options.out
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
