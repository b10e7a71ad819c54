"""A worker's adapters with vLLM's own LoRA manager: built from memory, checked before the vote, kept over base updates."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lazily import Lazily
from safetensors.torch import save_file
from vllm_models import adapted, checkpoint, lora_slots, lora_worker, same_slots

from areal_vllm_ext import InvalidWeights
from areal_vllm_ext.client.lora import SentAdapter, copied
from areal_vllm_ext.integrity import digest
from areal_vllm_ext.protocol import TensorMeta, Units, Weights
from areal_vllm_ext.worker.adapters.loading import Unusable
from areal_vllm_ext.worker.adapters.staged import StagedAdapters
from areal_vllm_ext.worker.adapters.store import AdapterStore
from areal_vllm_ext.worker.hooks import choose_cpu_experts_beside_lora
from areal_vllm_ext.worker.load.intake import Intake

peft = Lazily("peft")
transformers = Lazily("transformers")

NUMBER = 1 << 30


@pytest.fixture(scope="module", name="lora_worker")
def one_worker() -> Any:
    """What is asked of a worker that serves LoRA."""
    return lora_worker()


@pytest.fixture
def runner(lora_worker: Any) -> Iterator[Any]:
    before = dict(vars(lora_worker.model_runner)), lora_worker.model_runner.lora_manager._load_adapter
    yield lora_worker.model_runner
    lora_worker.model_runner.maybe_remove_all_loras(lora_worker.vllm_config.lora_config)
    vars(lora_worker.model_runner).clear()
    vars(lora_worker.model_runner).update(before[0])
    lora_worker.model_runner.lora_manager._load_adapter = before[1]


@pytest.fixture
def store(lora_worker: Any, runner: Any) -> AdapterStore:
    return AdapterStore(lora_worker)


@pytest.fixture(scope="module")
def intake() -> Intake:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("dense"), dtype=torch.float32)
    metas = tuple(TensorMeta(name, "float32", tuple(tensor.shape)) for name, tensor in model.state_dict().items())
    return Intake(Weights(tensors=metas))


def staged(adapter: SentAdapter, store: AdapterStore, intake: Intake) -> Any:
    """What the worker votes yes to."""
    update = StagedAdapters()
    update.add(adapter.unit.name, adapter.tensors, {meta.name: (meta, value) for meta, value in adapter.entries})
    update.vote(Units(weights=False, adapters=(adapter.unit,)), store, intake)
    return update.voted[adapter.unit.name]


def request(number: int, path: str = "areal-vllm-ext:nothing") -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest("math", number, path)


def test_an_adapter_from_memory_is_what_vllm_reads_from_disk(
    store: AdapterStore, runner: Any, intake: Intake, tmp_path: Path
) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    runner.add_lora(request(1, str(tmp_path)))
    expected = lora_slots(runner)
    assert any(tensor.any() for tensors in expected.values() for tensor in tensors)
    before = copy.deepcopy(peft.get_peft_model_state_dict(model))
    for source in (model, str(tmp_path), (peft.get_peft_model_state_dict(model), model.peft_config["default"])):
        adapter = copied("math", source)
        unchanged = copy.deepcopy(adapter.tensors)
        store.commit({"math": staged(adapter, store, intake)}, {"math": NUMBER}, (NUMBER,))
        runner.add_lora(request(NUMBER))
        assert same_slots(lora_slots(runner), expected)
        assert all(torch.equal(unchanged[name], tensor) for name, tensor in adapter.tensors.items())
        runner.remove_lora(NUMBER)
    assert all(torch.equal(before[name], one) for name, one in peft.get_peft_model_state_dict(model).items())


def test_an_adapter_is_the_same_after_vllm_dropped_it(store: AdapterStore, runner: Any, intake: Intake) -> None:
    models = {name: staged(copied(name, adapted(seed)), store, intake) for seed, name in enumerate(("a", "b", "c"))}
    numbers = {name: NUMBER + place for place, name in enumerate(models)}
    store.commit(models, numbers, tuple(numbers.values()))
    seen = {}
    for name in ("a", "b", "c", "a", "b", "c"):  # vLLM keeps two of them
        runner.add_lora(request(numbers[name]))
        seen.setdefault(name, lora_slots(runner))
        assert same_slots(lora_slots(runner), seen[name])
    assert not same_slots(seen["a"], seen["b"])


def test_adapters_outlast_a_base_update_without_their_directory(
    store: AdapterStore, runner: Any, intake: Intake, tmp_path: Path
) -> None:
    adapted(5).save_pretrained(tmp_path)
    runner.add_lora(request(1, str(tmp_path)))  # another user's, through /v1/load_lora_adapter
    foreign = lora_slots(runner)
    shutil.rmtree(tmp_path)
    store.commit({"math": staged(copied("math", adapted()), store, intake)}, {"math": NUMBER}, (NUMBER,))
    runner.add_lora(request(NUMBER))
    ours = lora_slots(runner)
    runner.pin_lora(NUMBER)
    runner.reset_lora_state()
    runner.add_lora(request(NUMBER))
    assert same_slots(lora_slots(runner), ours)
    assert NUMBER in runner.lora_manager._adapter_manager._registered_adapters.pinned_items
    runner.remove_lora(NUMBER)  # pinned, so it holds the only slot
    runner.add_lora(request(1, str(tmp_path)))
    assert same_slots(lora_slots(runner), foreign)


def test_an_adapter_of_another_user_that_requests_wait_for_outlasts_its_directory_and_vllms_cache(
    store: AdapterStore, runner: Any, tmp_path: Path
) -> None:
    def load(number: int, *needed: int, inplace: bool = False) -> set[int]:
        from vllm.lora.request import LoRARequest

        wanted = LoRARequest(f"n{number}", number, str(tmp_path / str(number)), load_inplace=inplace)
        return set(store.load_other(runner.add_lora, wanted, (number, *needed)))

    for number in (1, 2, 3, 4):
        adapted(number).save_pretrained(tmp_path / str(number))
    assert load(1) == {1}
    expected = lora_slots(runner)
    shutil.rmtree(tmp_path / "1")
    assert load(2, 1) == {1, 2}
    assert load(3, 1) == {1, 2, 3}
    assert runner.list_loras() == {2, 3}
    for _ in range(2):  # as when the request is scheduled, and again after two others
        runner.add_lora(request(1, str(tmp_path / "1")))
        assert same_slots(lora_slots(runner), expected)
        load(2, 1)
        load(3, 1)
    # Its files have changed.
    before = lora_slots(runner)
    adapted(7).save_pretrained(tmp_path / "3")
    load(3)
    assert same_slots(lora_slots(runner), before)
    assert load(3, inplace=True) == {2, 3}, "no request needs the first any more"
    assert not same_slots(lora_slots(runner), before)
    shutil.rmtree(tmp_path / "3")
    with pytest.raises(Exception, match=str(tmp_path)):
        load(3, inplace=True)
    for number in (2, 4):  # a request runs on what was there before
        assert 3 in load(number, 3)
    runner.add_lora(request(3, str(tmp_path / "3")))
    with pytest.raises(Exception, match=str(tmp_path)):
        load(1)


def test_what_no_request_asks_for_is_dropped(store: AdapterStore, runner: Any, intake: Intake) -> None:
    model = staged(copied("math", adapted()), store, intake)
    store.commit({"math": model}, {"math": NUMBER}, (NUMBER,))
    runner.add_lora(request(NUMBER))
    store.commit({"math": model}, {"math": NUMBER + 1}, (NUMBER, NUMBER + 1))
    assert runner.list_loras() == {NUMBER}  # a request still runs on it
    store.commit({}, {}, (NUMBER + 1,))
    assert runner.list_loras() == set()
    with pytest.raises(Exception, match="areal-vllm-ext:nothing"):
        runner.add_lora(request(NUMBER))


def test_after_discarded_device_memory_an_adapter_is_copied_again(
    store: AdapterStore, runner: Any, intake: Intake
) -> None:
    store.commit({"math": staged(copied("math", adapted()), store, intake)}, {"math": NUMBER}, (NUMBER,))
    runner.add_lora(request(NUMBER))
    expected = lora_slots(runner)
    for module in runner.lora_manager._adapter_manager.modules.values():
        for tensor in (*module.lora_a_stacked, *module.lora_b_stacked):
            tensor.fill_(7)  # as after vLLM's sleep of level 2
    store.forget_device()
    runner.add_lora(request(NUMBER))
    assert same_slots(lora_slots(runner), expected)


def longer(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] - 1)


def other_rank(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["r"] = 2


def half(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors.pop(next(name for name in tensors if "lora_B" in name))


def setting(**changes: Any) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    return lambda _, config: config.update(changes)


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (longer, "which do not fit its weight"),
        (other_rank, "its configuration says rank 2"),
        (half, "came without"),
        (setting(r=16), "LoRA rank 16 is greater than max_lora_rank 8"),
        (setting(use_dora=True), "DoRA"),
        (setting(bias="all"), "bias"),
        (setting(init_lora_weights="pissa"), "pissa"),
        (setting(peft_type="LOHA"), "it is a LOHA adapter"),
        (setting(modules_to_save=["lm_head"]), "modules_to_save"),
        (renamed("q_proj", "query"), "for which vLLM has no LoRA in this model"),
        (renamed(".layers.", ".blocks."), "none of its modules is in this model"),
        (renamed("lora_A", "lora_magnitude_vector"), "unsupported LoRA weight"),
    ],
)
def test_what_vllm_cannot_serve_is_a_no_that_names_adapter_and_cause(
    store: AdapterStore, intake: Intake, change: Any, cause: str
) -> None:
    model = adapted()
    tensors, config = dict(peft.get_peft_model_state_dict(model)), model.peft_config["default"].to_dict()
    change(tensors, config)
    with pytest.raises(ValueError, match=f"nothing was applied: adapter math: .*{cause}"):
        staged(copied("math", (tensors, config)), store, intake)


def test_an_engine_without_lora_says_how_to_start_it(intake: Intake) -> None:
    with pytest.raises(ValueError, match="adapter math: this engine was started without --enable-lora"):
        staged(copied("math", adapted()), AdapterStore(SimpleNamespace()), intake)


def test_tensors_that_changed_on_the_way_are_a_no(store: AdapterStore, intake: Intake) -> None:
    adapter, update = copied("math", adapted()), StagedAdapters()
    contents = {meta.name: (meta, value) for meta, value in adapter.entries}
    contents.pop(next(iter(contents)))
    update.add("math", adapter.tensors, contents)
    with pytest.raises(RuntimeError, match="adapter math arrived with other tensors"):
        update.vote(Units(weights=False, adapters=(adapter.unit,)), store, intake)


def test_an_adapter_is_copied_as_it_is_when_it_is_given() -> None:
    model = adapted()
    adapter = copied("math", model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(tensor.any() for tensor in adapter.tensors.values())
    assert digest.digests_of(adapter.tensors.values()) == [value for _, value in adapter.entries]


def test_the_models_adapter_of_that_name_is_sent_else_the_active_one() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["k_proj"]))
    assert json.loads(copied("other", model).unit.config)["r"] == 2
    assert json.loads(copied("math", model).unit.config)["r"] == 4


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        (torch.nn.Linear(2, 2), "this module has no adapter"),
        (3, "is int: give a PeftModel"),
        (("a", "b", "c"), "is tuple: give a PeftModel"),
        ("/nowhere", "cannot be read from /nowhere"),
        (({}, {}), "has no tensors"),
        (({"a": torch.tensor([1.0, float("nan")])}, {}), "a holds NaN"),
        (({"a": torch.empty(2, device="meta")}, {}), "a has no values"),
        (({"a": torch.ones(2)}, {"r": object}), None),
    ],
)
def test_what_is_no_adapter_is_refused_before_anything_is_sent(source: Any, cause: str | None) -> None:
    if cause is None:
        assert copied("math", source).unit.name == "math"
        return
    with pytest.raises(InvalidWeights, match=f"adapter math.*{cause}"):
        copied("math", source)


@pytest.mark.parametrize("name", ["", "  ", 3, None, "a\nb", "x" * 257])
def test_a_name_is_one_that_a_request_can_give(name: Any) -> None:
    with pytest.raises(InvalidWeights, match="names no adapter"):
        copied(name, ({"a": torch.ones(2)}, {}))


def test_unusable_is_a_value_error() -> None:
    assert issubclass(Unusable, ValueError)


# MoE


def experts_adapter(seed: int, without: int | None = None) -> dict[str, torch.Tensor]:
    """Peft's tensors of an adapter of each expert, or of all but one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    tensors = {}
    for layer, expert in itertools.product(range(2), range(4)):
        for name, (inputs, outputs) in shapes.items() if expert != without else ():
            path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator)
    return tensors


