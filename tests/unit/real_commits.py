"""Engines that load and commit as real ones do, over stand-ins for vLLM's workers whose models are a few parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from lazily import imported
from real_receivers import (
    SHAPES,
    WORKERS,
    Deployment,
    Served,
    awaiting_workers,
    connected,
    send,
    set_bucket_bytes,
    vllm_config,
    weights,
)
from waiting import eventually

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.protocol import security
from areal_vllm_ext.worker.extension import WorkerExtension
from areal_vllm_ext.worker.load import proof

FROZEN = ("embed", "layer.0")
EVERY_NUMBER = range(100)


def numbers_of(adapters: Iterable[str]) -> dict[str, int]:
    """By which requests would ask for adapters."""
    return {name: number for number, name in enumerate(sorted(adapters))}


class Model(torch.nn.Module):
    """A parameter for each tensor of the checkpoint, the two layers fused into one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Parameter(torch.zeros(66, 7), requires_grad=False)
        for name in ("embed", "norm", "scale"):
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(SHAPES[name]), requires_grad=False))

    def part(self, name: str) -> torch.Tensor:
        """Return where a tensor of the checkpoint lies."""
        if name.startswith("layer."):
            return self.layers.data.narrow(0, 33 * int(name[-1]), 33)
        return self.get_parameter(name).data


class Worker:
    """What a receiver, a loader and a commit ask of vLLM's worker."""

    def __init__(self, rank: int, folder: Path, key_file: Path) -> None:
        parallel = SimpleNamespace(
            enable_eplb=False,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            enable_expert_parallel=False,
            data_parallel_size=1,
        )
        self.rank, self.device, self.model = rank, torch.device("cpu"), Model()
        self.vllm_config = vllm_config(folder, key_file, parallel_config=parallel)
        self.model_runner = SimpleNamespace()
        self.slept = 0
        self._areal_receiver: Any = None

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights_iterator:
            self.model.part(name).copy_(tensor)

    def sleep(self, level: int = 1) -> None:
        self.slept = level

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.slept = 0


class Engines(Served):
    """Engines that commit as real ones do."""

    worker = Worker

    def __init__(self, deployment: Deployment, folder: Path, key_file: Path) -> None:
        self.workers: dict[int, list[Worker]] = {}
        super().__init__(deployment, folder, key_file)
        for number, receivers in self.receivers.items():
            for one, receiver in zip(self.workers[number], receivers, strict=True):
                one._areal_receiver = receiver

    def workers_of(self, number: int, checkpoint: Path, key_file: Path) -> list[Any]:
        self.workers[number] = [self.worker(rank, checkpoint, key_file) for rank in range(WORKERS)]
        return self.workers[number]

    @classmethod
    @contextlib.contextmanager
    def started(cls, key: security.ClusterKey, checkpoint: Path, key_file: Path) -> Iterator[Self]:
        # The first commit needs them, and importing vLLM would take most of that update's timeout on a busy machine.
        imported("vllm.model_executor.model_loader.reload")
        imported("vllm.model_executor.layers.utils")
        with pytest.MonkeyPatch.context() as patch, awaiting_workers(key, checkpoint) as deployment:
            patch.setattr(proof, "prove", lambda *_: "")  # there is no vLLM to build a second model
            yield cls(deployment, checkpoint, key_file)

    def commit(self, number: int, engine: Any) -> Any:
        def commit(update: str) -> None:
            assert not engine.running
            units = engine.endpoint.participant.update.units
            numbers = numbers_of(one.name for one in units.adapters)
            with ThreadPoolExecutor(WORKERS) as pool:
                for future in [
                    pool.submit(WorkerExtension.areal_commit, one, update, units.weights, numbers, EVERY_NUMBER)
                    for one in self.workers[number]
                ]:
                    future.result()

        return commit

    @property
    def all_workers(self) -> list[Worker]:
        return [one for workers in self.workers.values() for one in workers]

    def serve(self, expected: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(one.model.part(name), tensor) for one in self.all_workers for name, tensor in expected.items()
        )

    def wait_known(self) -> None:
        """Wait until each worker knows its live weights, which it reads beside generation after each commit."""
        eventually(lambda: all(one._areal_receiver.context.live_weights.base()[0] for one in self.all_workers))


# Fixtures, for the modules that import them


@pytest.fixture(scope="module")
def engines(key: security.ClusterKey, key_file: Path, checkpoint: Path) -> Iterator[Engines]:
    with Engines.started(key, checkpoint, key_file) as started:
        yield started


@pytest.fixture
def group(engines: Engines, key_file: Path) -> Iterator[EngineGroup]:
    """The group, at version 1 from this client, and ready for parts."""
    with connected(engines.deployment, key_file) as client:
        send(client, weights(1))
        engines.wait_known()
        yield client


def trained(before: int, after: int) -> dict[str, torch.Tensor]:
    """Weights of which ``FROZEN`` are still those of ``before``."""
    return weights(after) | {name: weights(before)[name] for name in FROZEN}


def update(group: EngineGroup, source: Any, version: int, bucket_bytes: int = 1 << 20, **options: Any) -> Any:
    opened = group.update(version, timeout=20.0, **options)
    set_bucket_bytes(opened, bucket_bytes)
    with opened as running:
        running.send(source)
    return running.result
