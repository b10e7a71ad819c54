"""Engines that really receive, stage and commit, for the tests of trainers: no model runs, so a check compares tensors."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from real_receivers import Served, awaiting_workers, connected

from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.protocol import security, timing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from areal_vllm_ext import EngineGroup


__all__ = ["Served", "assert_serve", "connected", "serving_model", "train", "worker_path"]


@contextlib.contextmanager
def serving_model(folder: Path) -> Iterator[tuple[Served, torch.nn.Module, Path]]:
    """Two engines of two workers, the trainer's model (in ``folder / "model"``), and the file of the key."""
    # Engines learn from a real model which names are tied; these have none.
    model = make_model(folder / "model", tie_word_embeddings=False)
    key_file = folder / "cluster.key"
    security.write_key(key_file)
    with (
        pytest.MonkeyPatch.context() as patch,
        awaiting_workers(security.read_key(key_file), folder / "model") as deployment,
    ):
        patch.setattr(timing, "HEARTBEAT_SECONDS", 0.2)
        yield Served(deployment, folder / "model", key_file), model, key_file


def train(model: torch.nn.Module, seed: int) -> None:
    """Change every parameter, as the trainers' processes do it with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def assert_serve(served: Served, model: torch.nn.Module, group: EngineGroup, version: int) -> None:
    """Every worker of every engine has exactly the model's weights, and the engines run."""
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for held in served.weights.values():
        assert all(torch.equal(held[name], tensor) for name, tensor in expected.items())
    assert len(served.weights) == 4
    assert {(state.version, state.generation) for state in group.status()} == {(version, "running")}


def worker_path() -> str:
    """PYTHONPATH of Ray's workers, which import what the tests import."""
    here = Path(__file__)
    folders = (here.parents[2], here.parent, here.parents[1] / "unit")
    return os.pathsep.join([*map(os.fspath, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
