"""Models with adapters are sent merged, and stay as they are. The oracle is peft's own merge of a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lazily import Lazily
from test_trainer_models import checkpointed, fsdp2, one_rank_group  # noqa: F401 - a fixture
from test_weights import dense, metas, mixture, saved, sent, takes

from areal_vllm_ext import InvalidWeights
from areal_vllm_ext.client.weights import Checker, named_weights

peft = Lazily("peft")
transformers = Lazily("transformers")

Make = Callable[[], Any]


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def tied() -> Any:
    return dense(tie_word_embeddings=True)


# By name: a model, the kind of adapter, and its options.
ADAPTERS: dict[str, tuple[Make, str, dict[str, Any]]] = {
    "lora": (dense, "LoraConfig", {"target_modules": ["q_proj", "v_proj"]}),
    "lora of all layers": (dense, "LoraConfig", {"target_modules": "all-linear", "use_rslora": True}),
    "lora with biases": (gpt2, "LoraConfig", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "lora of the embedding": (tied, "LoraConfig", {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora": (dense, "LoraConfig", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "lora and a saved head": (dense, "LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "lora and tokens": (
        dense,
        "LoraConfig",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5]}},
    ),
    "lora of experts": (
        mixture,
        "LoraConfig",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "lora beside experts": (mixture, "LoraConfig", {"target_modules": ["q_proj", "o_proj"]}),
    "ia3": (dense, "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": (dense, "LoHaConfig", {"target_modules": ["q_proj", "up_proj"]}),
}


def adapted(name: str, **more: Any) -> Any:
    """A model whose adapter changes it."""
    make, kind, options = ADAPTERS[name]
    rank = {"r": 4} if kind != "IA3Config" else {}
    model = peft.get_peft_model(make(), getattr(peft, kind)(**rank, **options, **more))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def bytes_of(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in model.state_dict().items()}


def merged(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What peft's merge of a copy saves."""
    whole = copy.deepcopy(model).merge_and_unload()
    return saved(whole, folder)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_model_with_an_adapter_is_sent_merged_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    wanted = merged(model, tmp_path)
    base = saved(ADAPTERS[name][0](), tmp_path / "base")
    assert not same(wanted, base), "the adapter changes something"
    before = bytes_of(model)
    for _ in range(2):
        assert same(sent(model, metas(wanted)), wanted)
        assert bytes_of(model) == before
    assert same(dict(named_weights(model)), wanted)


def test_one_layer_is_merged_at_a_time() -> None:
    model = adapted("lora")
    parts = Checker(takes(metas(dict(named_weights(model)))), "float32", None).check_source(model)
    layers = [tensor for meta, tensor in parts if "q_proj" in meta.name]
    kept = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not {tensor.untyped_storage().data_ptr() for tensor in layers} & kept


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_send_that_fails_leaves_the_model_as_it_is(at: int) -> None:
    model = adapted("lora of all layers")
    before = bytes_of(model)
    for number, _ in enumerate(named_weights(model)):
        if number == at:
            break
    assert bytes_of(model) == before
    with pytest.raises(InvalidWeights, match="is not a weight"):
        sent(model, metas({"other": torch.zeros(1)}))
    assert bytes_of(model) == before


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_its_user_has_merged_is_not_merged_again(tmp_path: Path) -> None:
    model = adapted("lora")
    wanted = merged(model, tmp_path)
    model.merge_adapter()
    assert same(sent(model, metas(wanted)), wanted)
    names = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in model.named_parameters()
        if "lora_" not in name
    }
    assert same(sent(names, metas(wanted)), wanted), "as other libraries send it"
    assert same(
        sent({name: one for name, one in model.named_parameters() if "lora_" not in name}, metas(wanted)), wanted
    )


def test_the_active_one_of_two_adapters_is_merged(tmp_path: Path) -> None:
    model = adapted("lora")
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    for name in ("default", "second"):
        model.set_adapter(name)
        wanted = merged(model, tmp_path / name)
        assert same(sent(model, metas(wanted)), wanted)


def test_adapters_that_transformers_has_added_are_merged(tmp_path: Path) -> None:
    model = dense()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    wanted = saved(dense(), tmp_path)
    found = sent(model, metas(wanted))
    changed = {name for name in wanted if not torch.equal(found[name], wanted[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)}
    layer = model.model.layers[0].self_attn.q_proj
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], wanted[name] + layer.get_delta_weight("default"))


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [torch.compile, torch.nn.DataParallel, checkpointed, fsdp2],
    ids=["compile", "data parallel", "checkpointing", "fsdp2"],
)
def test_a_wrapped_model_with_an_adapter_is_sent_merged(wrap: Any, tmp_path: Path) -> None:
    model = adapted("lora of all layers")
    wanted = merged(model, tmp_path)
    if wrap in (checkpointed, fsdp2):
        wrap(model.base_model.model)
        wrapped = model
    else:
        wrapped = wrap(model)
    assert same(sent(wrapped, metas(wanted)), wanted)


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_inside_of_fsdp1_is_refused_with_the_call_that_works(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wanted = merged(adapted("lora"), tmp_path)
    model = adapted("lora")
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(InvalidWeights, match=r"adapters inside of FSDP1.*summon_full_params"):
        sent(wrapped, metas(wanted))


def test_an_adapter_that_is_no_change_of_weights_is_refused() -> None:
    model = peft.get_peft_model(dense(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(InvalidWeights, match=r"adapter \(PeftType\.PROMPT_TUNING\) is no change of weights"):
        sent(model, metas({"a": torch.zeros(1)}))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_adapters_of_one_tied_tensor_are_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(tied(), peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    with pytest.raises(InvalidWeights, match=r"are one tensor with two adapters: .*merge_and_unload"):
        sent(model, metas(saved(tied(), tmp_path)))
