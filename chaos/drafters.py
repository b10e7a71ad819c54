"""Tells which weights an engine drafts with, from how many of its drafted tokens are accepted.

The drafter is a draft model of the base model's own architecture, and each update gives both the same weights. So the base
model accepts all that a drafter of its own version proposes, and almost nothing of another version's.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

# vLLM's counters at /metrics, by engine.
_COUNTER = re.compile(
    r'^vllm:spec_decode_num_(draft|accepted)_tokens_total\{(?:[^}]*,)?engine="(\d+)"[^}]*\} (\S+)$', re.MULTILINE
)
_DRAFTED_AT_ONCE = 3
# More than a stale drafter reaches; a tie of two tokens can cost a few.
_ACCEPTED = 0.9
# A request that an update has met, or a late counter, can spoil one attempt.
_ATTEMPTS = 4


def arguments(drafter: Path) -> list[str]:
    """Return vLLM's arguments for engines that draft with the model in a directory."""
    config = {"method": "draft_model", "model": str(drafter), "num_speculative_tokens": _DRAFTED_AT_ONCE}
    return ["--speculative-config", json.dumps(config)]


def metrics_of(url: str) -> str:
    """Return the text of /metrics. Raises OSError if the server does not answer."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def counted(metrics: str, engine: int) -> tuple[int, int]:
    """Return how many tokens an engine has drafted, and how many of them were accepted, by the text of /metrics."""
    found = {kind: int(float(value)) for kind, rank, value in _COUNTER.findall(metrics) if int(rank) == engine}
    return found.get("draft", 0), found.get("accepted", 0)


def rejected(metrics: Callable[[], str], ask: Callable[[], object], engine: int) -> str:
    """Return how few of the tokens that an engine drafts are accepted; empty if they are those of its version.

    Args:
        metrics: returns the text of /metrics.
        ask: lets the engine draft; a drafter is right if almost all of what it drafts meanwhile is accepted.
        engine: its DP rank.
    """
    drafted = accepted = 0
    for _ in range(_ATTEMPTS):
        before = counted(metrics(), engine)
        ask()
        drafted, accepted = (now - then for now, then in zip(counted(metrics(), engine), before, strict=True))
        if drafted and accepted > _ACCEPTED * drafted:
            return ""
    return f"{accepted} of {drafted} drafted tokens were accepted"
