"""What the commands have in common: the form of their help, their exit codes, and types of options."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

STATUS_CODE = "no engine is there, or one is unreachable, tainted, stale, foreign or on another version"
VERIFY_CODE = "weights differ, or could not be compared"
EXIT_CODES = """\
exit codes:
  0    done
  1    failed; one line on standard error says what failed, why, and what to do
  2    the command line is wrong
{}  130  interrupted by Ctrl-C (143: by SIGTERM), after undoing what was begun
"""


class Commands:
    """Adds commands that share options and the form of their help."""

    def __init__(self, parsers: Any) -> None:
        self._parsers = parsers

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int],
        summary: str,
        details: str = "",
        *,
        code_3: str = "",
    ) -> argparse.ArgumentParser:
        """Add the command ``name`` and return its parser.

        Args:
            name: of the command.
            run: carries it out and returns the exit code.
            summary: one line, for the list of commands.
            details: follow the summary in the command's own help.
            code_3: what exit code 3 means, for a command that has it.
        """
        parser: argparse.ArgumentParser = self._parsers.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=f"{summary}.\n\n{details}".strip(),
            epilog=EXIT_CODES.format(f"  3    {code_3}\n" if code_3 else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.set_defaults(run=run)
        return parser


def add_key_file(parser: argparse.ArgumentParser) -> None:
    """Add the option for the cluster's key."""
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        help="the cluster's key (default: AREAL_VLLM_KEY_FILE; without either, loopback addresses only, with this user's key)",
    )


def seconds(text: str) -> float:
    """Parse a timeout."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 31_536_000:  # false for NaN too
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and up to 31536000 (a year)")
    return value


def count(text: str) -> int:
    """Parse a number of things, at least one."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
