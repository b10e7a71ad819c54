"""Raise this process's limit on open files."""

from __future__ import annotations

import contextlib
import resource

# More than strangers on this machine can hold open with the usual limits of their own, and few enough for programs that
# walk through all descriptors up to the limit.
WANTED_FILES = 65_536


def raise_file_limit() -> None:
    """Raise the soft limit on open files to 65,536, or to the hard limit if that is lower.

    The usual soft limit is 1024. Connections to any port that this process listens on count, also those of strangers that
    are silent: at the limit, torch and vLLM fail to open what they need and end the process.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some sandboxes forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
