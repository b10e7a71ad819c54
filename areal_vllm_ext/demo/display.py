"""What the demo shows to people: live on a terminal, plain lines where standard output is anything else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True)


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """Say what is waited for; gives a function that says how far it is."""
    if CONSOLE.is_terminal:
        with CONSOLE.status(text) as status:
            yield lambda news: status.update(f"{text}\n  {news}")
    else:
        CONSOLE.print(text)
        yield CONSOLE.print


@contextmanager
def growing_table(heads: Sequence[str]) -> Iterator[Callable[[Sequence[str]], None]]:
    """A table that grows by a row at a time; gives the function that adds one."""
    if CONSOLE.is_terminal:
        table = Table(*heads)
        with Live(table, console=CONSOLE, auto_refresh=False, vertical_overflow="visible") as live:

            def add(row: Sequence[str]) -> None:
                table.add_row(*row)
                live.refresh()

            yield add
    else:
        widths = [max(len(head), 8) for head in heads]

        def line(row: Sequence[str]) -> None:
            CONSOLE.print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))

        line(heads)
        yield line
