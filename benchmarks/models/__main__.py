"""Try updates on every family of models that this vLLM serves: ``python -m benchmarks.models [FAMILY ...]``.

For each family: a tiny random checkpoint, an engine in a process of its own, an update by each kind of send, and after each
the engine's tokens and log-probabilities beside an oracle's. The oracle is Hugging Face's ``generate`` where it says what
vLLM says before any update, and otherwise an engine that was freshly started from the same weights. Such an engine must
be met as closely as a second fresh one meets it.

Writes ``results/models_cpu.json`` and ``docs/models.md``. Names of families try only these, and replace their rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from areal_vllm_ext.demo.deployment import free_ports
from harness import report

from . import page, trial
from .engine import distance
from .families import FAMILIES
from .trainer import SENDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .families import Family

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "benchmarks/results/models_cpu.json"
PAGE = ROOT / "docs/models.md"

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
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
    _import_once()
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
        outcome = _apart(lambda: trial.run(family, folder, sends), folder, timeout)
        row = outcome if "error" in outcome else _judged(family, outcome, folder, timeout)
    row["wall_s"] = round(time.perf_counter() - start, 1)
    return {"architecture": family.architecture} | row


def _judged(family: Family, outcome: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    first = outcome["oracle"]["zero"]
    if first and distance(outcome["start"]["said"], first) <= BOUND:
        return trial.judged(outcome, outcome["oracle"], BOUND) | {"oracle": "Hugging Face"}
    fresh: dict[str, Any] = {}
    for weights in outcome["oracle"]:
        answer = _apart(lambda weights=weights: trial.fresh(family, folder / weights), folder, timeout)
        if "error" in answer:
            return answer
        fresh[weights] = answer["said"]
    again = _apart(lambda: trial.fresh(family, folder / "zero"), folder, timeout)
    if "error" in again:
        return again
    bound = distance(fresh["zero"], again["said"])
    if bound == math.inf or distance(outcome["start"]["said"], fresh["zero"]) > bound:
        return {"error": "two engines that start from the same weights say other things"}
    return trial.judged(outcome, fresh, bound) | {"oracle": "fresh engine"}


def _import_once() -> None:
    """Import what every process needs, once: the processes are forked, and importing takes ten seconds."""
    import transformers  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.engine.llm_engine  # noqa: F401


def _apart(function: Callable[[], dict[str, Any]], folder: Path, timeout: float) -> dict[str, Any]:
    """Call ``function`` in a process of its own. Returns what it returns, or ``{"error": why not}``."""
    answer, log = folder / "answer.json", folder / "log.txt"
    answer.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(function, answer, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"it took more than {timeout:.0f} s", "stage": "hang"}
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text())
        return found
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return {"error": f"the process ended with {process.exitcode}: {' '.join(last)}", "stage": "crash"}


def _answer(function: Callable[[], dict[str, Any]], answer: Path, log: Path) -> None:
    os.setpgrp()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["VLLM_RPC_BASE_PATH"] = str(answer.parent)  # vLLM leaves the sockets of a process that ends
    os.environ["AREAL_VLLM_DIRECTORY"] = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    try:
        found = function()
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}"[:2000], "stage": getattr(error, "stage", "trial")}
        import traceback

        traceback.print_exc()
    partial = answer.with_suffix(".part")
    partial.write_text(json.dumps(found))
    partial.rename(answer)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(0)  # vLLM's end takes seconds, and nothing is left to lose


if __name__ == "__main__":
    sys.exit(main())
