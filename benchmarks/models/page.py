"""The table ``docs/models.md``, and the lines that the command prints."""

from __future__ import annotations

from typing import Any

from .families import FAMILIES

# A reason is cut to this length in the table; the JSON has all of it.
_WIDTH = 160

_ABOUT = """# Models

<!-- Made by `python -m benchmarks.models`. Do not edit it by hand. -->

`{command}` (`make test-models`) made this page from [its results](../benchmarks/results/models_cpu.json) on {date},
with {versions}.

Each row is a tiny random model of a family, served by a real engine on a CPU, in float32 unless the row says otherwise. The
engine gets an update by each kind of send. After each, its greedy tokens and their log-probabilities must be those of the
oracle: Hugging Face's `generate` on the same weights (within {bound}), or an engine that was freshly started from them
(then as close as a second fresh engine).

- **sends**: how many kinds of send ended with the right weights: a module, its state dict, an iterable of strided float64
  tensors, a folder on disk, a module in which one layer changed, and two updates with `keep_buffers`.
- **way**: how the first update and the later ones were loaded, see [architecture](architecture.md#the-right-weights).
- **pause**: milliseconds of the first update and the median of the later ones, on {machine}.
  Other programs that run at the same time make it longer.
"""


def is_right(row: dict[str, Any]) -> bool:
    """Return whether the family is served, and every send ended with the right weights."""
    sends = row.get("sends", {})
    return bool(sends) and all(sent["right"] and "error" not in sent for sent in sends.values())


def is_served(row: dict[str, Any]) -> bool:
    return "sends" in row


def line(name: str, row: dict[str, Any]) -> str:
    """Return one line about a family."""
    cells = _cells(name, row)
    return f"{cells[0]:22} {cells[2]:9} {cells[3]:20} {cells[4]:14} {row.get('wall_s', 0):5.1f} s  {cells[5]}"


def summary(rows: dict[str, dict[str, Any]]) -> str:
    served = [row for row in rows.values() if is_served(row)]
    planned = [row for row in served if _ways(row)[1:] == ["plan"] or _ways(row) == ["plan"]]
    architectures = {row["architecture"] for row in rows.values()}
    return (
        f"{len(rows)} models of {len(architectures)} architectures were tried. vLLM serves {len(served)} of them. "
        f"{sum(map(is_right, served))} are right after every send. {len(planned)} are loaded by a plan from the second update "
        "on."
    )


def text(result: dict[str, Any]) -> str:
    """Return the page."""
    rows: dict[str, dict[str, Any]] = result["families"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    command = "python -m benchmarks.models"
    parts = [
        _ABOUT.format(
            command=command, date=result["date"][:10], versions=versions, bound="0.001", machine=result["machine"]
        )
    ]
    parts.append(summary(rows) + "\n")
    parts.append("| family | model in vLLM | sends | way | pause, ms | oracle, and what is not right |")
    parts.append("| --- | --- | --- | --- | --- | --- |")
    parts += [f"| {' | '.join(_cells(name, row))} |" for name, row in rows.items() if is_served(row)]
    if not_served := {name: row for name, row in rows.items() if not is_served(row)}:
        parts.append("\n## Not served\n\n| family | architecture | why |\n| --- | --- | --- |")
        parts += [f"| {name} | {row['architecture']} | {_short(row['error'])} |" for name, row in not_served.items()]
    if missing := [name for name in FAMILIES if name not in rows]:
        parts.append(f"\n## Not tried in this run\n\n{', '.join(missing)}")
    return "\n".join(parts) + "\n"


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    if not is_served(row):
        return [name, row["architecture"], "-", "-", "-", f"not served: {_short(row['error'])}"]
    sends = row["sends"]
    right = sum(sent["right"] and "error" not in sent for sent in sends.values())
    notes = [row["oracle"]]
    notes += [f"{kind}: {_fault(sent)}" for kind, sent in sends.items() if "error" in sent or not sent["right"]]
    if "accepted_at_end" in row:
        (start, made), (end, made_then) = row["accepted_at_start"], row["accepted_at_end"]
        notes.append(
            f"{start} of the drafter's {made} tokens were accepted at the start, {end} of {made_then} at the end"
        )
    if reasons := {sent["way"] for sent in sends.values() if sent.get("way", "").startswith("reload:")}:
        notes += sorted(reasons)
    if row.get("unproven"):
        notes.append(f"not compared with a fresh load: {row['unproven']}")
    if row.get("not_planned"):
        notes.append(f"no plan: {row['not_planned']}")
    pause = f"{row['first_pause_ms']} / {row['pause_ms']}" if "pause_ms" in row else "-"
    return [
        name,
        row["model"],
        f"{right} of {len(sends)}",
        ", then ".join(_ways(row)),
        pause,
        _short("; ".join(notes), 400),
    ]


def _fault(sent: dict[str, Any]) -> str:
    serves = "" if sent["right"] else f", and serves wrong weights ({sent['update_phase']})"
    return f"refused: {sent['error']}{serves}" if "error" in sent else f"wrong: {sent['distance']}"


def _ways(row: dict[str, Any]) -> list[str]:
    """Return the ways that were used, without repetitions."""
    ways = [sent["way"].partition(":")[0] for sent in row["sends"].values() if "way" in sent]
    return [way for place, way in enumerate(ways) if place == 0 or ways[place - 1] != way]


def _short(reason: str, width: int = _WIDTH) -> str:
    flat = " ".join(reason.split()).replace("|", "\\|").replace("<", "&lt;")
    return flat if len(flat) <= width else flat[: width - 1] + "…"
