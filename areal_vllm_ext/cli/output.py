"""Print results, for people and for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def print_report(as_json: bool, facts: Mapping[str, object], sentence: str) -> int:
    """Print facts as JSON or as a sentence with ``{name}`` for each; returns exit code 0."""
    print(json.dumps(facts) if as_json else sentence.format(**facts))
    return 0


def print_table(columns: Mapping[str, Sequence[str]]) -> None:
    """Print columns of equal length under their names."""
    padded = []
    for head, cells in columns.items():
        width = max(map(len, (head, *cells)))
        padded.append([cell.ljust(width) for cell in (head, *cells)])
    for row in zip(*padded, strict=True):
        print("  ".join(row).rstrip())
