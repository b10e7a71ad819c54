"""Bad frames, twenty thousand or (nightly) a hundred thousand: whoever sends them, the engines live, use no more memory, and
answer others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_client import RawClient
from waiting import eventually

from areal_vllm_ext import EngineGroup, protocol
from areal_vllm_ext.protocol import security
from harness import bad_frames, simulated_engine

FRAMES = 100_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 20_000
WARM_UP = FRAMES // 5
# The allocator's noise; what is kept of each frame would be more.
MORE_MEMORY = 16 << 20
LONGEST_WAIT = 3.0


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def attack(address: str, key_file: Path, frames: int, seed: int) -> None:
    """Bad frames, from a process of its own; returns when they were read."""
    arguments = [address, "--key-file", str(key_file), "--frames", str(frames), "--seed", str(seed)]
    subprocess.run([sys.executable, bad_frames.__file__, *arguments], check=True, timeout=120)


class Honest:
    """A client that asks all the time, and sees how long answers take."""

    def __init__(self, key: security.ClusterKey, asks: dict[str, protocol.Message]) -> None:
        self.longest = 0.0
        self.answers = 0
        self.error: BaseException | None = None
        self._clients = [(RawClient(address, key), message) for address, message in asks.items()]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(0.02):
                for client, message in self._clients:
                    asked = time.monotonic()
                    assert not isinstance(client.ask(message, timeout=20), protocol.Error)
                    self.longest = max(self.longest, time.monotonic() - asked)
                    self.answers += 1
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        for client, _ in self._clients:
            client.close()


@pytest.fixture
def engines(key_file: Path) -> Iterator[tuple[subprocess.Popen[bytes], EngineGroup]]:
    process = subprocess.Popen(
        [sys.executable, simulated_engine.__file__, "--key-file", str(key_file), "--engines", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        directory = process.stdout.readline().decode().strip()
        with EngineGroup.connect(directory, key_file=key_file) as group:
            group.wait_ready(2, timeout=60)
            yield process, group
    finally:
        process.kill()
        process.communicate()


@pytest.mark.timeout(300)
def test_bad_frames_cost_nobody_anything(
    engines: tuple[subprocess.Popen[bytes], EngineGroup], key_file: Path, key: security.ClusterKey, tmp_path: Path
) -> None:
    process, group = engines
    directory = group._group._commander.directory
    endpoint = group.engines()[0].address

    def update(version: int) -> None:
        with group.update(version, timeout=30) as under_way:
            under_way.send(tmp_path)
        assert [state.version for state in group.status()] == [version] * 2

    update(1)  # so that the engines have an epoch, and obey no frame of epoch 0
    for address in (endpoint, directory):
        # These frames hold messages above the limit, for which the allocator keeps 15 MiB from then on.
        attack(address, key_file, WARM_UP, seed=1)
    eventually(lambda: open_files(process.pid) < 200, timeout=15)
    memory_before, files_before = memory(process.pid), open_files(process.pid)
    honest = Honest(key, {endpoint: protocol.GetStatus(), directory: protocol.Discover()})
    try:
        for seed, address in enumerate((endpoint, directory) * 2, start=1):
            attack(address, key_file, (FRAMES - WARM_UP) // 4, seed)
            update(1 + seed)
    finally:
        honest.stop()
    assert honest.error is None
    assert process.poll() is None, "the engines' process ended"
    assert honest.answers > 100
    assert honest.longest < LONGEST_WAIT
    grown = memory(process.pid) - memory_before
    assert grown < MORE_MEMORY, f"{grown >> 20} MiB more after {FRAMES - WARM_UP} frames"
    eventually(lambda: open_files(process.pid) <= files_before, timeout=15)
    assert [state.generation for state in group.status()] == ["running"] * 2
