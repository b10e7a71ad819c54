"""What trainers hold: their wrappers change no name and no byte of what is sent. The oracle is what the model saves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lazily import Lazily
from test_weights import SMALL, dense, metas, mixture, saved, sent, takes

from areal_vllm_ext import InvalidWeights
from areal_vllm_ext.client import names
from areal_vllm_ext.client.walk import walk
from areal_vllm_ext.client.weights import Checker, named_weights
from areal_vllm_ext.integrity import hugging_face
from areal_vllm_ext.protocol import TensorMeta, Weights

transformers = Lazily("transformers")


@pytest.fixture
def one_rank_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fsdp1(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = FullyShardedDataParallel(layer, device_id=torch.device("cpu"))
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def fsdp2(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    apply_activation_checkpointing(model, check_fn=lambda one: type(one).__name__.endswith("DecoderLayer"))
    assert "_checkpoint_wrapped_module" in dict(model.model.layers[0].named_children())
    return model


def compiled_by_layer(model: torch.nn.Module) -> torch.nn.Module:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer)
    assert any("_orig_mod." in name for name in model.state_dict())
    return model


WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "compile": torch.compile,  # type: ignore[dict-item]
    "compiled layers": compiled_by_layer,
    "data parallel": torch.nn.DataParallel,
    "ddp": torch.nn.parallel.DistributedDataParallel,
    "compiled ddp": lambda model: torch.compile(torch.nn.parallel.DistributedDataParallel(model)),  # type: ignore[return-value]
    "ddp of compiled": lambda model: torch.nn.parallel.DistributedDataParallel(torch.compile(model)),  # type: ignore[arg-type]
    "fsdp1": fsdp1,
    "compiled fsdp1": lambda model: torch.compile(fsdp1(model)),  # type: ignore[return-value]
    "fsdp2": fsdp2,
    "compiled fsdp2": lambda model: torch.compile(fsdp2(model)),  # type: ignore[return-value]
    "activation checkpointing": checkpointed,
    "fsdp2 of checkpointed": lambda model: fsdp2(checkpointed(model)),
}


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", [lambda: dense(tie_word_embeddings=True), mixture], ids=["tied", "moe"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_sent_as_the_model_is(wrapper: str, make: Any, tmp_path: Path) -> None:
    files = saved(make(), tmp_path)
    wrapped = WRAPPERS[wrapper](make())
    out = sent(wrapped, metas(files))
    assert set(out) == set(files)
    assert all(torch.equal(out[name], files[name]) for name in files)


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_state_dict_of_a_wrapped_model_is_sent(wrapper: str, tmp_path: Path) -> None:
    files = saved(dense(tie_word_embeddings=True), tmp_path)
    state = WRAPPERS[wrapper](dense(tie_word_embeddings=True)).state_dict()
    for source in (state, state.items(), list(state.items())):
        out = sent(source, metas(files))
        assert set(out) == set(files)
        assert all(torch.equal(out[name], files[name]) for name in files)


def test_the_items_of_a_state_dict_are_checked_before_anything_is_sent(tmp_path: Path) -> None:
    files = saved(dense(), tmp_path)
    items = (files | {"extra": torch.zeros(1)}).items()
    assert walk(items, 1) is items, "nothing gathers at each step, so nothing is walked"
    with pytest.raises(InvalidWeights, match="extra is not a weight"):
        Checker(takes(metas(files)), "float32", None).check_source(items)


class WithValueHead(torch.nn.Module):
    """As trl's ``AutoModelForCausalLMWithValueHead``, whose state dict has the model's names without a prefix."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.pretrained_model = model
        self.v_head = torch.nn.Linear(32, 1)


def test_a_value_head_beside_the_model_is_left_out_and_this_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "_left_out", set())
    files = saved(dense(), tmp_path)
    trainer = WithValueHead(dense())
    of_trl = dense().state_dict() | {"v_head.summary.weight": torch.zeros(1, 32)}
    with caplog.at_level(logging.WARNING):
        for source in (trainer, trainer.state_dict(), iter(trainer.state_dict().items()), of_trl):
            out = sent(source, metas(files))
            assert set(out) == set(files)
            assert all(torch.equal(out[name], files[name]) for name in files)
    assert [one.getMessage().partition(":")[0] for one in caplog.records] == ["v_head of the trainer is not sent"]


def test_a_value_head_that_the_engines_serve_is_sent() -> None:
    state = {"v_head.weight": torch.ones(1, 2)}
    assert set(sent(state, metas(state))) == set(state)


def test_a_buffer_that_every_model_computes_is_left_out(tmp_path: Path) -> None:
    files = saved(dense(), tmp_path)
    assert set(sent(files | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, metas(files))) == set(
        files
    )


def test_names_of_wrappers_are_taken_off_where_the_engines_names_are_not_known() -> None:
    assert set(sent({"_orig_mod.a": torch.zeros(1), "b._fsdp_wrapped_module.c": torch.zeros(1)}, ())) == {"a", "b.c"}


def test_two_names_of_one_tensor_are_refused() -> None:
    known = {"a": torch.zeros(3)}
    with pytest.raises(InvalidWeights, match="a is there twice"):
        sent(known | {"module.a": torch.ones(3)}, metas(known))


