"""An engine that restarts fetches its weights: real endpoints, receivers and connections, over stand-ins for vLLM's workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from real_commits import Engines
from real_receivers import checkpoint, connected, receiver, send, weights  # noqa: F401
from waiting import eventually

from areal_vllm_ext.worker.extension import WorkerExtension

if TYPE_CHECKING:
    from pathlib import Path

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

        def commit_fetched(fetch: str, update: str) -> None:
            for one in workers:
                WorkerExtension.areal_commit_fetched(one, fetch, update)

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
