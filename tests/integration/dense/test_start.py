"""A dense model on two nodes that has just started: discovery, and weights of which none came by an update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.network import missing

if TYPE_CHECKING:
    from pathlib import Path

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(400)]

NORM = "model.layers.1.input_layernorm.weight"


def test_two_nodes_are_two_namespaces(cluster: Cluster) -> None:
    if missing():
        pytest.skip(f"{missing()}; the other tests run on loopback")
    assert cluster.two_nodes


def test_finds_every_engine_by_itself(cluster: Cluster, group: EngineGroup) -> None:
    engines = group.engines()
    assert [engine.dp_rank for engine in engines] == [0, 1]
    assert [engine.headless for engine in engines] == [False, True]
    assert all(len(engine.workers) == 1 for engine in engines)
    if cluster.two_nodes:
        assert [engine.node.rpartition("/")[2] for engine in engines] == ["10.77.0.1", "10.77.0.2"]


def test_engines_agree_with_the_oracle_before_any_update(cluster: Cluster) -> None:
    cluster.assert_serves_trainers_weights()


def test_engines_that_start_serve_their_checkpoint(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    found = group.verify(cluster.deployment.model_dir, timeout=60)
    assert found.equal, found.differences
    assert (found.engines, found.tensors > 30) == (2, True)
    weights = load_file(cluster.deployment.model_dir / "model.safetensors")
    weights[NORM].view(torch.uint8)[7] ^= 1
    save_file(weights, tmp_path / "model.safetensors")
    found = group.verify(tmp_path, timeout=60)
    assert [(one.worker, one.tensor, one.reason) for one in found.differences] == [
        (0, NORM, "differs from the one in the checkpoint")
    ] * 2
