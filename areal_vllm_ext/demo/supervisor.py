"""Runs one command and sees to it that nothing of it is left when its owner is gone.

    python supervisor.py GRACE COMMAND...

The owner holds the other end of stdin and never writes to it. When that end closes (the owner asked for the end, or was
killed, even with SIGKILL), and on SIGTERM, SIGINT or SIGHUP, the command gets SIGTERM. What is alive GRACE seconds
later, or outlives the command, gets SIGKILL: children of children too, in whatever session they put themselves, because
as a subreaper this process inherits every orphan of its tree. The command's process id is written to stdout; what it
prints goes to stderr.

A script of its own, run with ``python -I -S``: standard library only, so that it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LINUX = sys.platform == "linux"
TRACKER_GRACE = 2.0


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    if LINUX:
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
        # A process forked from the owner may hold the pipe open after it: look at the parent too.
        if os.getppid() != owner:
            return None
        ready, _, _ = select.select([0, wake], [], [], 1.0)
        if 0 in ready and not os.read(0, 1):
            return None
        if wake in ready and any(number != signal.SIGCHLD for number in os.read(wake, 1024)):
            return None


def main() -> int:
    """Run the command that the arguments give; returns its exit code."""
    grace, command = float(sys.argv[1]), sys.argv[2:]
    owner = os.getppid()
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
    print(child.pid, flush=True)

    status = wait(child.pid, owner, wake)
    if status is None:
        send(child.pid, signal.SIGTERM)
        ends = time.monotonic() + grace
        while status is None and time.monotonic() < ends:
            time.sleep(0.05)
            status = reap().get(child.pid)
    if LINUX:
        ends = time.monotonic() + TRACKER_GRACE
        while alive := descendants():
            for pid in alive:
                if not is_resource_tracker(pid) or time.monotonic() > ends:
                    send(pid, signal.SIGKILL)
            time.sleep(0.02)
            status = reap().get(child.pid, status)
    elif status is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    child.returncode = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main())
