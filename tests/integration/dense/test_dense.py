"""A dense model on two nodes: updates, pause and resume, the command line, and a trainer that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Literal

import pytest
import torch

from areal_vllm_ext import (
    AsyncEngineGroup,
    EngineGroup,
    InvalidWeights,
    PauseFailed,
    UpdateAborted,
)
from areal_vllm_ext.client.weights import named_weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster import Cluster

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(400)]

PROMPT = [10, 20, 30, 40]
# As many tokens as take any machine far longer than a pause.
LONG = 500


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_update_from_a_module(cluster: Cluster, group: EngineGroup, transport: str) -> None:
    before = cluster.oracle()
    for _ in range(2):  # the second goes over the connections of the first
        version = cluster.train()
        with group.update(version, timeout=60, transport=transport) as update:
            update.send(cluster.model)
        assert len(update.result.engines) == 2
        assert {state.version for state in group.status()} == {version}
        cluster.assert_serves_trainers_weights()
    assert cluster.oracle() != before


def one_at_a_time(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """As a trainer gathers that uses the same memory for every tensor of a shape."""
    memory: dict[torch.Size, torch.Tensor] = {}
    for name, tensor in named_weights(model):
        yield name, memory.setdefault(tensor.shape, torch.empty_like(tensor)).copy_(tensor)


def test_update_from_a_state_dict_and_from_an_iterable(cluster: Cluster, group: EngineGroup) -> None:
    version = cluster.train()
    with group.update(version, timeout=60) as update:
        update.send(cluster.model.state_dict())
    cluster.assert_serves_trainers_weights()
    version = cluster.train()
    with group.update(f"step-{version}", timeout=60) as update:
        update.send(one_at_a_time(cluster.model))
    cluster.assert_serves_trainers_weights()
    assert {state.version for state in group.status()} == {f"step-{version}"}


def test_update_from_disk(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    version = cluster.train()
    cluster.model.save_pretrained(tmp_path / "checkpoint")
    with group.update(version, timeout=60) as update:
        update.send(tmp_path / "checkpoint")
    cluster.assert_serves_trainers_weights()


def test_async_group_does_the_same(cluster: Cluster) -> None:
    async def run() -> None:
        async with AsyncEngineGroup.connect(cluster.deployment.directory, key_file=cluster.key_file) as group:
            await group.wait_ready(engines=2, timeout=60)
            async with group.update(cluster.train(), timeout=60) as update:
                await update.send(cluster.model)
            await group.pause("keep")
            assert {state.generation for state in await group.status()} == {"paused"}
            await group.resume()

    asyncio.run(run())
    cluster.assert_serves_trainers_weights()


@pytest.mark.parametrize("kv", ["recompute", "keep"])
def test_prefix_cache_of_old_weights_is_not_used(
    cluster: Cluster, group: EngineGroup, kv: Literal["recompute", "keep"]
) -> None:
    long_prompt = [3 + i % 200 for i in range(300)]  # several full blocks, so that it is cached
    for rank in (0, 1):
        cluster.complete(rank, long_prompt)
    with group.update(cluster.train(), timeout=60, kv=kv) as update:
        update.send(cluster.model)
    for rank in (0, 1):
        assert cluster.generated(rank, [long_prompt]) == cluster.oracle([long_prompt])


def test_request_in_flight_goes_on_with_the_new_weights(cluster: Cluster, group: EngineGroup) -> None:
    old = cluster.oracle([PROMPT], tokens=LONG)[0]
    version = cluster.train()
    requests = cluster.freeze(group, (0, 1), PROMPT, LONG, after=0.1)
    with group.update(version, timeout=60) as update:
        update.send(cluster.model)
    group.resume()
    for request in requests:
        tokens = request.result(timeout=60)["token_ids"]
        same = next((i for i, (a, b) in enumerate(zip(tokens, old, strict=True)) if a != b), len(old))
        assert 0 < same < LONG, "the update did not come while the request was in flight"
        # With its keys and values recomputed, the rest is what the new model says after what was generated so far. Where
        # exactly the switch was, cannot be seen from outside if both models agree on some tokens.
        assert any(
            cluster.oracle([PROMPT + tokens[:k]], tokens=24)[0] == tokens[k : k + 24]
            for k in range(same, max(same - 8, 0), -1)
        )


def test_bad_weights_touch_no_engine(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in cluster.model.state_dict().items() if name != "lm_head.weight"}
    name = "model.layers.0.mlp.up_proj.weight"
    nan = state[name].clone()
    nan[0, 0] = float("nan")
    cases: dict[str, dict[str, torch.Tensor]] = {
        "is not a weight": {**state, "model.layers.0.mlp.upproj.weight": state[name] + 1},
        "has shape": {**state, name: state[name][:, :-1]},
        "has dtype": {**state, name: state[name].to(torch.int32)},
        "missing": {key: tensor for key, tensor in state.items() if key != name},
        "NaN": {**state, name: nan},
    }
    for message, weights in cases.items():
        for source in (weights, iter(weights.items())):
            with pytest.raises(InvalidWeights, match=message), group.update("bad", timeout=30) as update:
                update.send(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpdateAborted, match=r"safetensors"), group.update("bad", timeout=30) as update:
        update.send(tmp_path / "empty")
    assert "bad" not in {state.version for state in group.status()}
    cluster.assert_serves_trainers_weights()


def test_keep_freezes_requests(cluster: Cluster, group: EngineGroup) -> None:
    requests = cluster.freeze(group, (0, 1), PROMPT, LONG)
    frozen = [state.requests for state in group.status()]
    late = cluster.start(1, PROMPT, 4)
    time.sleep(0.5)
    assert frozen == [1, 1]
    assert not any(request.done() for request in (*requests, late))
    group.resume()
    (expected,) = cluster.oracle([PROMPT], tokens=LONG)
    for request in requests:
        assert request.result(timeout=60)["token_ids"] == expected
    assert late.result(timeout=60)["token_ids"] == cluster.oracle([PROMPT], tokens=4)[0]


def test_wait_lets_requests_finish(cluster: Cluster, group: EngineGroup) -> None:
    requests = cluster.freeze(group, (0, 1), PROMPT, LONG)
    group.resume()
    group.pause("wait")
    for request in requests:
        assert len(request.result(timeout=5)["token_ids"]) == LONG
    group.resume()


def test_abort_ends_requests(cluster: Cluster, group: EngineGroup) -> None:
    requests = cluster.freeze(group, (0, 1), PROMPT, LONG)
    group.pause("abort")
    for request in requests:
        choice = request.result(timeout=5)
        assert choice["finish_reason"] == "abort"
        assert len(choice["token_ids"]) < LONG
    group.resume()
    cluster.assert_serves_trainers_weights()


def test_pause_over_its_deadline_is_taken_back(cluster: Cluster, group: EngineGroup) -> None:
    (request,) = cluster.freeze(group, (1,), PROMPT, LONG)
    group.resume()
    started = time.monotonic()
    with pytest.raises(PauseFailed, match="DP rank 1"):
        group.pause("wait", timeout=0.2)
    assert time.monotonic() - started < 1.2
    assert len(request.result(timeout=60)["token_ids"]) == LONG
    assert {state.generation for state in group.status()} == {"running"}


def test_repeated_and_concurrent_pauses_and_resumes(cluster: Cluster, group: EngineGroup) -> None:
    with cluster.connect() as other:
        for _ in range(3):
            run_both(lambda: group.pause("keep"), lambda: other.pause("abort"))
            assert {state.generation for state in group.status()} == {"paused"}
            group.pause("keep")
            run_both(group.resume, other.resume)
            assert {state.generation for state in other.status()} == {"running"}
            group.resume()
    cluster.assert_serves_trainers_weights()


def run_both(*calls: object) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:  # type: ignore[arg-type]
            future.result(timeout=60)


def test_update_inside_a_pause_leaves_the_engines_paused(cluster: Cluster, group: EngineGroup) -> None:
    group.pause("keep")
    with group.update(cluster.train(), timeout=60) as update:
        update.send(cluster.model)
    assert {state.generation for state in group.status()} == {"paused"}
    group.resume()
    cluster.assert_serves_trainers_weights()


def test_command_line(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        connection = ["--connect", cluster.deployment.directory]
        connection += ["--key-file", cluster.key_file] if cluster.key_file else []
        command = [sys.executable, "-m", "areal_vllm_ext.cli", *arguments, *connection]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    version = f"step-{cluster.train()}"
    cluster.model.save_pretrained(tmp_path / "checkpoint")
    code, said = call("update", "--from", str(tmp_path / "checkpoint"), "--to-version", version, "--json")
    assert (code, json.loads(said)["engines"], json.loads(said)["version"]) == (0, 2, version)
    cluster.assert_serves_trainers_weights()
    assert call("pause", "--mode", "keep")[0] == 0
    code, said = call("status", "--json")
    assert code == 0
    assert [(state["version"], state["generation"]) for state in json.loads(said)] == [(version, "paused")] * 2
    assert call("resume")[0] == 0
    assert {state.generation for state in group.status()} == {"running"}
    code, said = call("update", "--from", str(tmp_path), "--to-version", "never")
    assert code == 1
    assert "not a checkpoint" in said
    assert said.count("\n") == 1


def test_stuck_engine_still_answers_status(cluster: Cluster, group: EngineGroup) -> None:
    worker = group.engines()[1].workers[0].pid
    os.kill(worker, signal.SIGSTOP)
    try:
        request = cluster.start(1, PROMPT, 20)
        cluster.wait_in_flight(group, 1)
        with pytest.raises(PauseFailed, match="DP rank 1"):
            group.pause("keep", timeout=1.0)
        started = time.monotonic()
        states = group.status()
        assert time.monotonic() - started < 1.0
        assert states[1].waiting_for_engine > 0.5
    finally:
        os.kill(worker, signal.SIGCONT)
    assert len(request.result(timeout=60)["token_ids"]) == 20
    group.resume()
    cluster.assert_serves_trainers_weights()


TRAINER = """
import dataclasses, sys, time
import torch
from transformers import AutoModelForCausalLM
from areal_vllm_ext import EngineGroup
from areal_vllm_ext.client.weights import named_weights
directory, key_file, model_dir = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
group = EngineGroup.connect(directory, key_file=key_file or None)
def slowly():
    for i, (name, tensor) in enumerate(named_weights(model)):
        if i == 5:
            print("sending", flush=True)
            time.sleep(3600)
        yield name, torch.zeros_like(tensor)
opened = group.update("of the dead", timeout=100)
transaction = opened._transaction
transaction.options = dataclasses.replace(transaction.options, bucket_bytes=1)  # each tensor is sent at once
with opened as update:
    update.send(slowly())
"""


@pytest.mark.parametrize("reconnect", ["new", "old"])
def test_trainer_killed_while_it_sends(cluster: Cluster, group: EngineGroup, reconnect: str) -> None:
    arguments = [cluster.deployment.directory, cluster.key_file or "", str(cluster.deployment.model_dir)]
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "sending\n"
        assert {state.update_phase for state in group.status()} == {"receiving"}
    finally:
        trainer.kill()
        trainer.wait()
    cluster.assert_serves_trainers_weights()
    successor = cluster.connect() if reconnect == "new" else group
    started = time.monotonic()
    with successor.update(cluster.train(), timeout=40) as update:
        update.send(cluster.model)
    assert time.monotonic() - started < 15, "the dead trainer's lease runs out after 10 s"
    cluster.assert_serves_trainers_weights()
    if successor is not group:
        successor.close()
