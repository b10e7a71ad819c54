"""Play scenarios, and show where the code does not do what their text says.

python -m chaos.scenarios [--rewrite] [FILE ...]
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from chaos.simulation import simulated_time

from .player import played


def main() -> int:
    parser = argparse.ArgumentParser(description="Play scenarios of the simulation.")
    parser.add_argument("files", nargs="*", type=Path, help="default: all of this folder")
    parser.add_argument("--rewrite", action="store_true", help="write what happens now into the files")
    options = parser.parse_args()
    different = 0
    for file in options.files or sorted(Path(__file__).parent.glob("*.txt")):
        expected = file.read_text()
        with simulated_time():
            found = played(expected)
        if found != expected:
            different += 1
            sys.stdout.writelines(
                difflib.unified_diff(expected.splitlines(True), found.splitlines(True), file.name, "now")
            )
            if options.rewrite:
                file.write_text(found)
    print(f"{different} scenarios {'rewritten' if options.rewrite else 'differ'}")
    return int(different > 0 and not options.rewrite)


if __name__ == "__main__":
    sys.exit(main())
