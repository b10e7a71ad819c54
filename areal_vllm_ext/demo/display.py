"""Print a table row by row, with the standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class GrowingTable:
    """A table with right-aligned columns; each row is printed when it is added."""

    def __init__(self, heads: Sequence[str]) -> None:
        self._widths = [max(len(head), 8) for head in heads]
        self.add(heads)

    def add(self, row: Sequence[str]) -> None:
        """Print a row."""
        print("  ".join(cell.rjust(width) for cell, width in zip(row, self._widths, strict=True)), flush=True)