EXPERTS = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def moe_worker() -> Any:
    """A worker whose experts serve LoRA, as on a GPU: they are Triton's, which a CPU cannot run."""
    with pytest.MonkeyPatch.context() as patch:
        from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
        from vllm.model_executor.layers.fused_moe.oracle import unquantized

        name = "select_unquantized_moe_backend"
        patch.setattr(unquantized_fused_moe_method, name, getattr(unquantized, name))
        return lora_worker("moe")


def expert_slots(worker: Any) -> list[torch.Tensor]:
    modules = worker.model_runner.lora_manager._adapter_manager.modules
    names = ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked")
    return [one[0].clone() for name in names for one in getattr(modules["model.layers.1.mlp.experts"], name)]


def test_an_adapter_of_experts_is_what_vllm_reads_from_disk(moe_worker: Any, tmp_path: Path) -> None:
    store, runner = AdapterStore(moe_worker), moe_worker.model_runner
    tensors = experts_adapter(1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(EXPERTS))
    runner.add_lora(request(1, str(tmp_path)))
    expected = expert_slots(moe_worker)
    assert all(one.any() for one in expected)
    store.commit(
        {"math": staged(copied("math", (tensors, EXPERTS)), store, Intake(Weights(())))}, {"math": NUMBER}, (NUMBER,)
    )
    for _ in range(2):
        runner.add_lora(request(NUMBER))
        assert all(map(torch.equal, expert_slots(moe_worker), expected))
        runner.add_lora(request(1, str(tmp_path)))  # in its place, and from memory now
        assert all(map(torch.equal, expert_slots(moe_worker), expected))


def test_an_adapter_of_some_experts_is_a_no(moe_worker: Any) -> None:
    store = AdapterStore(moe_worker)
    with pytest.raises(ValueError, match="adapter math: vLLM does not take it: AssertionError: in pack_moe"):
        staged(copied("math", (experts_adapter(1, without=3), EXPERTS)), store, Intake(Weights(())))


def test_a_moe_model_on_a_cpu_serves_adapters_of_other_layers_than_its_experts() -> None:
    choose_cpu_experts_beside_lora()
    worker: Any = lora_worker("moe", lora_target_modules=["q_proj", "v_proj", "o_proj"])
    store = AdapterStore(worker)
    assert (
        "CPU"
        in type(
            worker.get_model().model.layers[0].mlp.experts.routed_experts.quant_method.moe_kernel.fused_experts
        ).__name__
    )
    staged(copied("math", adapted(1, "moe", target_modules=["q_proj", "v_proj", "o_proj"])), store, Intake(Weights(())))
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj, which this engine's --lora-target-modules leave out"):
        staged(copied("math", (experts_adapter(1), EXPERTS)), store, Intake(Weights(())))
