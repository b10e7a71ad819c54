"""One family in a process of its own: an engine starts, gets an update by each kind of send, and is asked after each."""

from __future__ import annotations

import logging
import math
import re
import statistics
import time
from typing import TYPE_CHECKING, Any

from .engine import Engine, Said, distance
from .trainer import SENDS, Trainer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .families import Family


# What the worker logs where it can make no load plan.
_NO_PLAN = re.compile("(?:layer by layer|beside the live weights): (.*)", re.DOTALL)


def run(family: Family, folder: Path, sends: Iterable[str]) -> dict[str, Any]:
    """Try a family.

    Args:
        family: what to try.
        folder: for checkpoints, one for each set of weights; empty.
        sends: kinds of send to try.

    Returns:
        what the engine said at its start and after each send, and what the oracle says to each set of weights.
    """
    from areal_vllm_ext import EngineGroup

    trainer = Trainer(family)
    trainer.set("zero")
    start = time.perf_counter()
    engine = Engine(family, trainer.save(folder / "zero"), updatable=True)
    outcome: dict[str, Any] = {
        "model": type(engine.worker.get_model()).__name__,
        "start_s": round(time.perf_counter() - start, 1),
        "oracle": {"zero": trainer.says()},
        "start": {"weights": "zero", "said": engine.says()},
        "sends": {},
    }
    if family.drafter:
        outcome["accepted_at_start"] = engine.accepted()
    notes = _Notes()
    logger = logging.getLogger("vllm.areal_vllm_ext")
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    serving = "zero"
    with EngineGroup.connect() as group:
        group.wait_ready(engines=1, timeout=30)
        for kind, weights in SENDS:
            if kind not in sends:
                continue
            trainer.set(weights)
            if (source := trainer.to_send(kind, folder / weights)) is None:
                continue
            outcome["oracle"].setdefault(weights, trainer.says())
            sent: dict[str, Any] = {}
            draft = None if not family.drafter else folder / weights / "drafter" if kind == "disk" else trainer.model
            try:
                result = group.update_weights(
                    source, draft=draft, version=kind, timeout=60, keep_buffers=kind.startswith("kept")
                )
                serving = weights
                sent |= {"pause_ms": round(result.pause_ms, 1), "kept": result.kept}
            except Exception as error:
                sent["error"] = f"{type(error).__name__}: {error}"
            state = group.status()[0]
            if "error" not in sent:
                sent["way"] = state.loaded
            sent |= {"weights": serving, "update_phase": state.update_phase, "said": engine.says()}
            outcome["sends"][kind] = sent
        if family.drafter:
            before = engine.accepted()
            engine.says()
            after = engine.accepted()
            outcome["accepted_at_end"] = (after[0] - before[0], after[1] - before[1])
        state = group.status()[0]
        outcome |= {"unproven": state.unproven}
        if state.update_phase == "idle" and state.version is not None:
            outcome["verified"] = group.verify(timeout=60).equal
    outcome["not_planned"] = next((found[1] for line in notes.lines if (found := _NO_PLAN.search(line))), "")
    return outcome


def fresh(family: Family, folder: Path) -> dict[str, Any]:
    """Return what a freshly started engine says."""
    return {"said": Engine(family, folder, updatable=False).says()}


class _Notes(logging.Handler):
    """Keeps the package's messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def judged(outcome: dict[str, Any], oracle: dict[str, Said], bound: float) -> dict[str, Any]:
    """Return the row of a family.

    Args:
        outcome: what ``run`` returned.
        oracle: what an engine must say, by set of weights.
        bound: how far an engine's values may be from the oracle's.
    """
    kept = ("model", "start_s", "unproven", "not_planned", "verified", "accepted_at_start", "accepted_at_end")
    row: dict[str, Any] = {name: outcome[name] for name in kept if name in outcome}
    row |= {"bound": bound, "sends": {}}
    for kind, sent in outcome["sends"].items():
        away = distance(sent["said"], oracle[sent["weights"]])
        entry = {name: sent[name] for name in ("way", "pause_ms", "kept", "error", "update_phase") if name in sent}
        row["sends"][kind] = entry | {"right": away <= bound, "distance": away if away < math.inf else "other tokens"}
    pauses = [sent["pause_ms"] for sent in row["sends"].values() if "pause_ms" in sent]
    if pauses:
        row |= {"first_pause_ms": pauses[0], "pause_ms": round(statistics.median(pauses[1:] or pauses), 1)}
    return row
