"""AReaL's calls, in its shapes and its order, on a real vLLM of a head and a headless node, from a real torch process group."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from areal_vllm_ext.process.serving import interface_of
from harness.torch_trainer import TorchTrainer, torch_trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(300)]

GROUP = "update_weight_group"
PROMPT = [10, 20, 30, 40]


def post(cluster: Cluster, path: str, body: Any = None, rank: int | None = None) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | ({} if rank is None else {"X-data-parallel-rank": str(rank)})
    data = json.dumps({} if body is None else body).encode()
    request = urllib.request.Request(f"{cluster.deployment.url}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ok(cluster: Cluster, path: str, body: Any = None) -> str:
    status, answer = post(cluster, path, body)
    assert (status, answer.get("success")) == (200, True), answer
    return str(answer["message"])


def refused(cluster: Cluster, path: str, body: Any = None) -> str:
    status, answer = post(cluster, path, body)
    assert (status, answer.get("success")) == (400, False), answer
    return str(answer["message"])


@pytest.fixture
def trainer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchTrainer]:
    """AReaL's trainer with ``vllm:d2``, in the group with every worker."""
    address = cluster.deployment.nodes[0].address
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface_of(address))
    with torch_trainer(3, GROUP, address) as made:
        body = {
            "master_address": made.host,
            "master_port": str(made.port),
            "rank_offset": 1,
            "world_size": 3,
            "backend": "gloo",
            "group_name": GROUP,
        }
        ok(cluster, "/areal_init_weights_update_group", body)
        made.joined.result(60)
        yield made


def buckets(model: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    third = -(-len(named) // 3)
    return [dict(named[start : start + third]) for start in range(0, len(named), third)]


def meta(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": GROUP,
    }


def send_bucket(cluster: Cluster, trainer: TorchTrainer, tensors: dict[str, torch.Tensor]) -> None:
    sent = trainer.broadcast(list(tensors.values()))
    ok(cluster, "/areal_set_update_weight_meta", meta(tensors))
    ok(cluster, "/areal_update_weights_xccl")
    sent.result(30)


def generation_request(tokens: int) -> dict[str, Any]:
    """AReaL's own, for a text model."""
    return {
        "prompt": PROMPT,
        "top_p": 1.0,
        "top_k": 100000000,
        "max_tokens": tokens,
        "temperature": 0.0,
        "stop_token_ids": [],
        "ignore_eos": True,
        "skip_special_tokens": True,
        "return_tokens_as_token_ids": True,
        "logprobs": 0,
        "use_beam_search": False,
        "stream": False,
    }


def tokens_of(answer: Any) -> list[int]:
    """As AReaL's client reads them."""
    return [int(token.split(":")[1]) for token in answer["choices"][0]["logprobs"]["tokens"]]


def test_buckets_are_staged_and_continue_commits_them_on_both_nodes(
    cluster: Cluster, group: EngineGroup, trainer: TorchTrainer
) -> None:
    cluster.train()
    with ThreadPoolExecutor(64) as pool:
        old = cluster.generated(0)
        before = {state.version for state in group.status()}
        ok(cluster, "/areal_pause_generation")
        held = [
            pool.submit(post, cluster, "/v1/completions", generation_request(16), rank)
            for rank in (0, 1)
            for _ in range(32)
        ]
        for bucket in buckets(cluster.model):
            send_bucket(cluster, trainer, bucket)
        time.sleep(0.5)
        answered = [one.result() for one in held if one.done()]
        versions = {state.version for state in group.status()}
        ok(cluster, "/areal_continue_generation")
        assert not answered, "generation is held until continue"
        assert versions == before
        expected = cluster.oracle([PROMPT])[0]
        for one in held:
            status, answer = one.result(60)
            assert status == 200, answer
            assert tokens_of(answer) == expected
            assert answer["choices"][0]["finish_reason"] == "length"
    cluster.assert_serves_trainers_weights()
    assert cluster.generated(0) != old
    verified = group.verify(timeout=60)
    assert not verified.differences


def test_a_bad_second_bucket_leaves_the_old_weights_everywhere(
    cluster: Cluster, group: EngineGroup, trainer: TorchTrainer
) -> None:
    old = cluster.generated(0)
    wrong = buckets(cluster.model)
    ok(cluster, "/areal_pause_generation")
    send_bucket(cluster, trainer, {name: tensor + 1 for name, tensor in wrong[0].items()})
    name = next(iter(wrong[1]))
    bad = {name: torch.zeros(3, 5)}
    trainer.broadcast(list(bad.values()))
    ok(cluster, "/areal_set_update_weight_meta", meta(bad))
    problem = refused(cluster, "/areal_update_weights_xccl")
    assert f"{name} has shape [3, 5]" in problem
    for _ in range(3):  # as often as AReaL tries
        assert refused(cluster, "/areal_continue_generation") == problem
    assert {state.generation for state in group.status()} == {"running"}
    assert cluster.generated(0) == cluster.generated(1) == old


def test_a_checkpoint_brings_its_version(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    number = 1000 + cluster.train()
    folder = tmp_path / f"weight_update_v{number}"
    cluster.model.save_pretrained(folder)
    ok(cluster, "/areal_pause_generation")
    ok(cluster, "/areal_update_weights", {"model_path": str(folder)})
    for file in folder.iterdir():
        file.unlink()
    ok(cluster, "/areal_continue_generation")
    assert {state.version for state in group.status()} == {number}
    cluster.assert_serves_trainers_weights()


def test_score_and_health_are_vllms_own(cluster: Cluster) -> None:
    with urllib.request.urlopen(f"{cluster.deployment.url}/health", timeout=10) as answer:
        assert answer.status == 200
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0.0, "logprobs": 1, "prompt_logprobs": 1, "echo": True}
    status, scored = post(cluster, "/v1/completions", body)
    assert status == 200, scored
    assert len(scored["choices"][0]["prompt_logprobs"]) >= len(PROMPT)
