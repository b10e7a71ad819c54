"""Describe results: the command that repeats them, date, machine and versions; and print tables."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

# Options that do not matter for a repetition.
_PLACES = ("--out", "--logs")


def command() -> str:
    """Return the command that repeats this run."""
    spec = sys.modules["__main__"].__spec__
    name = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).stem
    words = [
        word
        for word, before in zip(sys.argv[1:], sys.argv, strict=False)
        if word.partition("=")[0] not in _PLACES and before not in _PLACES
    ]
    return shlex.join(["python", "-m", name, *words])


def machine() -> str:
    """Return the machine's cores, memory and GPUs."""
    import torch  # imported here because it takes seconds, and most callers need only the command

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    gpus = torch.cuda.device_count()
    return f"{os.cpu_count()} cores, {memory} GB, {f'{gpus} {torch.cuda.get_device_name(0)}' if gpus else 'no GPU'}"


def described(results: dict[str, Any]) -> dict[str, Any]:
    """Return ``results`` with command, date, machine and versions."""
    return {
        "command": command(),
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {name: found for name in ("areal-vllm-ext", "vllm", "torch", "transformers") if (found := installed(name))},
        **results,
    }


def installed(package: str) -> str:
    """Return the package's version; empty if it is not installed."""
    try:
        return package_version(package)
    except PackageNotFoundError:
        return ""


def save(results: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """Describe the results, write them to ``out``, if any, and return them."""
    whole = described(results)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(whole, indent=1) + "\n")
    return whole


def finish(results: dict[str, Any], out: Path | None) -> None:
    """Describe the results, write them to ``out``, if any, and print them as the last line."""
    print(json.dumps(save(results, out)), flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest of ``values`` that a ``share`` (0 to 1) of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, 99th percentile and extremes."""
    return {
        "p50": round(statistics.median(values), 3),
        "p99": round(percentile(values, 0.99), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Return ``rows`` as a text table of ``columns``."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)
