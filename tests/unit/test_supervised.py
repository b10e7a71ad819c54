"""A supervised command leaves nothing behind, whatever happens to whoever started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from areal_vllm_ext.process import supervisor
from areal_vllm_ext.process.supervised import Supervised

# A server at its worst: it ignores SIGTERM, and its grandchild, in a session of its own, does too.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "grandchild"], start_new_session=True)
with open(sys.argv[1], "a") as pids:
    print(os.getpid(), file=pids)
time.sleep(600)
"""

OWNER = """
import sys, time
from pathlib import Path
from areal_vllm_ext.process.supervised import Supervised
process = Supervised([sys.executable, *sys.argv[2:]], log=Path(sys.argv[1]), grace=0.5)
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def stubborn(tmp_path: Path) -> Path:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    return script


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: object, seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < ends
        time.sleep(0.02)


def pids_in(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_end_takes_the_whole_tree_and_the_scratch_folder(tmp_path: Path, stubborn: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "cluster.key").write_text("secret")
    command = [sys.executable, str(stubborn), str(tmp_path / "pids")]
    process = Supervised(command, log=tmp_path / "log", grace=0.5, scratch=scratch)
    wait_for(lambda: len(pids_in(tmp_path / "pids")) == 2)
    assert process.poll() is None
    assert process.end() == 128 + signal.SIGKILL
    assert not any(map(alive, pids_in(tmp_path / "pids")))
    assert not scratch.exists()


# Python's resource tracker would remove the segment, but Ray kills it together with the process that made the segment.
SHARING = """
import mmap, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from multiprocessing import resource_tracker, shared_memory
own = shared_memory.SharedMemory(create=True, size=100)
resource_tracker.unregister(own._name, "shared_memory")
others = shared_memory.SharedMemory(sys.argv[1])
resource_tracker.unregister(others._name, "shared_memory")
with open(sys.argv[2], "rb") as file:
    weights = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
with open(sys.argv[3], "w+b") as file:
    file.truncate(100)
    offload = mmap.mmap(file.fileno(), 0)
print("own", own.name, flush=True)
time.sleep(600)
"""


def test_shared_memory_is_removed_where_the_owner_no_longer_listens(tmp_path: Path) -> None:
    """The owner's end of the pipe closes some time before the supervisor notices that the owner has ended."""
    code = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(1)
from multiprocessing import resource_tracker, shared_memory
own = shared_memory.SharedMemory(create=True, size=100)
resource_tracker.unregister(own._name, "shared_memory")
print("own", own.name, file=open(sys.argv[1], "w"), flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "name")]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__, "0.5", "", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[0])
    process.stdout.close()
    wait_for(lambda: (tmp_path / "name").exists() and "own" in (tmp_path / "name").read_text())
    own = Path("/dev/shm", (tmp_path / "name").read_text().split()[-1])
    time.sleep(0.5)
    process.stdin.close()
    process.wait()
    wait_for(lambda: not alive(pid))
    assert not own.exists()


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervisors that wait 1 s, not 4 s, for shared memory that another process has open."""
    text = Path(supervisor.__file__).read_text()
    assert "SHARED_MEMORY_GRACE = 4.0" in text
    script = tmp_path / "supervisor.py"
    script.write_text(text.replace("SHARED_MEMORY_GRACE = 4.0", "SHARED_MEMORY_GRACE = 1.0"))
    monkeypatch.setattr(supervisor, "__file__", os.fspath(script))
    monkeypatch.setattr(supervisor, "SHARED_MEMORY_GRACE", 1.0)


@pytest.mark.parametrize("way", ["end", "the supervisor is killed", "the command is killed", "both are killed"])
def test_shared_memory_that_no_process_has_open_is_removed(tmp_path: Path, impatient: None, way: str) -> None:
    others = shared_memory.SharedMemory(create=True, size=100)
    name = uuid.uuid4().hex
    users, offload = Path("/dev/shm", f"model-{name}.safetensors"), Path("/dev/shm", f"vllm_offload_{name}.mmap")
    users.write_bytes(b"weights")
    try:
        command = [sys.executable, "-c", SHARING, others.name, str(users), str(offload)]
        process = Supervised(command, log=tmp_path / "log", grace=0.5)
        wait_for(lambda: "own psm_" in process.last_lines())
        own = Path("/dev/shm", process.last_lines().split()[-1])
        assert own.exists()
        assert offload.exists()
        if way != "end":
            time.sleep(1.0)  # well below the interval of notes
        if way in ("the supervisor is killed", "both are killed"):
            os.kill(process.supervisor_pid, signal.SIGKILL)
        if way in ("the command is killed", "both are killed"):
            os.kill(process.pid, signal.SIGKILL)
        process.end()
        assert not own.exists()
        assert not offload.exists()
        assert Path("/dev/shm", others.name).exists(), "this process still has it open"
        assert users.exists(), "a file of the user's, which the command had open"
    finally:
        others.close()
        others.unlink()
        users.unlink()


def test_a_semaphore_is_kept_while_its_maker_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was mapped under a temporary name, so nothing shows the name that a process which starts now will open."""
    monkeypatch.setattr(supervisor, "SHARED_MEMORY_GRACE", 0.2)
    lock = multiprocessing.get_context("spawn").Lock()
    path = Path("/dev/shm", lock._semlock.name.replace("/", "sem."))  # type: ignore[attr-defined]
    supervisor.remove({str(path)})
    assert path.exists()


