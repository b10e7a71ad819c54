"""AReaL's calls, in its shapes and its order, on a real vLLM of a head and a headless node, from a real torch process group."""

from __future__ import annotations

import copy
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from areal_vllm_ext.process.serving import interface_of
from harness.areal_server import serving
from harness.torch_trainer import TorchTrainer, torch_trainer
from harness.vllm_release import older_than

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(300)]

GROUP = "update_weight_group"
PROMPT = [10, 20, 30, 40]
ROLLOUT = 200  # tokens


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


def in_flight_request(prompt: list[int], *, spans: bool) -> tuple[str, dict[str, Any]]:
    """A long request: AReaL's own, or one whose answer says which version made which token."""
    if not spans:
        return "/v1/completions", generation_request(ROLLOUT) | {"prompt": prompt}
    sampling = {"temperature": 0.0, "max_tokens": ROLLOUT, "ignore_eos": True}
    return "/inference/v1/generate", {"token_ids": prompt, "sampling_params": sampling}


def generated_tokens(cluster: Cluster) -> dict[str, float]:
    """How many tokens each engine has generated, by its number; vLLM counts them."""
    with urllib.request.urlopen(f"{cluster.deployment.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode()
    found = re.findall(r'^vllm:generation_tokens_total\{[^}]*engine="(\d+)"[^}]*\} (\S+)$', lines, re.MULTILINE)
    return {engine: float(count) for engine, count in found}


def wait_generated(cluster: Cluster, counts: dict[str, float]) -> None:
    """Wait until each engine has generated so many tokens."""
    ends = time.monotonic() + 30
    while any(generated_tokens(cluster)[engine] < count for engine, count in counts.items()):
        assert time.monotonic() < ends, "the rollouts have not begun"


def predicted(model: torch.nn.Module, prompts: list[list[int]], tokens: list[list[int]]) -> list[list[int]]:
    """The model's choice of each token, given the prompt and the tokens before it."""
    whole = torch.tensor([[*prompt, *generated] for prompt, generated in zip(prompts, tokens, strict=True)])
    with torch.no_grad():
        logits = model(whole).logits[:, len(prompts[0]) - 1 : -1]
    return logits.argmax(-1).tolist()  # type: ignore[no-any-return]


def test_rollouts_in_flight_go_on_with_the_new_weights_and_say_where(
    cluster: Cluster, group: EngineGroup, trainer: TorchTrainer
) -> None:
    """64 of them. Each token is what the weights of its version choose, after the tokens before it."""
    old_model, old = copy.deepcopy(cluster.model), group.status()[0].version
    cluster.train()
    prompts = [[10 + number, 20, 30, 40] for number in range(64)]
    spans = post(cluster, *in_flight_request(PROMPT, spans=True))[0] == 200  # not every vLLM has this route
    assert spans or older_than(0, 32)
    for _ in range(5):
        cluster.wait_idle(group)
        generated, pool = generated_tokens(cluster), ThreadPoolExecutor(64)
        rollouts = [
            pool.submit(post, cluster, *in_flight_request(prompt, spans=spans and number % 4 > 1), rank=number % 2)
            for number, prompt in enumerate(prompts)
        ]
        pool.shutdown(wait=False)
        wait_generated(cluster, {engine: count + 64 for engine, count in generated.items()})
        ok(cluster, "/areal_pause_generation")
        if [state.requests for state in group.status()] == [32, 32]:
            break
        ok(cluster, "/areal_continue_generation")  # this machine was too slow for us: once more
        wait(rollouts, 60)
    else:
        raise AssertionError("the rollouts were over before the pause, five times")
    for bucket in buckets(cluster.model):
        send_bucket(cluster, trainer, bucket)
    assert not any(rollout.done() for rollout in rollouts), "generation is held until continue"
    ok(cluster, "/areal_continue_generation")
    answers = [rollout.result(60) for rollout in rollouts]
    assert {status for status, _ in answers} == {200}, answers
    choices = [answer["choices"][0] for _, answer in answers]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    tokens = [
        choice["token_ids"] if choice.get("token_ids") else tokens_of({"choices": [choice]}) for choice in choices
    ]
    before, after = predicted(old_model, prompts, tokens), predicted(cluster.model, prompts, tokens)
    new = group.status()[0].version
    for number, (choice, made) in enumerate(zip(choices, tokens, strict=True)):
        if versions := choice.get(
            "weight_versions"
        ):  # the first tokens are the old version's, the others the new one's
            assert [span["version"] for span in versions] in ([str(old), str(new)], [str(new)]), versions
            switches = [versions[0]["end"] if len(versions) == 2 else 0]
        else:
            switches = list(range(ROLLOUT))
        exact = [made[:at] == before[number][:at] and made[at:] == after[number][at:] for at in switches]
        assert any(exact), (number, made, before[number], after[number])
    both = [made for made, choice in zip(tokens, before, strict=True) if made[0] == choice[0] and made != choice]
    assert len(both) > 32, "most rollouts had begun when the update came"
    cluster.assert_serves_trainers_weights()


def test_two_servers_of_which_one_fails(cluster: Cluster, group: EngineGroup, trainer: TorchTrainer) -> None:
    """AReaL sends every call to both. An engine that votes no fails both, as often as continue is tried."""
    old = cluster.generated(0)
    replica = group.status()[0].replica
    first, *rest = buckets(cluster.model)
    with serving(cluster.deployment.directory, cluster.key_file, (replica, 1)) as second:
        second.ok("/areal_pause_generation")
        ok(cluster, "/areal_pause_generation")
        sent = trainer.broadcast([tensor + 1 for tensor in first.values()])
        for path, body in (("/areal_set_update_weight_meta", meta(first)), ("/areal_update_weights_xccl", None)):
            second.ok(path, body)
            ok(cluster, path, body)
        sent.result(30)
        assert rest, "the rest is missing, so every engine votes no"
        with ThreadPoolExecutor(2) as pool:
            for _ in range(3):
                other = pool.submit(second.refused, "/areal_continue_generation")
                assert "missing" in refused(cluster, "/areal_continue_generation")
                assert "do not serve version" in other.result(60)
    assert {state.generation for state in group.status()} == {"running"}
    assert cluster.generated(0) == cluster.generated(1) == old


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
