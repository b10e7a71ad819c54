"""Trainers that send only what they train: the rest is what every engine has, by digest. Receivers and commits are real."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_commits import FROZEN, Engines, trained, update
from real_receivers import connected, save, weights

from areal_vllm_ext import EngineGroup, InvalidWeights, UpdateAborted
from areal_vllm_ext.protocol import security
from areal_vllm_ext.worker import startup


@pytest.fixture
def fresh(
    key: security.ClusterKey, key_file: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engines]:
    """Engines that serve their checkpoint, ``weights(0)``."""
    checkpoint = save(tmp_path_factory, weights(0))
    monkeypatch.setattr(startup, "_IMPORTED_NS", time.time_ns())  # else the files are newer than the worker
    with Engines.started(key, checkpoint, key_file) as started:
        yield started


@pytest.fixture
def client(fresh: Engines, key_file: Path) -> Iterator[EngineGroup]:
    with connected(fresh.deployment, key_file) as group:
        yield group


def part(version: int) -> dict[str, torch.Tensor]:
    """What a trainer of all but ``FROZEN`` sends."""
    return {name: tensor for name, tensor in weights(version).items() if name not in FROZEN}


def live_of(engines: Engines) -> list[Any]:
    return [one._areal_receiver.context.live_weights for one in engines.all_workers]


def without_bases(engines: Engines) -> None:
    """As where weights are packed, or no load plan fits."""
    for live in live_of(engines):
        live.base = lambda: ("", {})


@pytest.mark.parametrize("make", [dict, lambda whole: iter(whole.items())], ids=["mapping", "iterator"])
def test_the_first_update_can_be_partial(fresh: Engines, client: EngineGroup, make: Any) -> None:
    result = update(client, make(part(1)), 1, partial=True)
    assert result.kept == len(FROZEN)
    assert fresh.serve(trained(0, 1))
    fresh.wait_known()
    for version in (2, 3):
        assert update(client, make(part(version)), version, partial=True).kept == len(FROZEN)
        assert fresh.serve(trained(0, version))
        fresh.wait_known()
    assert client.verify().equal


def test_a_client_that_has_sent_nothing_asks_what_the_engines_have(
    fresh: Engines, client: EngineGroup, key_file: Path
) -> None:
    update(client, weights(1), 1)
    fresh.wait_known()
    with connected(fresh.deployment, key_file) as other:
        for version in (2, 3):
            assert update(other, part(version), version, partial=True).kept == len(FROZEN)
            assert fresh.serve(trained(1, version))
            fresh.wait_known()
    # What the first client sent is not what the engines have by now.
    assert update(client, {"norm": weights(4)["norm"]}, 4, partial=True).kept == 4
    assert fresh.serve(trained(1, 3) | {"norm": weights(4)["norm"]})


def test_what_never_changed_is_taken_from_the_files_without_a_plan(fresh: Engines, client: EngineGroup) -> None:
    without_bases(fresh)
    update(client, trained(0, 1), 1)
    assert update(client, part(2), 2, partial=True).kept == len(FROZEN)
    assert fresh.serve(trained(0, 2))


def test_what_an_update_has_changed_is_not_taken_from_the_files(fresh: Engines, client: EngineGroup) -> None:
    without_bases(fresh)
    update(client, weights(1), 1)
    with pytest.raises(UpdateAborted, match="cannot keep embed: an update has changed it since the engine was started"):
        update(client, part(2), 2, partial=True)
    assert fresh.serve(weights(1))


def test_files_that_changed_are_not_used(fresh: Engines, client: EngineGroup) -> None:
    for live in live_of(fresh)[-1:]:
        live._startup._problem = "model.safetensors has changed since the engine loaded it"
    with pytest.raises(UpdateAborted, match=r"cannot keep the 2 tensors that were not sent: .* has changed since"):
        update(client, part(1), 1, partial=True)
    assert fresh.deployment.engines[0].commits == []


@pytest.mark.parametrize("worker", [0, -1])
def test_an_engine_whose_rest_differs_says_no(fresh: Engines, client: EngineGroup, worker: int) -> None:
    update(client, weights(1), 1)
    fresh.wait_known()
    live = live_of(fresh)[worker]
    meta, value = live._contents["embed"]
    live._contents["embed"] = (meta, value ^ 1)
    without_bases(fresh)
    with pytest.raises(UpdateAborted):
        update(client, part(2), 2, partial=True)
    assert fresh.serve(weights(1))


def test_live_memory_that_was_changed_is_found(fresh: Engines, client: EngineGroup) -> None:
    update(client, weights(1), 1)
    fresh.wait_known()
    fresh.all_workers[1].model.part("embed")[0, 0] += 1
    with pytest.raises(UpdateAborted, match="tensors that were not sent have changed on this worker"):
        update(client, part(2), 2, partial=True)


def test_what_is_no_part_is_refused_with_the_call_that_works(
    fresh: Engines, client: EngineGroup, tmp_path: Path
) -> None:
    for source, options, message in (
        (part(1), {}, r"2 of 5 tensors are missing: embed, layer\.0; where engines are to keep .*: partial=True"),
        ({}, {"partial": True}, "there was no tensor to send"),
        ({"other": torch.ones(1)}, {"partial": True}, "other is not a weight"),
        (tmp_path, {"partial": True}, "partial=True needs tensors, not a path"),
    ):
        with pytest.raises(InvalidWeights, match=message):
            update(client, source, 1, **options)
    assert all(engine.calls == [] for engine in fresh.deployment.engines.values())
    with pytest.raises(TypeError, match="partial must be True or False"):
        client.update(1, partial="yes")  # type: ignore[arg-type]
