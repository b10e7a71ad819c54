"""Measure how updates delay the tokens of requests, for each way to update.

    python -m benchmarks.bubble --device cpu --size tiny [--engines 2] [--seconds 15]

All engines are under a steady load: first without updates, then with an update every second by each way. A bubble is the
longest gap between two tokens of one request during an update, less the median gap without updates. ``beside`` is the mean
gap during updates, without the longest of each request (the pause), as a multiple of the mean gap without updates. Every way
freezes requests and lets them go on (vLLM's pause mode ``keep``). Ours lets them recompute their keys and values under the
new weights; the other ways, and ours with ``--kv keep``, keep those of the old weights. The options are those of
``benchmarks.update``. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from typing import Any

from harness.report import finish, percentile, table

from .load import Load, load
from .serving import Server, serving
from .sizes import TrainerModel
from .update import connected, parsed, ways_of
from .ways import Native, Way, Weights, join

EVERY_SECONDS = 1.0


class Window:
    """A stretch of load, and the updates in it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start = time.monotonic()
        self.end = self.start
        self.updates: list[tuple[float, float]] = []
        self.problem = ""

    def row(self, load: Load, quiet: Window, requests: int) -> dict[str, Any]:
        """Return the row of the table: how the updates delayed the tokens of this many requests at a time."""
        gap = statistics.median(load.gaps(quiet.start, quiet.end))
        speed = load.tokens(self.start, self.end) / (self.end - self.start)
        before = load.tokens(quiet.start, quiet.end) / (quiet.end - quiet.start)
        bubbles = [(max(load.gaps(*update)) - gap) * 1e3 for update in self.updates if load.gaps(*update)]
        row: dict[str, Any] = {
            "way": self.name,
            "right": not self.problem,
            "updates": len(self.updates),
            "tokens_per_s": round(speed, 1),
            "of_quiet": round(speed / before, 4),
            "median_gap_ms": round(statistics.median(load.gaps(self.start, self.end)) * 1e3, 2),
        }
        if bubbles:
            row["bubble_ms"] = round(statistics.median(bubbles), 2)
            row["longest_bubble_ms"] = round(max(bubbles), 2)
            unpaused = [gap for update in self.updates for gap in sorted(load.gaps(*update))[:-requests]]
            if unpaused:
                without = statistics.fmean(load.gaps(quiet.start, quiet.end))
                row["beside"] = round(statistics.fmean(unpaused) / without, 2)
            row["update_ms"] = round(statistics.median(end - start for start, end in self.updates) * 1e3, 1)
        else:
            gaps = load.gaps(self.start, self.end)
            row["p99_gap_ms"] = round(percentile(gaps, 0.99) * 1e3, 2)
            row["longest_gap_ms"] = round(max(gaps) * 1e3, 2)
        if self.problem:
            row["problem"] = self.problem
        return row


def updates(server: Server, trainer: TrainerModel, way: Way, sets: list[Weights], seconds: float) -> Window:
    """Update every second, or as soon as the previous update has ended, with two sets of weights in turn."""
    turn = 0

    def update() -> tuple[float, float]:
        nonlocal turn
        turn += 1
        started = time.monotonic()
        way.update(turn, sets[turn % len(sets)])
        return started, time.monotonic()

    window = Window(way.name)
    try:
        update()
        update()  # the first two updates of a way set up its connections
        window = Window(way.name)
        while (due := window.start + len(window.updates) * EVERY_SECONDS) < window.start + seconds:
            time.sleep(max(due - time.monotonic(), 0.0))
            if time.monotonic() > window.start + seconds:
                break
            window.updates.append(update())
        time.sleep(max(window.start + seconds - time.monotonic(), 0.0))
        window.end = time.monotonic()
        if server.place.fresh:
            trainer.set(0)
            way.update(turn + 1, trainer.weights())
            wrong = server.unlike_start(trainer)
        else:
            trainer.set(turn % len(sets) + 1)
            wrong = server.wrong(trainer)
        if wrong:
            window.problem = f"wrong: {wrong}"
    except Exception as error:
        window.problem = f"failed: {type(error).__name__}: {str(error)[:500]}"
        server.post("/resume")
    window.end = max(window.end, time.monotonic() if window.problem.startswith("failed") else window.end)
    return window


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the load for each way")
    options, place = parsed(parser)
    trainer = TrainerModel(options.size, options.dtype, place.trainer_device)
    sets: list[Weights] = []
    for version in (1, 2):
        trainer.set(version)
        sets.append([(name, tensor.clone()) for name, tensor in trainer.weights()])
    trainer.set(0)  # what the engines start from
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(trainer, place, options.logs, native=options.native))
        groups = connected(server, stack, options)
        ways, native = ways_of(server, groups, join(server), sets[0], options)
        windows = []
        with load(server.url, server.model, options.engines, options.load, options.tokens) as felt:
            quiet = Window("without updates")
            time.sleep(options.seconds)
            quiet.end = time.monotonic()
            for way in (*ways, *native):
                if isinstance(way, Native):
                    way.open(sets[0])
                windows.append(updates(server, trainer, way, sets, options.seconds))
                if isinstance(way, Native):
                    way.close()
    rows = [window.row(felt, quiet, options.load * options.engines) for window in (quiet, *windows)]
    columns = ["way", "right", "updates", "tokens_per_s", "of_quiet", "bubble_ms", "longest_bubble_ms", "median_gap_ms"]
    columns += ["beside", "update_ms"]
    print(table(rows, columns))
    finish({"bytes": trainer.nbytes, "load": options.load, "engines": options.engines, "rows": rows}, options.out)
    return 0 if rows[1]["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
