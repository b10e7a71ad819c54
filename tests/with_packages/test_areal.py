"""AReaL's own trainer (FSDP, on a CPU) and client, unchanged, on servers whose engines really receive, stage and commit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("areal", reason="AReaL is in .venv-integrations: make test-integrations")
sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from real_receivers import WORKERS, Served, awaiting_workers, connected

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.deployment import free_ports
from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.protocol import security, timing
from areal_vllm_ext.worker.adapters.store import AdapterStore
from harness.areal_server import Server, serving

pytestmark = pytest.mark.timeout(400)


class Trainer:
    """``areal_trainer.py`` in a process of its own."""

    def __init__(self, model: Path, server: Server, folder: Path, *kinds: str) -> None:
        reader, writer = os.pipe()
        command = [sys.executable, str(Path(__file__).with_name("areal_trainer.py")), str(model)]
        command += [f"127.0.0.1:{server.port}", f"vllm:d{2 * WORKERS}", str(folder / "out"), str(writer), *kinds]
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_ports(1)[0]),
            "AREAL_TEST_HOST": "127.0.0.1",
        }
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        self.log = folder / "trainer.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                pass_fds=[writer],
                text=True,
            )
        os.close(writer)
        self._answers = os.fdopen(reader)
        self._answer()

    def do(self, *command: Any) -> Any:
        """A command, and what it returns; its error is raised here."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        assert line, f"the trainer ended:\n{self.log.read_text()[-3000:]}"
        answer = json.loads(line)
        if answer["error"]:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    """The trainer's model, in ``tmp_path / "model"``."""
    return make_model(tmp_path / "model")


@pytest.fixture
def engines(model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(timing, "HEARTBEAT_SECONDS", 0.2)
    key_file = tmp_path / "cluster.key"
    security.write_key(key_file)
    with awaiting_workers(security.read_key(key_file), tmp_path / "model") as deployment:
        yield Served(deployment, tmp_path / "model", key_file)


def train(model: torch.nn.Module, step: int) -> None:
    """As ``areal_trainer.py`` does."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def assert_serve(served: Served, model: torch.nn.Module, group: EngineGroup, version: int) -> None:
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for held in served.weights.values():
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    assert {(state.version, state.generation) for state in group.status()} == {(version, "running")}


def first_engine(served: Served) -> tuple[str, int]:
    """The engine that a server of this deployment belongs to."""
    infos = [engine.endpoint.info for engine in served.deployment.engines.values()]
    return min((info.replica, info.dp_rank) for info in infos)


def test_every_worker_gets_what_areal_trained(engines: Served, model: torch.nn.Module, tmp_path: Path) -> None:
    key_file, first = tmp_path / "cluster.key", first_engine(engines)
    with (
        serving(engines.deployment.directory, key_file, first) as server,
        connected(engines.deployment, key_file) as group,
    ):
        trainer = Trainer(tmp_path / "model", server, tmp_path)
        try:
            for version in (1, 2):
                trainer.do("train", version)
                train(model, version)
                trainer.do("update", "xccl", version)
                assert_serve(engines, model, group, version)
            trainer.do("train", 3)
            train(model, 3)
            trainer.do("update", "disk", 7)  # the client removes the files as soon as it is answered
            assert_serve(engines, model, group, 7)
            with pytest.raises(RuntimeError, match="areal_update_weights_xccl"):
                trainer.do("bad bucket")
            with pytest.raises(RuntimeError, match="Failed after 3 retries"):
                trainer.do("call", "continue_generation")
            assert_serve(engines, model, group, 7)
            trainer.do("call", "pause_generation")
            assert {state.generation for state in group.status()} == {"paused"}
            trainer.do("call", "continue_generation")
            assert_serve(engines, model, group, 7)
        finally:
            trainer.close()


def test_every_worker_gets_the_adapter_that_areal_trained(
    engines: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterStore, "load", lambda _, __, given, ___: dict(given))  # without vLLM's LoRA
    key_file, first = tmp_path / "cluster.key", first_engine(engines)
    with (
        serving(engines.deployment.directory, key_file, first) as server,
        connected(engines.deployment, key_file) as group,
    ):
        trainer = Trainer(tmp_path / "model", server, tmp_path, "lora")
        try:
            for version in (1, 2, 3):
                trainer.do("train", version)
                trainer.do("update", "xccl", version)
                trainer.do("save adapter", str(tmp_path / "adapter.safetensors"))
                trained = load_file(tmp_path / "adapter.safetensors")
                expected = {name.replace(".default", ""): tensor for name, tensor in trained.items()}
                assert len(engines.adapters) == 2 * WORKERS
                for held in engines.adapters.values():
                    assert sorted(held[f"lora-v{version}"]) == sorted(expected)
                    assert all(torch.equal(held[f"lora-v{version}"][name], one) for name, one in expected.items())
                assert {(state.version, state.generation) for state in group.status()} == {(version, "running")}
            assert {name for state in group.status() for name in state.adapters} == {"lora-v2", "lora-v3"}
        finally:
            trainer.close()
