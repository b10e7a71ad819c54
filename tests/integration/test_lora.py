"""LoRA adapters on a real head and headless engine. The oracle is peft's own model: its greedy tokens, on every engine."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from adapters import LONG, TOKENS, adapted, assert_serves, tokens_of
from cluster import PROMPTS, start_cluster

from areal_vllm_ext import InvalidWeights, UpdateAborted
from areal_vllm_ext.process.serving import interface_of
from harness.areal_server import serving
from harness.cpu_vllm import ONE_PROCESS
from harness.torch_trainer import torch_trainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

LORA = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "2", "--max-model-len", "512")
SPANS = ("--enable-scale-out",)  # a route whose answers say which version they are of


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}  # for the routes of other users
    with start_cluster(
        tmp_path_factory.mktemp("lora"), moe=False, vllm_args=(*LORA, *SPANS, *ONE_PROCESS), env=env
    ) as running:
        yield running


def models(cluster: Cluster) -> set[str]:
    with urllib.request.urlopen(f"{cluster.deployment.url}/v1/models", timeout=60) as answer:
        return {one["id"] for one in json.load(answer)["data"]}


def post(cluster: Cluster, route: str, rank: int = 0, **body: object) -> bytes:
    headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
    request = urllib.request.Request(cluster.deployment.url + route, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()  # type: ignore[no-any-return]


def batch_of(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """The tokens of prompts of one length."""
    generated = model.generate(input_ids=torch.tensor(prompts), max_new_tokens=tokens, do_sample=False)
    return generated[:, len(prompts[0]) :].tolist()  # type: ignore[no-any-return]


class Answer(NamedTuple):
    """What a request was answered, and the version that the answer claims."""

    prompt: list[int]
    version: str
    tokens: list[int]
    finished: str


def ask(cluster: Cluster, rank: int, prompt: list[int], tokens: int) -> Answer:
    sampling = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.0}
    body = {"model": "math", "token_ids": prompt, "sampling_params": sampling}
    (choice,) = json.loads(post(cluster, "/inference/v1/generate", rank, **body))["choices"]
    (span,) = choice["weight_versions"]
    assert (span["start"], span["end"]) == (0, len(choice["token_ids"])), "one version made all of it"
    return Answer(prompt, span["version"], choice["token_ids"], choice["finish_reason"])


def test_32_requests_in_flight_have_the_tokens_of_the_version_that_they_claim(
    cluster: Cluster, group: EngineGroup
) -> None:
    """Half of them run on the old version when an adapter is replaced; then half run when it is replaced and they are ended."""
    old, new = adapted(cluster, 20), adapted(cluster, 21)
    prompts = [[3 + 5 * number, 40, 7, 90 - number] for number in range(8)]

    def asked(pool: ThreadPoolExecutor, tokens: int) -> list[Future[Answer]]:
        """A request of each prompt to each engine; all are in flight."""
        before = {state.dp_rank: state.requests for state in group.status()}
        futures = [pool.submit(ask, cluster, rank, prompt, tokens) for prompt in prompts for rank in (0, 1)]
        ends = time.monotonic() + 30
        while any(state.requests != before[state.dp_rank] + len(prompts) for state in group.status()):
            assert time.monotonic() < ends, "the requests are not in flight, or over already"
        return futures

    group.update_weights(version=20, adapters={"math": old})
    cluster.wait_idle(group)
    with ThreadPoolExecutor(32) as pool:
        on_old = asked(pool, 120)
        group.pause("keep")
        assert not any(future.done() for future in on_old)
        group.update_weights(version=21, adapters={"math": new})
        on_new = asked(pool, 120)
        group.resume()
        answers = {"20": [one.result(120) for one in on_old], "21": [one.result(120) for one in on_new]}
        for version, model in (("20", old), ("21", new)):
            expected = dict(zip(map(tuple, prompts), batch_of(model, prompts, 120), strict=True))
            for answer in answers[version]:
                assert (answer.version, answer.finished) == (version, "length")
                assert answer.tokens == expected[tuple(answer.prompt)]

        ended = asked(pool, 500)
        group.update_weights(version=22, adapters={"math": old}, mode="abort")
        answers["21"] = [future.result(60) for future in ended]
        longest = max(len(answer.tokens) for answer in answers["21"])
        expected = dict(zip(map(tuple, prompts), batch_of(new, prompts, longest), strict=True))
        for answer in answers["21"]:
            assert (answer.version, answer.finished) == ("21", "abort")
            assert 0 < len(answer.tokens) < 500
            assert answer.tokens == expected[tuple(answer.prompt)][: len(answer.tokens)]
    assert_serves(cluster, "math", old)


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
    for name, seed in (("theirs", 9), ("one", 12), ("two", 13)):
        adapted(cluster, seed).save_pretrained(tmp_path / name)
    post(cluster, "/v1/load_lora_adapter", lora_name="theirs", lora_path=str(tmp_path / "theirs"))
    assert_serves(cluster, "theirs", theirs)
    # While requests wait for it, its directory goes, and two others take its place in vLLM's memory.
    cluster.wait_idle(group)
    group.pause("keep")
    waiting = [cluster.start(rank, PROMPTS[0], TOKENS, "theirs") for rank in (0, 1)]
    cluster.wait_in_flight(group, 0, 1)
    shutil.rmtree(tmp_path / "theirs")
    for name in ("one", "two"):
        post(cluster, "/v1/load_lora_adapter", lora_name=name, lora_path=str(tmp_path / name))
    group.resume()
    for future in waiting:
        assert future.result(60)["token_ids"] == tokens_of(theirs, PROMPTS[0])
    cluster.train()
    group.update_weights(cluster.model, version=12)  # vLLM would drop it, and end with the next request
    assert_serves(cluster, "theirs", adapted(cluster, 9))
    # Others take its place again; then a request for it is an error, and no more.
    for name, seed in (("one", 12), ("two", 13)):
        post(cluster, "/v1/load_lora_adapter", lora_name=name, lora_path=str(tmp_path / name), load_inplace=True)
        assert_serves(cluster, name, adapted(cluster, seed))
    for rank in (0, 1):
        with pytest.raises(urllib.error.HTTPError):
            cluster.complete(rank, PROMPTS[0], model="theirs")
    cluster.assert_serves_trainers_weights()
    assert len(group.status()) == 2


def test_other_users_change_no_adapter_of_the_group(cluster: Cluster, group: EngineGroup, tmp_path: Path) -> None:
    ours = adapted(cluster, 14)
    adapted(cluster, 15).save_pretrained(tmp_path / "theirs")
    group.update_weights(version=14, adapters={"math": ours})
    loads = {"lora_name": "math", "lora_path": str(tmp_path / "theirs"), "load_inplace": True}
    for route, body in (("/v1/load_lora_adapter", loads), ("/v1/unload_lora_adapter", {"lora_name": "math"})):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(cluster, route, **body)
        assert refused.value.code == 400
        assert "adapter math belongs to the group" in json.load(refused.value)["error"]["message"]
    assert_serves(cluster, "math", ours)
    group.update_weights(version=15, adapters={"math": None})
    post(cluster, "/v1/load_lora_adapter", **loads)
    assert_serves(cluster, "math", adapted(cluster, 15))
    post(cluster, "/v1/unload_lora_adapter", lora_name="math")


def test_adapters_of_areals_trainer_come_by_its_process_group(
    cluster: Cluster, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AReaL's calls, in their order; its trainer's tensors reach both nodes by a torch process group."""
    address = cluster.deployment.nodes[0].address
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface_of(address))
    own = min((state.replica, state.dp_rank) for state in group.status())
    with (
        serving(cluster.deployment.directory, cluster.key_file, own) as server,
        torch_trainer(3, "update_weight_group", address) as trainer,
    ):
        server.ok(*server.init(trainer))
        trainer.joined.result(60)

        def announce(number: int, tensors: dict[str, torch.Tensor], rank: int) -> dict[str, Any]:
            body = {
                "names": list(tensors),
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
                "shapes": [list(tensor.shape) for tensor in tensors.values()],
                "group_name": trainer.name,
                "lora_name": f"areal-v{number}",
                "lora_int_id": 1,
                "lora_target_modules": "all-linear",
                "lora_rank": rank,
                "lora_alpha": 16,
                "lora_bias": "none",
                "base_model_name": None,
            }
            server.ok("/areal_set_update_weight_meta_lora", body)
            return body

        def send(number: int, model: Any, rank: int = 4) -> None:
            named = [(name, one.detach()) for name, one in model.named_parameters() if "lora_" in name]
            server.ok("/areal_pause_generation")
            for bucket in (dict(named[::2]), dict(named[1::2])):
                sent = trainer.broadcast(list(bucket.values()))
                server.ok("/areal_update_weights_lora_xccl", announce(number, bucket, rank))
                sent.result(30)

        for number in (101, 102, 103):
            send(number, adapted(cluster, number))
            assert f"areal-v{number}" not in group.status()[0].adapters
            server.ok("/areal_continue_generation")
            assert_serves(cluster, f"areal-v{number}", adapted(cluster, number))
            assert {state.version for state in group.status()} == {number}
        assert {name for name in models(cluster) if name.startswith("areal-v")} == {"areal-v102", "areal-v103"}
        cluster.assert_serves_trainers_weights()

        send(104, adapted(cluster, 104, r=16), rank=16)
        for _ in range(3):  # as often as AReaL tries
            assert "greater than max_lora_rank 8" in server.refused("/areal_continue_generation")
        for number in (102, 103):
            assert_serves(cluster, f"areal-v{number}", adapted(cluster, number))
        assert {state.version for state in group.status()} == {103}
    group.update_weights(version=104, adapters={"areal-v102": None, "areal-v103": None})
