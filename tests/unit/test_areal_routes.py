# ruff: noqa: F811 - fixtures are arguments
"""AReaL's routes over HTTP: its calls in its shapes and its order, on engines that really receive, stage and commit."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import forked_gloo  # noqa: F401 - a fixture
from real_receivers import Served, checkpoint, group, served, shared_engines, weights  # noqa: F401 - fixtures
from safetensors.torch import save_file

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.integrations.areal.limits import Limits
from areal_vllm_ext.integrations.areal.names import outdated
from areal_vllm_ext.worker.adapters.staged import StagedAdapters
from areal_vllm_ext.worker.adapters.store import AdapterStore
from harness.areal_server import LIMITS, Server
from harness.areal_server import serving as serving_for
from harness.torch_trainer import TorchTrainer, torch_trainer

pytestmark = pytest.mark.usefixtures("forked_gloo")

WORKERS = 4  # of two engines
GROUP = "update_weight_group"


def serving(
    served: Served, key_file: Path, own: tuple[str, int] | None = None, limits: Limits = LIMITS
) -> AbstractContextManager[Server]:
    """A server for the first engine, or ``own``."""
    infos = [engine.endpoint.info for engine in served.deployment.engines.values()]
    first = min((info.replica, info.dp_rank) for info in infos)
    return serving_for(served.deployment.directory, key_file, own or first, limits)


@pytest.fixture
def server(served: Served, key_file: Path) -> Iterator[Server]:
    with serving(served, key_file) as made:
        yield made


def meta(tensors: dict[str, torch.Tensor], group: str = GROUP) -> dict[str, Any]:
    return {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": group,
    }


def buckets(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    items = list(tensors.items())
    return [dict(items[:2]), dict(items[2:])]


def send_bucket(server: Server, trainer: TorchTrainer, tensors: dict[str, torch.Tensor]) -> None:
    """What AReaL does for each bucket: both calls, and the broadcasts beside them."""
    sent = trainer.broadcast(list(tensors.values()))
    server.ok("/areal_set_update_weight_meta", meta(tensors, trainer.name))
    server.ok("/areal_update_weights_xccl")
    sent.result(20)


def generations(group: EngineGroup) -> list[tuple[str, object]]:
    return [(state.generation, state.version) for state in group.status()]


def join(server: Server, trainer: TorchTrainer) -> None:
    server.ok(*server.init(trainer))
    trainer.joined.result(30)


def test_a_trainer_that_broadcasts(served: Served, group: EngineGroup, server: Server) -> None:
    before = generations(group)[0][1]
    with torch_trainer(WORKERS + 1, GROUP) as trainer:
        join(server, trainer)
        assert not any(state.error for state in group.status()), "to join is no failed update"
        for step in (1, 2):
            new = weights(step)
            server.ok("/areal_pause_generation")
            assert {generation for generation, _ in generations(group)} == {"paused"}
            for bucket in buckets(new):
                send_bucket(server, trainer, bucket)
            assert served.weights == {} or not served.serves(new), "nothing is committed before continue"
            assert {generation for generation, _ in generations(group)} == {"paused"}, "held until continue"
            assert "version" in server.ok("/areal_continue_generation")
            assert served.serves(new)
            assert generations(group) == [("running", before + step)] * 2  # type: ignore[operator]

        # A second bucket does not fit: every engine keeps its weights, and continue fails each time.
        serving_now, wrong = dict(served.weights), weights(3)
        server.ok("/areal_pause_generation")
        first, second = buckets(wrong)
        send_bucket(server, trainer, first)
        second["layer.1"] = torch.zeros(5, 5)
        trainer.broadcast(list(second.values()))
        server.ok("/areal_set_update_weight_meta", meta(second))
        problem = server.refused("/areal_update_weights_xccl")
        assert "layer.1 has shape [5, 5]" in problem
        assert "every engine keeps its old weights" in problem
        assert generations(group) == [("running", before + 2)] * 2, "old weights serve"  # type: ignore[operator]
        for _ in range(3):
            assert server.refused("/areal_continue_generation") == problem
        assert served.weights == serving_now
        # The groups are gone with it: a broadcast fails instead of waiting for ever, and the next calls say so.
        with pytest.raises(RuntimeError):
            trainer.broadcast([torch.zeros(2_000_000)]).result(20)
        server.ok("/areal_pause_generation")
        assert "/areal_init_weights_update_group first" in server.refused("/areal_set_update_weight_meta", meta(first))
        server.ok("/areal_continue_generation")


def test_a_trainer_starts_again_under_the_same_name(served: Served, group: EngineGroup, server: Server) -> None:
    with torch_trainer(WORKERS + 1, GROUP) as trainer:
        join(server, trainer)
        new = weights(4)
        server.ok("/areal_pause_generation")
        for bucket in buckets(new):
            send_bucket(server, trainer, bucket)
        server.ok("/areal_continue_generation")
        assert served.serves(new)

        # A trainer that pauses again gives up what it began. Its group ends, so that no broadcast of it waits for ever.
        server.ok("/areal_pause_generation")
        send_bucket(server, trainer, buckets(weights(5))[0])
        server.ok("/areal_pause_generation")
        with pytest.raises(RuntimeError):
            trainer.broadcast([torch.zeros(2_000_000)]).result(20)
        server.ok("/areal_continue_generation")
        assert served.serves(new)

    with torch_trainer(WORKERS + 1, GROUP) as trainer:
        join(server, trainer)
        # An update that lacks a tensor is a no at continue, on every engine.
        server.ok("/areal_pause_generation")
        send_bucket(server, trainer, buckets(weights(5))[0])
        problem = server.refused("/areal_continue_generation")
        assert "missing" in problem
        assert server.refused("/areal_continue_generation") == problem
        assert served.serves(new)
        assert {generation for generation, _ in generations(group)} == {"running"}


def test_several_groups_take_turns(served: Served, group: EngineGroup, server: Server) -> None:
    new = weights(7)
    with torch_trainer(WORKERS + 1, f"{GROUP}_0") as one, torch_trainer(WORKERS + 1, f"{GROUP}_1") as two:
        join(server, one)
        join(server, two)
        server.ok("/areal_pause_generation")
        for trainer, name in zip((one, two, one, two, one), new, strict=True):
            send_bucket(server, trainer, {name: new[name]})
        server.ok("/areal_continue_generation")
        assert served.serves(new)


def test_a_checkpoint_is_staged_and_committed_at_continue(
    served: Served, group: EngineGroup, server: Server, tmp_path: Path
) -> None:
    new = weights(11)
    folder = tmp_path / "weight_update_v41"
    folder.mkdir()
    save_file(new, folder / "model.safetensors")
    server.ok("/areal_pause_generation")
    assert "version 41 is staged" in server.ok("/areal_update_weights", {"model_path": str(folder)})
    (folder / "model.safetensors").unlink()  # AReaL removes it after 200
    assert served.weights == {}
    server.ok("/areal_continue_generation")
    assert served.serves(new)
    assert generations(group) == [("running", 41)] * 2

    # A path that is wrong is tried again and again; the first try that is right counts.
    server.ok("/areal_pause_generation")
    for _ in range(2):
        problem = server.refused("/areal_update_weights", {"model_path": str(tmp_path / "weight_update_v42")})
        assert "weight_update_v42" in problem
        assert generations(group) == [("running", 41)] * 2
    assert server.refused("/areal_continue_generation") == problem
    save_file(weights(12), folder / "model.safetensors")
    server.ok("/areal_update_weights", {"model_path": str(folder)})
    assert {generation for generation, _ in generations(group)} == {"paused"}
    server.ok("/areal_continue_generation")
    assert served.serves(weights(12))


def test_calls_out_of_order_say_what_to_do(group: EngineGroup, server: Server) -> None:
    before = generations(group)
    assert "/areal_set_update_weight_meta before" in server.refused("/areal_update_weights_xccl")
    assert "init_weights_update_group first" in server.refused("/areal_set_update_weight_meta", meta(weights(0)))
    assert "generation goes on" in server.ok("/areal_continue_generation")
    server.ok("/areal_pause_generation")
    server.ok("/areal_pause_generation")
    assert "before" in server.refused("/areal_update_weights_xccl")
    server.ok("/areal_continue_generation")
    assert "/areal_set_update_weight_meta before" in server.refused(
        "/areal_update_weights_lora_xccl", {"lora_name": "a"}
    )
    assert generations(group) == before


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/areal_update_weights", {}, "missing required field `model_path`"),
        ("/areal_update_weights", [1], "Expected `object`"),
        ("/areal_init_weights_update_group", {"master_address": "a"}, "missing required field"),
        ("/areal_set_update_weight_meta", meta({}), "0 names"),
        ("/areal_set_update_weight_meta", {**meta(weights(0)), "dtypes": ["float32"]}, "1 dtypes"),
        ("/areal_set_update_weight_meta", {**meta(weights(0)), "shapes": [[-1]] * 5}, ">= 0"),
        ("/wake_up?tags=everything", {}, "everything cannot be woken up"),
        ("/sleep?level=3", {}, "no sleep of level 3"),
        ("/areal_set_update_weight_meta_lora", meta(weights(0)), "missing required field `lora_name`"),
        ("/areal_update_weights_lora", {"lora_name": "a"}, "missing required field `lora_model_path`"),
    ],
)
def test_bodies_that_do_not_fit_are_refused(
    group: EngineGroup, server: Server, path: str, body: Any, problem: str
) -> None:
    assert problem in server.refused(path, body)


def test_a_group_that_never_comes_ends_at_the_deadline(served: Served, group: EngineGroup, key_file: Path) -> None:
    started = time.monotonic()
    with serving(served, key_file, limits=Limits(join=3.0)) as server, torch_trainer(9, GROUP, timeout=10) as trainer:
        path, body = server.init(trainer)
        assert "was not joined" in server.refused(path, body | {"master_port": "1"})
        assert time.monotonic() - started < 20
        assert "vllm:dN" in server.refused(path, body | {"world_size": 4})
        assert {generation for generation, _ in generations(group)} == {"running"}


def test_a_trainer_that_is_lost_after_its_pause_leaves_no_engine_paused(
    served: Served, group: EngineGroup, key_file: Path
) -> None:
    with serving(served, key_file, limits=Limits(idle=0.5)) as server:
        server.ok("/areal_pause_generation")
        assert {generation for generation, _ in generations(group)} == {"paused"}
        ends = time.monotonic() + 20
        while {generation for generation, _ in generations(group)} != {"running"}:
            assert time.monotonic() < ends
            time.sleep(0.05)
        assert "made no call for" in server.refused("/areal_continue_generation")


def test_two_addresses_of_one_deployment_act_once(
    served: Served, group: EngineGroup, key_file: Path, server: Server, tmp_path: Path
) -> None:
    """AReaL sends each call to both at once, and continues when both have answered 200."""
    replica = next(iter(served.deployment.engines.values())).endpoint.info.replica
    folder = tmp_path / "weight_update_v77"
    folder.mkdir()
    save_file(weights(20), folder / "model.safetensors")
    with serving(served, key_file, own=(replica, 1)) as second:
        assert "does it for all servers" in second.ok("/areal_pause_generation")
        server.ok("/areal_pause_generation")
        for one in (second, server):
            one.ok("/areal_update_weights", {"model_path": str(folder)})
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(second.ok("/areal_continue_generation")))
        thread.start()
        server.ok("/areal_continue_generation")
        thread.join(30)
        assert "does it for all servers" in answers[0]
        assert served.serves(weights(20))
        # A server that only follows does not say that all is well when the other was not asked.
        second.ok("/areal_pause_generation")
        second.ok("/areal_update_weights", {"model_path": str(tmp_path / "weight_update_v78")})
        assert "give AReaL its address too" in second.refused("/areal_continue_generation")
        # Its ranks are those of the deployment, whichever address is the first.
        with torch_trainer(WORKERS + 1, GROUP) as trainer:
            second.ok(*second.init(trainer, rank_offset=1))
            server.ok(*server.init(trainer, rank_offset=2))
            trainer.joined.result(30)


def test_engines_that_sleep_wake_up_with_what_came_meanwhile(
    served: Served, group: EngineGroup, server: Server, tmp_path: Path
) -> None:
    """The order of a trainer on the same GPUs; AReaL deletes the files after 200."""
    folder = tmp_path / "weight_update_v91"
    for tags in ([], ["weights", "kv_cache"]):
        new = weights(30 + len(tags))
        folder.mkdir()
        save_file(new, folder / "model.safetensors")
        server.ok("/sleep")
        assert {state.sleep for state in group.status()} == {"asleep_1"}
        server.ok("/areal_pause_generation")
        server.ok("/areal_update_weights", {"model_path": str(folder)})
        (folder / "model.safetensors").unlink()
        folder.rmdir()
        server.ok("/areal_continue_generation")
        for path in [f"/wake_up?tags={tag}" for tag in tags] or ["/wake_up"]:
            server.ok(path)
        assert served.serves(new)
        assert generations(group) == [("running", 91)] * 2
        assert list(tmp_path.iterdir()) == [], "the kept files are gone"
    # A pause before the sleep outlasts it, as AReaL's order wants.
    server.ok("/areal_pause_generation")
    server.ok("/sleep?level=1")
    server.ok("/wake_up?tags=weights&tags=kv_cache")
    assert {generation for generation, _ in generations(group)} == {"paused"}
    server.ok("/areal_continue_generation")
    assert {generation for generation, _ in generations(group)} == {"running"}
    # What is no checkpoint is refused while AReaL waits for the answer.
    server.ok("/sleep")
    assert "nowhere" in server.refused("/areal_update_weights", {"model_path": str(tmp_path / "nowhere")})
    server.ok("/wake_up")


def save_adapter(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """A directory as peft writes it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    shapes = {"base_model.model.a.lora_A.weight": (2, 7), "base_model.model.a.lora_B.weight": (33, 2)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["a"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_an_adapter_from_disk_is_committed_at_continue_and_old_names_go(
    served: Served, group: EngineGroup, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterStore, "load", lambda _, __, given, ___: dict(given))  # without vLLM's LoRA
    served.adapters.clear()
    for number in (101, 102, 103):
        folder = tmp_path / str(number)
        tensors = save_adapter(folder, number)
        server.ok("/areal_pause_generation")
        server.ok("/v1/load_lora_adapter", {"lora_path": str(folder), "lora_name": f"lora-v{number}"})
        assert f"lora-v{number}" not in group.status()[0].adapters
        for file in folder.iterdir():
            file.unlink()
        assert "unload x after" in server.refused("/v1/unload_lora_adapter", {"lora_name": "x"})
        server.ok("/areal_continue_generation")
        assert generations(group) == [("running", number)] * 2
        for held in served.adapters.values():
            given = held[f"lora-v{number}"]
            assert sorted(given) == sorted(tensors)
            assert all(torch.equal(given[name], tensor) for name, tensor in tensors.items())
    assert [set(state.adapters) for state in group.status()] == [{"lora-v102", "lora-v103"}] * 2
    server.ok("/v1/unload_lora_adapter", {"lora_name": "lora-v102"})
    assert [set(state.adapters) for state in group.status()] == [{"lora-v103"}] * 2
    server.ok("/areal_pause_generation")
    assert "nowhere" in server.refused("/v1/load_lora_adapter", {"lora_path": "/nowhere", "lora_name": "lora-v104"})
    assert {generation for generation, _ in generations(group)} == {"running"}
    assert "nowhere" in server.refused("/areal_continue_generation")
    server.ok("/v1/unload_lora_adapter", {"lora_name": "lora-v103"})


def adapter_tensors(seed: int) -> dict[str, torch.Tensor]:
    """As a trainer with peft's model has them: the adapter's name is in theirs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"base_model.model.a.lora_A.default.weight": (2, 7), "base_model.model.a.lora_B.default.weight": (33, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adapter_meta(tensors: dict[str, torch.Tensor], name: str, group: str = GROUP, **more: Any) -> dict[str, Any]:
    lora = {"lora_name": name, "lora_int_id": 1, "lora_target_modules": "all-linear", "lora_rank": 2, "lora_alpha": 4}
    return meta(tensors, group) | lora | {"lora_bias": "none", "base_model_name": "m"} | more


def send_adapter(server: Server, trainer: TorchTrainer, tensors: dict[str, torch.Tensor], name: str) -> None:
    sent = trainer.broadcast(list(tensors.values()))
    body = adapter_meta(tensors, name, trainer.name)
    server.ok("/areal_set_update_weight_meta_lora", body)
    server.ok("/areal_update_weights_lora_xccl", body)
    sent.result(20)


def assert_hold(served: Served, name: str, tensors: dict[str, torch.Tensor]) -> None:
    assert len(served.adapters) == WORKERS
    for held in served.adapters.values():
        given = {tensor.replace(".default", ""): value for tensor, value in tensors.items()}
        assert sorted(held[name]) == sorted(given)
        assert all(torch.equal(held[name][tensor], value) for tensor, value in given.items())


def test_an_adapter_by_a_process_group_is_committed_at_continue(
    served: Served, group: EngineGroup, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterStore, "load", lambda _, __, given, ___: dict(given))  # without vLLM's LoRA
    served.adapters.clear()
    with torch_trainer(WORKERS + 1, GROUP) as trainer:
        join(server, trainer)
        for number in (201, 202, 203):
            tensors = adapter_tensors(number)
            server.ok("/areal_pause_generation")
            for name, tensor in tensors.items():  # a bucket each
                send_adapter(server, trainer, {name: tensor}, f"lora-v{number}")
            assert f"lora-v{number}" not in group.status()[0].adapters, "nothing is committed before continue"
            server.ok("/areal_continue_generation")
            assert_hold(served, f"lora-v{number}", tensors)
            assert generations(group) == [("running", number)] * 2
        assert [set(state.adapters) for state in group.status()] == [{"lora-v202", "lora-v203"}] * 2
        assert served.weights == {worker: {} for worker in served.weights}, "base weights stay"

        # The same name again brings other tensors; then base weights by the same group.
        tensors = adapter_tensors(9)
        server.ok("/areal_pause_generation")
        send_adapter(server, trainer, tensors, "lora-v203")
        server.ok("/areal_continue_generation")
        assert_hold(served, "lora-v203", tensors)
        server.ok("/areal_pause_generation")
        for bucket in buckets(weights(33)):
            send_bucket(server, trainer, bucket)
        server.ok("/areal_continue_generation")
        assert served.serves(weights(33))
        assert [set(state.adapters) for state in group.status()] == [{"lora-v202", "lora-v203"}] * 2

        # A bucket of the same adapter with another configuration ends the update, everywhere.
        server.ok("/areal_pause_generation")
        send_adapter(server, trainer, tensors, "lora-v204")
        trainer.broadcast(list(tensors.values()))
        server.ok("/areal_set_update_weight_meta_lora", adapter_meta(tensors, "lora-v204", lora_rank=3))
        assert "another configuration" in (problem := server.refused("/areal_update_weights_lora_xccl"))
        for _ in range(3):
            assert server.refused("/areal_continue_generation") == problem
        assert {generation for generation, _ in generations(group)} == {"running"}
        assert [set(state.adapters) for state in group.status()] == [{"lora-v202", "lora-v203"}] * 2
    for name in ("lora-v202", "lora-v203"):
        server.ok("/v1/unload_lora_adapter", {"lora_name": name})


def test_workers_that_got_other_tensors_of_an_adapter_commit_none(
    served: Served, group: EngineGroup, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No digests are announced, so votes are compared with each other."""
    monkeypatch.setattr(AdapterStore, "load", lambda _, __, given, ___: dict(given))
    add, calls = StagedAdapters.add, iter(range(100))

    def add_wrong(self: StagedAdapters, adapter: str, tensors: dict[str, torch.Tensor], contents: Any = None) -> None:
        add(self, adapter, {name: one + (next(calls) == 0) for name, one in tensors.items()}, contents)

    monkeypatch.setattr(StagedAdapters, "add", add_wrong)
    with torch_trainer(WORKERS + 1, GROUP) as trainer:
        join(server, trainer)
        server.ok("/areal_pause_generation")
        send_adapter(server, trainer, adapter_tensors(1), "lora-v301")
        assert "holds other weights" in server.refused("/areal_continue_generation")
        assert [set(state.adapters) for state in group.status()] == [set()] * 2
        assert {generation for generation, _ in generations(group)} == {"running"}


def test_versions_of_an_adapter_that_are_not_needed_go() -> None:
    assert outdated("a-v4", ["a-v1", "a-v2", "a-v3", "b-v1", "a", "a-v9", "a-b-v1"]) == ["a-v1", "a-v2"]
    assert outdated("a-v10", ["a-v9", "a-v2"]) == ["a-v2"]
    assert outdated("a", ["a-v1", "a-v2"]) == []
