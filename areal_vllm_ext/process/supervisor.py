"""Runs one command and sees to it that nothing of it is left when its owner is gone.

    python supervisor.py GRACE SCRATCH COMMAND...

The owner, whose child this is, holds the other end of stdin and never writes to it. When that end closes or the owner is
gone (even by SIGKILL), and on SIGTERM, SIGINT or SIGHUP, the command gets SIGTERM. What is alive GRACE seconds later, or
outlives the command, gets SIGKILL: children of children too, in whatever session they put themselves, because as a
subreaper this process inherits every orphan of its tree. Then the folder SCRATCH is removed, unless it is empty text, and
shared memory of Python's that the tree had open, once nobody has it open: vLLM's Ray workers, which are no children of
vLLM's, make some, and Ray kills them and what would remove it.
Own process id and the command's are written to stdout, at the end the command's exit code; what it prints goes to stderr.

It leaves its owner's children at once: a Ray worker that exits kills them, and the supervisor with them, before it could
do its work. A script of its own, run with ``python -I -S``: standard library only, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TRACKER_GRACE = 2.0
SHARED_MEMORY = "/dev/shm/psm_"  # noqa: S108 - where Python has it on Linux
SHARED_MEMORY_GRACE = 4.0


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """All processes below this one, as far as /proc tells."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    frontier = [os.getpid()]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def is_resource_tracker(pid: int) -> bool:
    """Whether it is one of Python's helpers that remove the shared memory of processes that were killed, then end."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def shared_memory(pids: list[int] | None = None) -> set[str]:
    """The files of Python's shared memory that these processes have open; default: all."""
    found: set[str] = set()
    for maps in (Path(f"/proc/{pid}/maps") for pid in pids) if pids is not None else Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            lines = maps.read_text(errors="replace").splitlines()
            found.update(line[line.index(SHARED_MEMORY) :] for line in lines if SHARED_MEMORY in line)
    return found


def remove(shared: set[str]) -> None:
    """Remove each of these files as soon as nobody has it open; those that somebody keeps open stay."""
    ends = time.monotonic() + SHARED_MEMORY_GRACE
    while (shared := {path for path in shared if Path(path).exists()}) and time.monotonic() < ends:
        for path in shared - shared_memory():
            Path(path).unlink(missing_ok=True)
        time.sleep(0.05)


def reap() -> dict[int, int]:
    """Exit statuses of the children, and inherited orphans, that have ended since the last call."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (entry := os.waitpid(-1, os.WNOHANG))[0]:
            ended[entry[0]] = entry[1]
    return ended


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait(pid: int, owner: int, wake: int) -> int | None:
    """Wait until the command has ended, then return its status, or until it should end."""
    while True:
        if (status := reap().get(pid)) is not None:
            return status
        # A process forked from the owner may hold the pipe open after it: look at the owner too.
        ready, _, _ = select.select([0, owner, wake], [], [])
        if owner in ready or (0 in ready and not os.read(0, 1)):
            return None
        if wake in ready and any(number != signal.SIGCHLD for number in os.read(wake, 1024)):
            return None


def main() -> int:
    """Run the command that the arguments give."""
    grace, scratch, command = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
    owner = os.pidfd_open(os.getppid())
    if os.fork():
        os._exit(0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)

    # Signals are read from a pipe, by their numbers: select() waits for them as for everything else.
    wake, signalled = os.pipe()
    os.set_blocking(signalled, False)
    signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)

    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            # Should this process itself be killed, the command is at least told to end. (This process has one thread.)
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
        )
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    print(os.getpid(), child.pid, flush=True)

    status = wait(child.pid, owner, wake)
    shared = shared_memory(descendants())
    if status is None:
        send(child.pid, signal.SIGTERM)
        ends = time.monotonic() + grace
        while status is None and time.monotonic() < ends:
            time.sleep(0.05)
            status = reap().get(child.pid)
    ends = time.monotonic() + TRACKER_GRACE
    while alive := descendants():
        for pid in alive:
            if not is_resource_tracker(pid) or time.monotonic() > ends:
                send(pid, signal.SIGKILL)
        time.sleep(0.02)
        status = reap().get(child.pid, status)
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    remove(shared)
    child.returncode = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    print(child.returncode if child.returncode >= 0 else 128 - child.returncode, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
