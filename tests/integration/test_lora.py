"""LoRA adapters on a real head and headless engine. The oracle is peft's own model: its greedy tokens, on every engine."""

from __future__ import annotations

import copy
import json
import random
import shutil
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cluster import PROMPTS, start_cluster

from areal_vllm_ext import InvalidWeights, UpdateAborted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

TOKENS = 8
LONG = random.Random(1).choices(range(3, 100), k=305)  # many blocks of the prefix cache
LORA = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "2", "--max-model-len", "512")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}  # for the routes of other users
    with start_cluster(tmp_path_factory.mktemp("lora"), moe=False, vllm_args=LORA, env=env) as running:
        yield running


def adapted(cluster: Cluster, seed: int, **options: Any) -> Any:
    """The trainer's model with an adapter that changes its tokens."""
    import peft

    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]} | options
    model = peft.get_peft_model(copy.deepcopy(cluster.model), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def tokens_of(model: Any, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    generated = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return generated[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def assert_serves(cluster: Cluster, name: str, model: Any) -> None:
    for prompt in (PROMPTS[0], LONG):
        expected = tokens_of(model, prompt)
        for rank in (0, 1):
            served = cluster.complete(rank, prompt, TOKENS, name)["token_ids"]
            assert served == expected, (name, rank, len(prompt))


def models(cluster: Cluster) -> set[str]:
    with urllib.request.urlopen(f"{cluster.deployment.url}/v1/models", timeout=60) as answer:
        return {one["id"] for one in json.load(answer)["data"]}


def post(cluster: Cluster, route: str, **body: object) -> None:
    request = urllib.request.Request(
        cluster.deployment.url + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()


def test_adapters_are_added_replaced_and_removed_with_and_without_weights(
    cluster: Cluster, group: EngineGroup, tmp_path: Path
) -> None:
    first = adapted(cluster, 1)
    before = {name: one.clone() for name, one in first.state_dict().items()}
    result = group.update_weights(version=1, adapters={"math": first})
    assert result.adapters == {"math": 1}
    assert_serves(cluster, "math", first)
    cluster.assert_serves_trainers_weights()
    assert all(torch.equal(before[name], one) for name, one in first.state_dict().items())

    # Another version of it, and a second adapter from a directory that is gone at once.
    second, code = adapted(cluster, 2, r=8), adapted(cluster, 3, use_rslora=True)
    code.save_pretrained(tmp_path / "code")
    result = group.update_weights(version=2, adapters={"math": second, "code": tmp_path / "code"})
    shutil.rmtree(tmp_path / "code")
    assert result.adapters == {"math": 2, "code": 2}
    assert_serves(cluster, "math", second)
    assert_serves(cluster, "code", code)

    # Base weights, whose adapters stay as they are; then weights and an adapter together.
    cluster.train()
    group.update_weights(cluster.model, version=3)
    for name, seed, options in (("math", 2, {"r": 8}), ("code", 3, {"use_rslora": True})):
        assert_serves(cluster, name, adapted(cluster, seed, **options))
    cluster.train()
    third = adapted(cluster, 4)
    result = group.update_weights(cluster.model, version=4, adapters={"math": third})
    assert result.adapters == {"math": 4, "code": 2}
    assert_serves(cluster, "math", third)
    assert_serves(cluster, "code", adapted(cluster, 3, use_rslora=True))
    cluster.assert_serves_trainers_weights()
    assert {"math", "code"} <= models(cluster)
    assert [dict(state.adapters) for state in group.status()] == [{"math": 4, "code": 2}] * 2

    result = group.update_weights(version=5, adapters={"code": None})
    assert result.adapters == {"math": 4}
    assert "code" not in models(cluster)
    for rank in (0, 1):
        with pytest.raises(urllib.error.HTTPError):
            cluster.complete(rank, PROMPTS[0], model="code")
    assert_serves(cluster, "math", third)


def test_requests_in_flight_finish_on_the_version_that_they_began_with(cluster: Cluster, group: EngineGroup) -> None:
    old, new = adapted(cluster, 5), adapted(cluster, 6)
    group.update_weights(version=6, adapters={"math": old})
    frozen = cluster.freeze(group, (0, 1), LONG, 100, after=0.1, model="math")
    group.update_weights(version=7, adapters={"math": new})
    group.update_weights(
        version=8, adapters={"math": old}
    )  # of the requests' version again, and with them in one batch
    group.update_weights(version=9, adapters={"math": new})
    group.resume()
    assert_serves(cluster, "math", new)
    for future in frozen:
        assert future.result(60)["token_ids"] == tokens_of(old, LONG, 100)


def test_what_cannot_be_served_is_a_no_and_the_old_adapter_stays(cluster: Cluster, group: EngineGroup) -> None:
    served = adapted(cluster, 7)
    group.update_weights(version=10, adapters={"math": served})
    for options, cause in (({"r": 16}, "greater than max_lora_rank 8"), ({"use_dora": True}, "DoRA")):
        with pytest.raises(UpdateAborted, match=f"adapter math: .*{cause}"):
            group.update_weights(cluster.model, version=11, adapters={"math": adapted(cluster, 8, **options)})
    with pytest.raises(InvalidWeights, match="adapter math"):
        group.update_weights(version=11, adapters={"math": "/nowhere"})
    assert {state.version for state in group.status()} == {10}
    assert_serves(cluster, "math", served)


def test_other_users_adapters_end_no_engine(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    theirs = adapted(cluster, 9)
    theirs.save_pretrained(tmp_path / "theirs")
    post(cluster, "/v1/load_lora_adapter", lora_name="theirs", lora_path=str(tmp_path / "theirs"))
    assert_serves(cluster, "theirs", theirs)
    shutil.rmtree(tmp_path / "theirs")
    cluster.train()
    group.update_weights(cluster.model, version=12)  # vLLM would drop it, and end with the next request
    assert_serves(cluster, "theirs", adapted(cluster, 9))
    # Two others take its place in vLLM's memory; then a request for it is an error, and no more.
    group.update_weights(version=13, adapters={"math": adapted(cluster, 10), "code": adapted(cluster, 11)})
    for name, seed in (("math", 10), ("code", 11)):
        assert_serves(cluster, name, adapted(cluster, seed))
    for rank in (0, 1):
        with pytest.raises(urllib.error.HTTPError):
            cluster.complete(rank, PROMPTS[0], model="theirs")
    cluster.assert_serves_trainers_weights()
    assert len(group.status()) == 2
    assert_serves(cluster, "math", adapted(cluster, 10))
