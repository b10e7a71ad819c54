"""What is left on disk is found, and what is in use is not."""

from __future__ import annotations

import mmap
import multiprocessing
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_vllm_ext.process.leftovers import SCRATCH_PREFIX, left_on_disk
from areal_vllm_ext.process.supervised import Supervised


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder: with a short name, as the path of a socket has 107 characters at most."""
    with tempfile.TemporaryDirectory() as made:
        monkeypatch.setattr(tempfile, "tempdir", made)
        yield Path(made)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in left_on_disk() if path.parent == folder}


def test_a_socket_is_left_when_nobody_listens(folder: Path) -> None:
    name = str(uuid.uuid4())
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / name))
        server.listen()
        assert left_in(folder) == set()
    assert left_in(folder) == {name}


def test_files_of_others_are_not_named(folder: Path) -> None:
    (folder / str(uuid.uuid4())).touch()
    (folder / "areal-vllm-logs").mkdir()
    assert left_in(folder) == set()


def test_a_scratch_folder_is_left_when_its_supervisor_has_ended(folder: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
    server = Supervised([sys.executable, "-c", "import time; time.sleep(60)"], log=folder / "log", scratch=scratch)
    assert left_in(folder) == set()
    server.end()
    assert not scratch.exists()
    scratch.mkdir()
    assert left_in(folder) == {scratch.name}


def test_a_segment_is_left_when_no_process_has_it_open() -> None:
    path = Path("/dev/shm", f"psm_{uuid.uuid4().hex[:8]}")
    users = path.with_name(f"weights-{path.name}")
    users.touch()
    try:
        with path.open("w+b") as file:
            file.truncate(4096)
            held = mmap.mmap(file.fileno(), 0)
        assert path not in left_on_disk()
        held.close()
        assert path in left_on_disk()
        assert users not in left_on_disk()
    finally:
        path.unlink()
        users.unlink()


def test_a_semaphore_is_not_left_while_its_maker_has_it() -> None:
    """It was mapped under a temporary name, and got its own name later."""
    lock = multiprocessing.get_context("spawn").Lock()
    path = Path("/dev/shm", lock._semlock.name.replace("/", "sem."))  # type: ignore[attr-defined]
    assert path.exists()
    assert path not in left_on_disk()
