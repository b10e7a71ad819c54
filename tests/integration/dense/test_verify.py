"""Comparing what real engines serve, while they generate; and damage done to one of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(400)]

NORM = "model.layers.1.input_layernorm.weight"


def damage(folder: Path, rank: int, tensor: str) -> None:
    """Flip a bit of ``tensor`` in the engine of DP rank ``rank``; returns when it is done."""
    (folder / "order").write_text(tensor)
    (folder / "order").rename(folder / str(rank))
    ends = time.monotonic() + 10
    while (folder / str(rank)).exists():
        assert time.monotonic() < ends, "no worker damaged itself"
        time.sleep(0.02)


def update(cluster: Cluster, group: EngineGroup, folder: Path) -> None:
    """Train, update, and save what was sent."""
    version = cluster.train()
    with group.update(version, timeout=60) as one:
        one.send(cluster.model)
    cluster.model.save_pretrained(folder)


def test_what_was_sent_is_what_is_served_update_after_update(
    cluster: Cluster, group: EngineGroup, tmp_path: Path
) -> None:
    for _ in range(3):
        update(cluster, group, tmp_path)
        found = group.verify(tmp_path, timeout=60)
        assert found.equal, found.differences
        assert not found.unproven
    states = group.status()
    assert {state.unproven for state in states} == {""}
    assert len({state.weights for state in states}) == 1
    assert states[0].weights
    cluster.assert_serves_trainers_weights()


def test_engines_generate_meanwhile(cluster: Cluster, group: EngineGroup) -> None:
    requests = [cluster.start(rank, [10, 20, 30], 300) for rank in (0, 1)]
    checks = 0
    while not all(request.done() for request in requests):
        assert group.verify(timeout=60).equal
        checks += 1
    assert checks > 1
    for request in requests:
        assert request.result()["token_ids"] == cluster.oracle([[10, 20, 30]], tokens=300)[0]


def test_verify_beside_updates_waits_for_them(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with cluster.connect() as other, ThreadPoolExecutor(1) as pool:
        checks = pool.submit(lambda: [other.verify(timeout=60).equal for _ in range(6)])
        while not checks.done():
            update(cluster, group, tmp_path)
        assert all(checks.result())


def test_damage_is_found_and_named_and_the_next_update_heals_it(
    cluster: Cluster, group: EngineGroup, damage_folder: Path, tmp_path: Path
) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        connection = ["--connect", cluster.deployment.directory]
        connection += ["--key-file", cluster.key_file] if cluster.key_file else []
        command = [sys.executable, "-m", "areal_vllm_ext.cli", "verify", *arguments, *connection]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    update(cluster, group, tmp_path)
    assert call("--against", str(tmp_path))[0] == 0
    damage(damage_folder, 1, NORM)
    name = group.engines()[1].name
    code, said = call()
    assert (code, said) == (3, f"{name}, worker 0: {NORM} has changed since it was loaded: its memory was damaged\n")
    code, said = call("--against", str(tmp_path), "--json")
    facts = json.loads(said)
    assert (code, facts["equal"], len(facts["differences"])) == (3, False, 1)
    assert (facts["differences"][0]["engine"], facts["differences"][0]["tensor"]) == (name, NORM)
    update(cluster, group, tmp_path)
    assert call("--against", str(tmp_path))[0] == 0
    code, said = call("--against", "/nowhere")
    assert (code, said.count("\n"), "is not a directory" in said) == (1, 1, True)
    cluster.assert_serves_trainers_weights()
