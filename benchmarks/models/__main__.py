"""Try updates on every family of models that this vLLM serves: ``python -m benchmarks.models [FAMILY ...]``.

For each family: a tiny random checkpoint, an engine in a process of its own, an update by each kind of send, and after each
the engine's tokens and log-probabilities beside an oracle's. The oracle is Hugging Face's ``generate`` where it says what
vLLM says before any update, and otherwise an engine that was freshly started from the same weights. Such an engine must
be met as closely as a second fresh one meets it.

Writes ``results/models_cpu.json`` and ``docs/models.md``. Names of families try only these, and replace their rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import report

from ..apart import ENVIRONMENT, apart, import_once
from . import page, trial
from .engine import distance
from .families import FAMILIES
from .trainer import SENDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .families import Family

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "benchmarks/results/models_cpu.json"
PAGE = ROOT / "docs/models.md"

# A process that hangs is ended after this time.
TIMEOUT = 150.0
# How far log-probabilities of vLLM and of Hugging Face may be apart in float32.
BOUND = 1e-3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="try only these (default: all)")
    parser.add_argument(
        "--sends", default=",".join(kind for kind, _ in SENDS), help="kinds of send, with commas between"
    )
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds for one process (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument(
        "--page", type=Path, default=None, help="the table (default with the default --out: docs/models.md)"
    )
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.families if name not in FAMILIES]:
        parser.error(f"unknown families {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    os.environ.update(ENVIRONMENT)
    import_once()
    rows: dict[str, Any] = {}
    if given.families and given.out.exists():
        rows = json.loads(given.out.read_text())["families"]
    failed = 0
    for name in given.families or FAMILIES:
        rows[name] = row = tried(FAMILIES[name], given.sends.split(","), given.timeout)
        failed += not page.is_right(row)
        print(page.line(name, row), flush=True)
        ordered = {one: rows[one] for one in FAMILIES if one in rows}
        whole = report.save({"families": ordered}, given.out)
        if given.page or given.out == RESULT:
            (given.page or PAGE).write_text(page.text(whole))
    print(page.summary(rows), flush=True)
    return min(failed, 1)


def tried(family: Family, sends: Sequence[str], timeout: float) -> dict[str, Any]:
    """Try one family, and return its row."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="models-") as scratch:
        folder = Path(scratch)
        outcome = apart(lambda: trial.run(family, folder, sends), folder, timeout)
        row = outcome if "error" in outcome else _judged(family, outcome, folder, timeout)
    row["wall_s"] = round(time.perf_counter() - start, 1)
    return {"architecture": family.architecture} | row


def _judged(family: Family, outcome: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    first = outcome["oracle"]["zero"]
    if first and distance(outcome["start"]["said"], first) <= BOUND:
        return trial.judged(outcome, outcome["oracle"], BOUND) | {"oracle": "Hugging Face"}
    fresh: dict[str, Any] = {}
    for weights in outcome["oracle"]:
        answer = apart(lambda weights=weights: trial.fresh(family, folder / weights), folder, timeout)
        if "error" in answer:
            return answer
        fresh[weights] = answer["said"]
    again = apart(lambda: trial.fresh(family, folder / "zero"), folder, timeout)
    if "error" in again:
        return again
    bound = distance(fresh["zero"], again["said"])
    if bound == math.inf or distance(outcome["start"]["said"], fresh["zero"]) > bound:
        return {"error": "two engines that start from the same weights say other things"}
    return trial.judged(outcome, fresh, bound) | {"oracle": "fresh engine"}


if __name__ == "__main__":
    sys.exit(main())