def test_a_tensor_of_an_adapter_is_refused_with_the_call_that_works() -> None:
    known = {"layer.weight": torch.zeros(3)}
    state = {"base_model.model.layer.base_layer.weight": torch.zeros(3)}
    assert set(sent(state, metas(known))) == {"layer.weight"}, "as it is after merge_adapter()"
    with pytest.raises(
        InvalidWeights, match=r"lora_A.* is a part of an adapter: give send\(\.\.\.\) the PeftModel itself"
    ):
        sent(state | {"base_model.model.layer.lora_A.default.weight": torch.zeros(3)}, metas(known))


def test_a_wrapped_model_is_named_as_it_is_saved(tmp_path: Path) -> None:
    assert set(dict(named_weights(torch.nn.DataParallel(mixture())))) == set(saved(mixture(), tmp_path))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4))


def qwen2_moe() -> Any:
    options = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SMALL, **options))


def neox() -> Any:
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=64, **options))


def hybrid() -> Any:
    """Its configuration holds an infinity, for which JSON has no number."""
    options = {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8}
    layers = {"layers_block_type": ["mamba", "attention", "mlp"]}
    small = {name: one for name, one in SMALL.items() if name != "num_hidden_layers"}
    return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**small, **options, **layers))


def vision() -> Any:
    tower = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = SMALL | {"rope_parameters": rope, "head_dim": 8}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower, image_token_id=3, video_token_id=4)
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("make", [mixture, mixtral, qwen2_moe, neox, hybrid, vision])
def test_a_state_dict_with_the_names_of_transformers_modules_is_sent_as_the_model_is(make: Any, tmp_path: Path) -> None:
    model = make()
    files = saved(model, tmp_path)
    state = model.state_dict()
    taken = takes(metas(files), config=hugging_face.described(model.config))
    # Without the engines' configuration, nothing tells what these names mean.
    if set(state) - set(files) - {"lm_head.weight"}:
        with pytest.raises(InvalidWeights, match="is not a weight"):
            sent(state, metas(files))
    for source in (state, state.items(), {f"_orig_mod.{name}": one.clone() for name, one in state.items()}):
        out = {meta.name: tensor for meta, tensor in Checker(taken, "float32", None).check_source(source)}
        assert set(out) == set(files)
        assert all(torch.equal(out[name], files[name]) for name in files)
    fewer = {name: one for name, one in state.items() if "layers.1" not in name}
    with pytest.raises(InvalidWeights):
        Checker(taken, "float32", None).check_source(fewer)


def test_every_rank_is_met_though_the_first_one_renames_what_it_holds(tmp_path: Path) -> None:
    model = mixture()
    files = saved(model, tmp_path)
    met: list[list[str]] = []

    def gather(parts: Any) -> Iterator[Any]:
        met.append([name for name, _ in parts])
        yield from parts

    taken = takes(metas(files), config=hugging_face.described(model.config))
    assert len(dict(Checker(taken, "float32", None).check_source(model.state_dict(), gather))) == len(files)
    assert met == [list(model.state_dict())], "under the names that all ranks have"


def test_a_configuration_that_is_no_model_of_transformers_is_no_error() -> None:
    for text in ("", "{", "{}", '{"model_type": "none"}', '{"model_type": "qwen3", "architectures": ["Other"]}'):
        assert hugging_face.model_of(text) is None
    taken = takes(metas({"a": torch.zeros(1)}), config='{"model_type": "none"}')
    with pytest.raises(InvalidWeights, match="b is not a weight"):
        Checker(taken, "float32", None).check_source({"b": torch.zeros(2)})


def test_a_name_that_the_engines_know_is_never_taken_for_another() -> None:
    """Also where it looks as if a wrapper had renamed it."""
    finder = names.NameFinder(Weights(tensors=tuple(TensorMeta(name, "float32", (2,)) for name in ("w", "module.w"))))
    assert [finder.find(name) for name in ("w", "module.w", "module.module.w")] == ["w", "module.w", "module.w"]


def test_the_second_name_of_a_tied_weight_is_known() -> None:
    taken = Weights(tensors=(TensorMeta("embed", "float32", (2,)),), ties={"head": "embed"})
    assert names.NameFinder(taken).all_known([("embed", None), ("head", None), ("module.head", None)])
    assert not names.NameFinder(taken).all_known([("embed", None), ("tail", None)])


def test_a_known_name_gets_no_hint_about_names() -> None:
    shapes = {"w": (2,), "model.v": (3,), "model.u": (3,)}
    finder = names.NameFinder(Weights(tensors=tuple(TensorMeta(name, "float32", one) for name, one in shapes.items())))
    assert finder.hint(TensorMeta("z", "float32", (3,))) == "", "it may be tied to either of two"
    assert finder.hint(TensorMeta("w", "int8", (2,))) == ""
    assert "calls it model.v: add the prefix" in finder.hint(TensorMeta("v", "float32", (3,)))
    assert "if it is tied to w" in finder.hint(TensorMeta("head", "float32", (2,)))
