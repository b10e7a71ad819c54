"""Each way of vLLM's trainer API moves both engines to the trainer's weights, token by token; and what its errors leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from areal_vllm_ext import PauseFailed, WeightsTainted, plugin
from areal_vllm_ext.integrations.vllm.client import WeightSyncClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(400)]


@pytest.fixture
def client(group: EngineGroup) -> Iterator[WeightSyncClient]:
    made = WeightSyncClient(group, timeout=60)
    made.init_weight_transfer_engine({})
    yield made
    made.abandon_weight_update()


def saved(cluster: Cluster, folder: Path) -> str:
    cluster.model.save_pretrained(folder)
    return str(folder)


def test_engines_without_the_slot_are_ours_and_theirs(cluster: Cluster, group: EngineGroup) -> None:
    assert [engine.headless for engine in group.engines()] == [False, True]
    assert set(group.call("theirs", "rank").values) == {"rank 0"}
    group.update_weights(cluster.model, version=cluster.train(), timeout=60)
    cluster.assert_serves_trainers_weights()


def test_the_trainer_engine_areal_moves_every_engine(cluster: Cluster, group: EngineGroup) -> None:
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from areal_vllm_ext.integrations.vllm.trainer import ArealTrainerInitInfo

    plugin.register_backends()
    info = ArealTrainerInitInfo(rank=0, directory=cluster.deployment.directory, key_file=cluster.key_file, timeout=60)
    source = ModuleSource(cluster.model)
    engine: Any = WeightTransferTrainerFactory.trainer_init(info, client=None, source=source)
    served = max(state.version for state in group.status() if isinstance(state.version, int))
    for number in (1, 2):
        cluster.train()
        engine.send_weights()
        assert {state.version for state in group.status()} == {served + number}
        cluster.assert_serves_trainers_weights()
    engine.shutdown()


def test_a_session_moves_every_engine_and_holds_generation(
    cluster: Cluster, group: EngineGroup, client: WeightSyncClient, tmp_path: Path
) -> None:
    cluster.train()
    folder = saved(cluster, tmp_path)
    client.start_weight_update()
    requests = [cluster.start(rank, [10, 20, 30], 16) for rank in (0, 1)]
    cluster.wait_in_flight(group, 0, 1)
    client.update_weights({"checkpoint": folder})
    assert not any(request.done() for request in requests)
    client.finish_weight_update("seven")
    expected = cluster.oracle([[10, 20, 30]])[0]
    assert [request.result(30)["token_ids"] for request in requests] == [expected, expected]
    cluster.assert_serves_trainers_weights()
    assert {(state.version, state.update_phase) for state in group.status()} == {("seven", "idle")}


def test_weights_that_do_not_load_taint_and_any_update_heals(
    cluster: Cluster, group: EngineGroup, client: WeightSyncClient, tmp_path: Path
) -> None:
    cluster.train()
    good = saved(cluster, tmp_path / "good")
    bad = saved(cluster, tmp_path / "bad")
    weights = load_file(f"{bad}/model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = torch.zeros(3, 3)
    save_file(weights, f"{bad}/model.safetensors", {"format": "pt"})
    for heal in ("update", "session"):
        client.start_weight_update()
        with pytest.raises(WeightsTainted, match="failed at update"):
            client.update_weights({"checkpoint": bad})
        assert {(state.update_phase, state.generation) for state in group.status()} == {("tainted", "paused")}
        with pytest.raises(PauseFailed, match="tainted"):
            group.resume(timeout=10)
        if heal == "update":
            group.update_weights(cluster.model, version=cluster.train(), timeout=60)
        else:
            cluster.train()
            good = saved(cluster, tmp_path / "good")
            client.start_weight_update()
            client.update_weights({"checkpoint": good})
            client.finish_weight_update()
        cluster.assert_serves_trainers_weights()


def test_vllms_own_routes_work_and_are_called_foreign(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    cluster.train()
    folder = saved(cluster, tmp_path)
    routes = HTTPVLLMWeightSyncClient(cluster.deployment.url, timeout=60)
    routes.init_weight_transfer_engine({})
    routes.start_weight_update()
    routes.update_weights({"checkpoint": folder})
    routes.finish_weight_update("theirs")
    assert "foreign" in {state.update_phase for state in group.status()}
    assert cluster.generated(0) == cluster.oracle()
    group.update_weights(cluster.model, version=cluster.train(), timeout=60)
    cluster.assert_serves_trainers_weights()
