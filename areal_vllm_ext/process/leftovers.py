"""Find what servers that have ended left on disk: vLLM's sockets, scratch folders, and shared memory of its libraries."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
from pathlib import Path

from .supervisor import SHARED_MEMORY, inode, mapped_inodes

SCRATCH_PREFIX = "areal-vllm-"
_SCRATCH = re.compile(rf"{SCRATCH_PREFIX}\w{{8}}$")  # as tempfile.mkdtemp makes them
# vLLM names its sockets so, in VLLM_RPC_BASE_PATH or the temporary folder.
_SOCKET = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")


def left_on_disk() -> set[Path]:
    """Return this user's sockets, scratch folders and segments that no process uses any more."""
    segments = {path for path in Path("/dev/shm").glob("*") if SHARED_MEMORY.match(str(path))}  # noqa: S108 - Linux's place
    used = mapped_inodes()
    found = {path for path in segments if inode(path) not in used}
    for path in Path(tempfile.gettempdir()).iterdir():
        if (_SOCKET.match(path.name) and _is_dead(path)) or (_SCRATCH.match(path.name) and not _is_supervised(path)):
            found.add(path)
    return {path for path in found if _is_own(path)}


def _is_own(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        return path.lstat().st_uid == os.getuid()
    return False


def _is_dead(path: Path) -> bool:
    """Return whether no process listens on the socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return path.is_socket()
    return False


def _is_supervised(folder: Path) -> bool:
    """Return whether a supervisor that is to remove the folder runs; the folder is one of its arguments."""
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            if os.fsencode(folder) in arguments.read_bytes().split(b"\0"):
                return True
    return False