@pytest.mark.parametrize("children_first", [False, True])
def test_owner_killed(tmp_path: Path, stubborn: Path, children_first: bool) -> None:
    """A Ray worker that ends kills its own children first."""
    command = [sys.executable, "-c", OWNER, str(tmp_path / "log"), str(stubborn), str(tmp_path / "pids")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE)
    wait_for(lambda: len(pids_in(tmp_path / "pids")) == 2)
    if children_first:
        children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
    owner.kill()
    owner.communicate()
    wait_for(lambda: not any(map(alive, pids_in(tmp_path / "pids"))))


def test_owner_killed_whose_fork_holds_the_pipe(tmp_path: Path, stubborn: Path) -> None:
    forks = OWNER.replace("time.sleep", "import os; child = os.fork(); print(child or '', flush=True); time.sleep")
    command = [sys.executable, "-c", forks, str(tmp_path / "log"), str(stubborn), str(tmp_path / "pids")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    _, *more = (owner.stdout.readline() for _ in range(3))
    (fork,) = (int(line) for line in more if line.strip())
    try:
        wait_for(lambda: len(pids_in(tmp_path / "pids")) == 2)
        owner.kill()
        owner.wait()
        wait_for(lambda: not any(map(alive, pids_in(tmp_path / "pids"))))
        assert alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
        owner.stdout.close()


def test_what_outlives_the_command_ends_with_it(tmp_path: Path, stubborn: Path) -> None:
    """Its parent is gone when it is looked for."""
    leaves = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, {str(stubborn)!r}, {str(tmp_path / "pids")!r}, "alone"], start_new_session=True)
while not open({str(tmp_path / "pids")!r}, "a").tell():
    time.sleep(0.01)
sys.exit(3)
"""
    process = Supervised([sys.executable, "-c", leaves], log=tmp_path / "log", grace=0.5)
    wait_for(lambda: process.poll() is not None)
    assert process.poll() == 3
    assert len(pids_in(tmp_path / "pids")) == 1
    assert not any(map(alive, pids_in(tmp_path / "pids")))


def test_exit_code_and_last_lines(tmp_path: Path) -> None:
    process = Supervised([sys.executable, "-c", "print('why'); exit(7)"], log=tmp_path / "log")
    wait_for(lambda: process.poll() is not None)
    assert process.poll() == 7
    assert process.last_lines().endswith("why")


def test_killed_supervisor(tmp_path: Path, stubborn: Path) -> None:
    """Its owner does its work."""
    process = Supervised([sys.executable, str(stubborn), str(tmp_path / "pids")], log=tmp_path / "log", grace=0.5)
    wait_for(lambda: len(pids_in(tmp_path / "pids")) == 2)
    os.kill(process.supervisor_pid, signal.SIGKILL)
    wait_for(lambda: process.poll() is not None)
    assert not any(map(alive, pids_in(tmp_path / "pids")))


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no-such-command: No such file"):
        Supervised(["no-such-command"], log=tmp_path / "log")
