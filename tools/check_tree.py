"""Check what ruff and mypy cannot: how long the package's files are, and what the commits' subjects look like."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MOST_LINES = 450
# A longer file says why, in one of its first lines: "Over 450 lines: <reason>".
REASON = f"Over {MOST_LINES} lines: "
FIRST_LINES = 20
LONGEST_SUBJECT = 72
# The rules for subjects are kept since this commit.
SINCE = "c9b728d75947bf13b73d02ff6b5b26e6f179c842"
# A word and a colon, or lower-case words and a colon; a colon within a sentence is none.
_PREFIX = re.compile(r"(\S+|[a-z][^:]{0,30}): ")


def long_files(package: Path) -> list[str]:
    """Name the files that are too long and give no reason."""
    problems = []
    for file in sorted(package.rglob("*.py")):
        lines = file.read_text().splitlines()
        if len(lines) > MOST_LINES and not any(REASON in line for line in lines[:FIRST_LINES]):
            problems.append(f"{file}: {len(lines)} lines: split it, or say why not in its first lines ({REASON}...)")
    return problems


def bad_subjects(root: Path, since: str = SINCE) -> list[str]:
    """Name the commits whose subject is too long or has a prefix; none where there is no Git."""
    if not (root / ".git").exists():  # an archive of the sources
        return []
    # A shallow clone may lack the first commit; then all that it has are later ones.
    known = subprocess.run(["git", "cat-file", "-e", f"{since}^{{commit}}"], cwd=root, capture_output=True, check=False)
    commits = "HEAD" if known.returncode else f"{since}..HEAD"
    log = subprocess.run(
        ["git", "log", "--format=%h %s", commits], cwd=root, capture_output=True, text=True, check=True
    )
    problems = []
    for line in log.stdout.splitlines():
        commit, _, subject = line.partition(" ")
        if len(subject) > LONGEST_SUBJECT:
            problems.append(f"commit {commit}: the subject has {len(subject)} characters, {LONGEST_SUBJECT} at most")
        if _PREFIX.match(subject):
            problems.append(f"commit {commit}: the subject has a prefix: {subject}")
    return problems


def main() -> int:
    root = Path(__file__).parent.parent
    problems = long_files(Path("areal_vllm_ext")) + bad_subjects(root)
    print("\n".join(problems) or "Files and commit subjects are as they should be.")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
