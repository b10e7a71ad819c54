"""Engines whose workers are stand-ins, but whose receivers are real: what is sent is received, staged and committed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from waiting import eventually

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.protocol import security, timing
from areal_vllm_ext.worker.load.dry_load import DryModel
from areal_vllm_ext.worker.receiver import Receiver
from harness.simulated_engine import Deployment, Shape, SimulatedEngine, deployed

WORKERS = 2
SHAPES = {"embed": (100, 16), "layer.0": (33, 7), "layer.1": (33, 7), "norm": (16,), "scale": ()}


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


class Served:
    """Engines whose weights are real: what their receivers had staged at the last commit."""

    def __init__(self, deployment: Deployment, checkpoint: Path, key_file: Path) -> None:
        self.deployment = deployment
        self.receivers: dict[int, list[Receiver]] = {}
        self.weights: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self.adapters: dict[tuple[int, int], dict[str, Any]] = {}
        # How many sent to each worker.
        self.senders: dict[tuple[int, int], int] = {}
        for number, engine in deployment.engines.items():
            self.receivers[number] = [receiver(one, engine) for one in self.workers_of(number, checkpoint, key_file)]
            engine.staged = self.commit(number, engine)
        deployment.wait_attached()

    def workers_of(self, number: int, checkpoint: Path, key_file: Path) -> list[Any]:
        """The stand-ins of engine ``number``."""
        return [worker(rank, checkpoint, key_file) for rank in range(WORKERS)]

    def commit(self, number: int, engine: SimulatedEngine) -> Any:
        def staged(update: str) -> None:
            for rank, receiver in enumerate(self.receivers[number]):
                assert not engine.running
                self.weights[number, rank] = dict(receiver.staged(update).tensors)
                voted = receiver.staged(update).adapters.voted
                self.adapters[number, rank] = {name: one.model for name, one in voted.items()}
                self.senders[number, rank] = len(receiver.reception.streams) if receiver.reception else 0
                receiver.discard(update)

        return staged

    def serves(self, expected: dict[str, torch.Tensor]) -> bool:
        """Whether every worker of every engine has exactly these weights."""
        return len(self.weights) == WORKERS * len(self.deployment.engines) and all(
            set(held) == set(expected) and all(torch.equal(held[name], expected[name]) for name in expected)
            for held in self.weights.values()
        )

    def staging_is_free(self) -> bool:
        return all(receiver.reception is None for receivers in self.receivers.values() for receiver in receivers)


def receiver(worker: Any, engine: SimulatedEngine) -> Receiver:
    """Start the receiver of a stand-in. vLLM builds no model of it; to try takes seconds, because vLLM is imported."""
    with mock.patch.object(DryModel, "of", return_value=None):
        return Receiver(worker, engine.endpoint.address, engine.endpoint.attach_token)


def worker(rank: int, checkpoint: Path, key_file: Path) -> Any:
    """What a receiver asks of vLLM's worker."""
    model = torch.nn.Module()
    return SimpleNamespace(
        rank=rank, device="cpu", vllm_config=vllm_config(checkpoint, key_file), get_model=lambda: model
    )


def vllm_config(checkpoint: Path, key_file: Path, **more: Any) -> Any:
    """What it asks of vLLM's configuration."""
    return SimpleNamespace(
        additional_config={"areal": {"key_file": os.fspath(key_file)}},
        model_config=SimpleNamespace(model=os.fspath(checkpoint), revision=None, dtype=torch.float32),
        **more,
    )


def save(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(tensors, folder / "model.safetensors")
    return folder


@contextlib.contextmanager
def awaiting_workers(key: security.ClusterKey, checkpoint: Path) -> Iterator[Deployment]:
    """Two engines whose workers the caller attaches."""
    shape = Shape(workers=WORKERS, model=os.fspath(checkpoint))
    with deployed(key, 2, shape=shape, simulate_workers=False) as deployment:
        yield deployment


@contextlib.contextmanager
def connected(deployment: Deployment, key_file: Path) -> Iterator[EngineGroup]:
    """A client that both engines have answered."""
    with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
        client.wait_ready(2, timeout=10)
        yield client


# Fixtures, for the modules that import them


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory, weights(0))


@pytest.fixture(scope="module")
def shared_engines(key: security.ClusterKey, key_file: Path, checkpoint: Path) -> Iterator[Served]:
    """Two engines of two workers: receivers live as long as their process, so few are made."""
    with pytest.MonkeyPatch.context() as patch, awaiting_workers(key, checkpoint) as deployment:
        patch.setattr(timing, "HEARTBEAT_SECONDS", 0.2)
        yield Served(deployment, checkpoint, key_file)


@pytest.fixture
def served(shared_engines: Served) -> Served:
    shared_engines.weights.clear()
    for engine in shared_engines.deployment.engines.values():
        engine.calls.clear()
    return shared_engines


@pytest.fixture
def group(served: Served, key_file: Path) -> Iterator[EngineGroup]:
    with connected(served.deployment, key_file) as client:
        yield client


def send(group: EngineGroup, source: Any, version: int = 1, dtype: str | None = None, **options: Any) -> None:
    with group.update(version, **({"timeout": 20.0} | options)) as update:
        update.send(source, dtype=dtype)


def set_bucket_bytes(opened: Any, nbytes: int) -> None:
    """Make the buckets of an update smaller than a MiB."""
    transaction = opened._transaction
    transaction.options = dataclasses.replace(transaction.options, bucket_bytes=nbytes)


def assert_untouched(served: Served) -> None:
    assert served.weights == {}
    assert all(engine.calls == [] for engine in served.deployment.engines.values()), "generation was touched"
    eventually(served.staging_is_free)


TRANSPORTS = ["broadcast", "shared_memory", "disk"]
