"""What the unit tests share: settings of hypothesis, a cluster key, a raw client, and clean surroundings."""

from __future__ import annotations

import gc
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from raw_client import RawClient

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.protocol import security, timing
from harness.simulated_engine import HOST, Deployment, deployed

# What is imported while tests are collected lives until the end, so the garbage collector need not look through it.
gc.disable()

# Busy machines stall for seconds, and what hypothesis has found once belongs into a test of its own.
hypothesis.settings.register_profile(
    "default", max_examples=500, deadline=None, database=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("nightly", max_examples=20_000, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def imported_for_good() -> Iterator[None]:
    """Keep the garbage collector from looking through what a file has imported, too."""
    before = len(sys.modules)
    yield
    if len(sys.modules) > before + 100:
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    if "triton" in sys.modules:
        gc.unfreeze()  # else its compiled module reports leaks when the interpreter exits


@pytest.fixture(autouse=True)
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No settings of whoever runs the tests, and a throw-away place for the key of this user."""
    for name in list(os.environ):
        if name.startswith("AREAL_VLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", os.fspath(tmp_path_factory.mktemp("state")))


@pytest.fixture(autouse=True)
def no_engine_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An endpoint that fails ends its process: here, its test."""
    ended: list[int] = []

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)  # ends the endpoint's thread only

    monkeypatch.setattr(os, "_exit", end)
    yield
    assert not ended, "an endpoint failed and would have ended its engine (see the log above)"


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cluster") / "cluster.key"
    security.write_key(path)
    return path


@pytest.fixture(scope="session")
def key(key_file: Path) -> security.ClusterKey:
    return security.read_key(key_file)


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines report to the directory ten times as often, and the directory looks at its clock as often."""
    monkeypatch.setattr(timing, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr("areal_vllm_ext.control.directory_server._POLL_MILLISECONDS", 20)


@pytest.fixture
def deployment(key: security.ClusterKey) -> Iterator[Deployment]:
    """Two engines of one worker each."""
    with deployed(key) as two:
        two.wait_attached()
        yield two


@pytest.fixture
def group(deployment: Deployment, key_file: Path) -> Iterator[EngineGroup]:
    """A client of two engines that are ready."""
    with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
        client.wait_ready(2, timeout=10)
        yield client


@pytest.fixture
def segment_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for this process's shared memory: trainers of other tests remove what killed trainers left in theirs."""
    with tempfile.TemporaryDirectory(prefix="segments-", dir="/dev/shm") as folder:
        monkeypatch.setattr("areal_vllm_ext.transport.shared_memory._FOLDER", Path(folder))
        yield Path(folder)


@pytest.fixture
def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture
def raw(key: security.ClusterKey) -> Iterator[Callable[..., RawClient]]:
    """Makes raw clients: ``raw(address)``, with another key ``raw(address, key)``."""
    made: list[RawClient] = []

    def connect(address: str, other_key: security.ClusterKey | None = None, identity: bytes | None = None) -> RawClient:
        made.append(RawClient(address, other_key or key, identity))
        return made[-1]

    yield connect
    for client in made:
        client.close()
