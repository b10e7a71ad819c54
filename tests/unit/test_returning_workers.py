"""An engine that restarts fetches its weights: real endpoints, receivers and connections, over stand-ins for vLLM's workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from real_commits import EVERY_NUMBER, Engines, numbers_of
from real_receivers import checkpoint, connected, receiver, send, weights  # noqa: F401
from waiting import eventually

from areal_vllm_ext.worker.adapters.store import AdapterStore
from areal_vllm_ext.worker.extension import WorkerExtension

if TYPE_CHECKING:
    from pathlib import Path

    from areal_vllm_ext.engine_core.effects import CallCommitFetched
    from areal_vllm_ext.protocol import security
    from harness.simulated_engine import SimulatedEngine

pytestmark = pytest.mark.timeout(120)


class Returning(Engines):
    """Engines of which one can be restarted."""

    def restart(self, number: int, folder: Path, key_file: Path) -> SimulatedEngine:
        self.deployment.stop_engine(number)
        engine = self.deployment.start_engine(number)
        workers = self.workers_of(number, folder, key_file)
        for one in workers:
            one._areal_receiver = receiver(one, engine)
        engine.staged = self.commit(number, engine)

        def commit_fetched(call: CallCommitFetched) -> None:
            numbers = numbers_of(call.adapters)
            for one in workers:
                WorkerExtension.areal_commit_fetched(one, call.fetch, call.update, numbers, EVERY_NUMBER)

        engine.fetched = commit_fetched
        return engine

    def holds(self, number: int, expected: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(one.model.part(name), tensor)
            for one in self.workers[number]
            for name, tensor in expected.items()
        )


@pytest.fixture
def engines(key: security.ClusterKey, key_file: Path, checkpoint: Path) -> Iterator[Returning]:  # noqa: F811
    with Returning.started(key, checkpoint, key_file) as started:
        yield started


def test_all_workers_of_a_restarted_engine_hold_what_the_peers_hold(
    engines: Returning,
    checkpoint: Path,  # noqa: F811
    key_file: Path,
) -> None:
    with connected(engines.deployment, key_file) as group:
        send(group, weights(1))
        engines.wait_known()
        for _ in range(2):
            again = engines.restart(1, checkpoint, key_file)
            assert not engines.holds(1, weights(1))
            eventually(lambda again=again: again.running and again.version == 1, timeout=30)
            assert engines.holds(1, weights(1))
        state = group.status()[1]
        assert (state.version, state.update_phase, state.weights) == (1, "idle", group.status()[0].weights)
        assert group.verify(timeout=20).equal
        send(group, weights(2), version=2)
        assert engines.serve(weights(2))


def adapter(seed: int) -> Any:
    """Peft's tensors and a configuration."""
    generator = torch.Generator().manual_seed(seed)
    return {"layer.lora_A.weight": torch.randn(2, 7, generator=generator)}, {"r": 2, "seed": seed}


def adapters_of(engines: Returning, number: int, name: str) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Configuration and tensors of an adapter, as each worker of an engine would serve it."""
    stores = [one._areal_receiver.context.adapters for one in engines.workers[number]]
    return [found.model for store in stores for found in store._stored.values() if found.unit.name == name]


@pytest.fixture
def without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that serve what arrived, without vLLM's LoRA."""
    monkeypatch.setattr(AdapterStore, "load", lambda _, config, given, __: (config, dict(given)))


@pytest.mark.usefixtures("without_vllm")
def test_a_restarted_engine_gets_the_adapters_too(
    engines: Returning,
    checkpoint: Path,  # noqa: F811
    key_file: Path,
) -> None:
    with connected(engines.deployment, key_file) as group:
        group.update_weights(weights(1), version=1, adapters={"math": adapter(1), "code": adapter(2)}, timeout=20)
        group.update_weights(version=2, adapters={"code": adapter(3)}, timeout=20)
        engines.wait_known()
        again = engines.restart(1, checkpoint, key_file)
        eventually(lambda: again.running and again.version == 2, timeout=30)
        assert engines.holds(1, weights(1))
        for name, seed in (("math", 1), ("code", 3)):
            expected, config = adapter(seed)
            served = adapters_of(engines, 1, name)
            assert len(served) == len(engines.workers[1])
            for text, tensors in served:
                assert json.loads(text) == config
                assert list(tensors) == list(expected)
                assert all(torch.equal(tensors[key], one) for key, one in expected.items())
        states = group.status()
        assert [dict(state.adapters) for state in states] == [{"math": 1, "code": 2}] * 2
        # It is a member like any other, and a peer too.
        group.update_weights(version=3, adapters={"math": None}, timeout=20)
        engines.restart(0, checkpoint, key_file)
        eventually(lambda: [dict(state.adapters) for state in group.status()] == [{"code": 2}] * 2, timeout=30)
        assert adapters_of(engines, 0, "math") == []


@pytest.mark.usefixtures("without_vllm")
def test_an_adapter_that_has_changed_in_the_peers_memory_is_not_taken_over(
    engines: Returning,
    checkpoint: Path,  # noqa: F811
    key_file: Path,
) -> None:
    with connected(engines.deployment, key_file) as group:
        group.update_weights(weights(1), version=1, adapters={"math": adapter(1)}, timeout=20)
        engines.wait_known()
        store = engines.workers[0][1]._areal_receiver.context.adapters
        next(iter(store._stored.values())).tensors["layer.lora_A.weight"][1, 3] += 1.0
        again = engines.restart(1, checkpoint, key_file)
        cause = "worker 1: adapter math: layer.lora_A.weight arrived with other bytes than the peer got"
        eventually(lambda: any(cause in state.error for state in group.status()), timeout=30)
        assert not again.running
        assert adapters_of(engines, 1, "math") == []


def test_damaged_weights_of_the_peer_are_not_taken_over(
    engines: Returning,
    checkpoint: Path,  # noqa: F811
    key_file: Path,
) -> None:
    with connected(engines.deployment, key_file) as group:
        send(group, weights(1))
        engines.wait_known()
        engines.workers[0][1].model.part("norm")[3] += 1.0
        engines.restart(1, checkpoint, key_file)
        cause = "worker 1: norm arrived with other bytes than the peer serves since its last commit"
        eventually(lambda: any(cause in state.error for state in group.status()), timeout=30)
        assert not engines.holds(1, weights(1))
        assert group.status()[1].generation == "paused"
