"""Run one command, and end its whole process tree when its owner is gone.

    python supervisor.py GRACE SCRATCH COMMAND...

The owner is this process's parent. It holds the other end of stdin and never writes to it. The command gets SIGTERM when
that end closes, when the owner is gone (even by SIGKILL), and on SIGTERM, SIGINT or SIGHUP. Processes that are alive GRACE
seconds later, or that outlive the command, get SIGKILL. That includes children of children in any session, because as a
subreaper this process inherits every orphan of its tree.

Then the folder SCRATCH is removed (unless the argument is empty). So is the shared memory that Python, vLLM, torch or NCCL made
in the tree, as soon as no process has it open. Processes that are killed leave such memory; Python's resource tracker, which
would remove some of it, may be killed as well. The supervisor notes what the tree has open whenever a file appears in /dev/shm,
and every 5 s, because a process that is killed cannot be asked afterwards.

The process ids of the supervisor and of the command are written to stdout, then each shared memory that is noted, and at the
end the command's exit code. If the supervisor itself is killed, its owner knows what to remove. The command's output goes to
stderr.

The supervisor leaves its owner's process tree at once, because a Ray worker that exits first kills its children. It is a
script of its own that runs with ``python -I -S`` and the standard library only, so it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
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
NOTE_SECONDS = 5.0
# By name, because users keep files in /dev/shm too, and a server may have opened those.
SHARED_MEMORY = re.compile(r"/dev/shm/((psm_|sem\.|torch_|nccl-|vllm)[^/ ]*|[^/ ]*-cpushm[^/ ]*)$")  # noqa: S108 - Linux's place
SHARED_MEMORY_GRACE = 4.0
SHARED_MEMORY_FOLDER = "/dev/shm"  # noqa: S108
IN_CREATE = 0x100
# The owner reads what is told to it rarely, and a pipe that is full would stop this process.
MOST_TOLD_BYTES = 32 << 10


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """Return all processes below this one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # already gone
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
    """Return whether the process is Python's resource tracker, which removes shared memory of killed processes and ends."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def shared_memory(pids: list[int]) -> set[str]:
    """Return the files of libraries' shared memory that these processes have open."""
    found: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # already gone, or another user's
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
            found.update(one[0] for one in map(SHARED_MEMORY.search, lines) if one)
    return found


def mapped_inodes() -> set[int]:
    """Return the inodes of shared memory that processes have mapped; Linux shows the maker of a semaphore with another name."""
    found: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # already gone, or another user's
            lines = maps.read_text(errors="replace").splitlines()
            found.update(int(line.split()[4]) for line in lines if SHARED_MEMORY_FOLDER in line)
    return found


def inode(path: str | Path) -> int:
    """Return a file's inode; 0 if there is no such file."""
    try:
        return Path(path).stat().st_ino
    except FileNotFoundError:
        return 0


def remove(shared: set[str]) -> None:
    """Remove each of these files once no process has it open; files that stay open for 4 s are kept."""
    ends = time.monotonic() + SHARED_MEMORY_GRACE
    while (shared := {path for path in shared if inode(path)}) and time.monotonic() < ends:
        used = mapped_inodes()
        for path in shared:
            if inode(path) not in used:
                Path(path).unlink(missing_ok=True)
        time.sleep(0.05)


def tell(*what: object) -> None:
    """Write a line to the owner, which may be gone."""
    with contextlib.suppress(OSError):
        os.write(1, f"{' '.join(map(str, what))}\n".encode())


class Notes:
    """The shared memory that the tree has had open. The owner is told each path, for the case that this process is killed.

    Attributes:
        paths: what was noted so far.
        due: when to note again.
        files: becomes readable when a file appears in /dev/shm; empty if the kernel cannot say so.
    """

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.due = 0.0
        self.files = self._watched()
        self._taken = 0.0
        self._told = 0
        self._again = False

    @staticmethod
    def _watched() -> list[int]:
        libc = ctypes.CDLL(None)
        changes = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if changes < 0:
            return []
        return [changes] if libc.inotify_add_watch(changes, SHARED_MEMORY_FOLDER.encode(), IN_CREATE) >= 0 else []

    def note_soon(self) -> None:
        """Note soon, because a file has appeared; it may be mapped a little later."""
        with contextlib.suppress(OSError):
            while os.read(self.files[0], 4096):
                pass
        self._again = True
        self.due = min(self.due, max(time.monotonic() + 0.05, self._taken + 0.25))

    def take(self) -> None:
        """Note what the tree has open now."""
        new = shared_memory(descendants()) - self.paths
        self.paths |= new
        for path in new:
            if self._told + len(path) < MOST_TOLD_BYTES:
                self._told += len(path)
                tell(path)
        self._taken = time.monotonic()
        self.due = self._taken + (0.5 if self._again else NOTE_SECONDS)
        self._again = False


def reap() -> dict[int, int]:
    """Return the exit statuses of children and inherited orphans that have ended since the last call."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while (entry := os.waitpid(-1, os.WNOHANG))[0]:
            ended[entry[0]] = entry[1]
    return ended


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait(pid: int, owner: int, wake: int, notes: Notes) -> int | None:
    """Wait until the command has ended and return its status, or None when it should be ended. Take notes meanwhile."""
    while True:
        if time.monotonic() >= notes.due:
            notes.take()
        if (status := reap().get(pid)) is not None:
            return status
        # Watch the owner too, because a process forked from the owner may hold the pipe open after the owner's end.
        seconds = max(notes.due - time.monotonic(), 0.0)
        ready, _, _ = select.select([0, owner, wake, *notes.files], [], [], seconds)
        if any(file in ready for file in notes.files):
            notes.note_soon()
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

    # Read signals from a pipe, so that select() can wait for them together with everything else.
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
            # If this process is killed, the kernel sends SIGTERM to the command. (Safe, because there is only one thread.)
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
        )
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")
    tell(os.getpid(), child.pid)

    notes = Notes()
    status = wait(child.pid, owner, wake, notes)
    notes.take()
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
    remove(notes.paths)
    child.returncode = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    tell(child.returncode if child.returncode >= 0 else 128 - child.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
