"""What vLLM's models take of tiny checkpoints of kinds that people train. The oracle is a load of what the files hold.

Each model is built in this process, as a worker does. A trainer's model must give all that the same model needs, whatever the
files hold beside it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lazily import Lazily
from real_receivers import Served, checkpoint, group, send, served, shared_engines, weights  # noqa: F401 - fixtures
from safetensors.torch import load_file, save_file
from test_weights import metas, sent, takes
from vllm_models import reload_weights, skipped_without_mla

from areal_vllm_ext import EngineGroup, InvalidWeights, UpdateAborted
from areal_vllm_ext.client.weights import Checker
from areal_vllm_ext.engine_core.queries import together
from areal_vllm_ext.integrity.checkpoint import missing_reason
from areal_vllm_ext.protocol import TensorMeta, Weights
from areal_vllm_ext.worker.hooks import repack_cpu_experts_on_reload
from areal_vllm_ext.worker.load.apart import apart
from areal_vllm_ext.worker.load.dry_load import DryModel
from areal_vllm_ext.worker.load.intake import Intake
from areal_vllm_ext.worker.load.loader import Loader
from areal_vllm_ext.worker.load.proof import digests_of_model, packed_digests, tie_as
from areal_vllm_ext.worker.load.provenance import places_of

transformers = Lazily("transformers")

vllm_state = Lazily("vllm.distributed.parallel_state")
vllm_config = Lazily("vllm.config")
vllm_utils = Lazily("vllm.model_executor.model_loader.utils")
VLLM_TIES = "vllm.model_executor.model_loader.weight_tying"
vllm_loader = Lazily("vllm.model_executor.model_loader")
vllm_args = Lazily("vllm.engine.arg_utils")

Tensors = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
MIXTURE: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}


def qwen3(**more: Any) -> Any:
    options = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(options | more)))


def gpt2() -> Any:
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=128, bos_token_id=0, eos_token_id=0, **options)
    )


def opt() -> Any:
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32))


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False)
    )


def glm4() -> Any:
    return transformers.Glm4MoeForCausalLM(
        transformers.Glm4MoeConfig(**SMALL, **MIXTURE, num_key_value_heads=2, head_dim=8)
    )


def deepseek() -> Any:
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16}
    config = transformers.DeepseekV3Config(**SMALL, **MIXTURE, **heads, num_key_value_heads=4, topk_method="noaux_tc")
    return transformers.DeepseekV3ForCausalLM(config)


def with_drafter(files: Tensors) -> Tensors:
    """Layer 2, with which vLLM drafts, and which the trainer's model of transformers lacks."""
    layer = {name.replace("layers.1.", "layers.2."): one.clone() for name, one in files.items() if "layers.1." in name}
    return (
        files
        | layer
        | {"model.layers.2.eh_proj.weight": torch.zeros(32, 64), "model.layers.2.enorm.weight": torch.ones(32)}
    )


def with_head(files: Tensors) -> Tensors:
    return files | {"lm_head.weight": files["model.embed_tokens.weight"].clone()}


def with_buffers(files: Tensors) -> Tensors:
    return files | {f"model.layers.{one}.self_attn.rotary_emb.inv_freq": torch.ones(4) for one in range(2)}


def as_on_the_hub(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda files: {name.removeprefix(prefix): one for name, one in files.items()}


def with_masks(files: Tensors) -> Tensors:
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    return as_on_the_hub("transformer.")(files) | masks


# By name: the trainer's model, what its checkpoint's files hold, and a part of the names that are optional.
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Tensors], Tensors], str]] = {
    "tied, head saved": (qwen3, with_head, "lm_head.weight"),
    "gpt2": (gpt2, with_masks, ".attn.bias"),
    "opt": (opt, as_on_the_hub("model."), ""),
    "llama, buffers saved": (llama, with_buffers, "inv_freq"),
    "glm4 with a drafter": (glm4, with_drafter, "layers.2."),
    "deepseek with a drafter": (deepseek, with_drafter, "layers.2."),
}


class Kind:
    """A tiny checkpoint, and vLLM's model of it."""

    def __init__(self, name: str, folder: Path) -> None:
        make, saved_as, self.optional = KINDS[name]
        torch.manual_seed(0)
        self.trainer = make()
        self.trainer.save_pretrained(folder)
        self.as_saved = load_file(folder / "model.safetensors")
        self.files = saved_as(self.as_saved)
        save_file(self.files, folder / "model.safetensors")
        self.folder = folder
        self.config = vllm_args.EngineArgs(
            model=str(folder), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=32
        ).create_engine_config()
        with vllm_config.set_current_vllm_config(self.config):
            vllm_state.destroy_model_parallel()
            vllm_state.initialize_model_parallel(1, 1)
        self.live = live = self.built()
        live.load_weights(iter(self.files.items()))
        if find_spec(VLLM_TIES):  # 0.19 ties nothing again
            Lazily(VLLM_TIES).maybe_retie_word_embeddings(live, self.config.model_config)
        self.dry = DryModel.of(SimpleNamespace(vllm_config=self.config, get_model=lambda: live))

    def intake(self, folder: Path | None = None) -> Intake:
        return Intake.of((str(folder or self.folder), None), self.config.model_config, self.dry)

    def built(self) -> Any:
        """vLLM's model without weights, on the CPU and not packed."""
        with apart(self.config) as config, skipped_without_mla():
            return vllm_utils.initialize_model(vllm_config=config)

    def loaded(self, tensors: Tensors) -> Tensors:
        """What vLLM's model holds after these weights were loaded."""
        model = self.built()
        for parameter in model.parameters():
            parameter.data.fill_(7)
        tie_as(model, self.live)
        model.load_weights(iter(tensors.items()))
        return {name: parameter.data for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a worker has set up before it loads its model."""
    store = tmp_path_factory.mktemp("world") / "store"
    patch = pytest.MonkeyPatch()
    for name, value in {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1"}.items():
        patch.setenv(name, value)
    there = torch.distributed.is_initialized()  # by another file of tests of this process
    with vllm_config.set_current_vllm_config(vllm_config.VllmConfig()):
        if not there:
            vllm_state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        yield
        vllm_state.destroy_model_parallel()
        if there:
            vllm_state.initialize_model_parallel(1, 1)
        else:
            vllm_state.destroy_distributed_environment()
    patch.undo()


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest, world: None, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return Kind(request.param, tmp_path_factory.mktemp("checkpoint"))


every_kind = pytest.mark.parametrize("kind", KINDS, indirect=True, scope="module")


def sent_to(kind: Kind, source: Any, intake: Intake | None = None) -> Tensors:
    checker = Checker((intake or kind.intake()).weights, "float32", None)
    return {meta.name: tensor for meta, tensor in checker.check_source(source)}


@every_kind
def test_a_trainers_model_is_all_that_the_engines_model_takes(kind: Kind) -> None:
    intake = kind.intake()
    optional = set(intake.known) - set(intake.required)
    assert set(intake.known) == set(kind.files)
    assert bool(optional) == bool(kind.optional)
    assert all(kind.optional in name for name in optional)
    assert len(intake.required) == len(kind.as_saved)
    wanted = kind.loaded(kind.files)
    state = kind.trainer.state_dict()
    for source in (kind.trainer, state, state.items(), iter(kind.as_saved.items()), kind.files):
        given = sent_to(kind, source, intake)
        assert set(given) == set(intake.required)
        found = kind.loaded(given)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@every_kind
def test_a_tensor_that_the_model_needs_is_missed_by_name(kind: Kind) -> None:
    intake = kind.intake()
    for name in itertools.islice(intake.required, 0, None, 7):
        fewer = {one: tensor for one, tensor in kind.files.items() if one != name}
        with pytest.raises(InvalidWeights, match=f"1 of {len(intake.required)} tensors are missing: {name}"):
            sent_to(kind, fewer, intake)
        assert missing_reason(fewer, intake.required), "and the worker says so as well"


@every_kind
def test_an_engine_without_files_knows_what_it_takes(kind: Kind, tmp_path: Path) -> None:
    intake = kind.intake(tmp_path)
    assert set(intake.required) == set(kind.as_saved), "under the names that the trainer saves"
    assert {one.dtype for one in intake.known.values()} == {"float32"}
    given = sent_to(kind, kind.trainer, intake)
    found, wanted = kind.loaded(given), kind.loaded(kind.files)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(InvalidWeights, match=r"1 of \d+ tensors are missing"):
        sent_to(kind, dict(list(kind.as_saved.items())[1:]), intake)


@every_kind
def test_a_model_whose_loaders_cannot_be_asked_requires_what_its_files_hold(kind: Kind, tmp_path: Path) -> None:
    intake = Intake.of((str(kind.folder), None), kind.config.model_config, None)
    assert set(intake.required) == set(kind.files)
    unknown = Intake.of((str(tmp_path), None), kind.config.model_config, None)
    assert not unknown.known
    assert "holds no *.safetensors file" in unknown.weights.error


@pytest.mark.parametrize("kind", ["tied, head saved"], indirect=True)
@pytest.mark.parametrize("make", [dict, iter, list], ids=["mapping", "iterator", "list"])
def test_a_tie_that_the_trainer_broke_is_refused(kind: Kind, make: Any) -> None:
    pairs = list((kind.files | {"lm_head.weight": kind.files["lm_head.weight"] + 1}).items())
    intake = kind.intake()
    for order in (pairs, pairs[::-1]):
        with pytest.raises(InvalidWeights, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            sent_to(kind, make(order), intake)
    assert intake.broken_tie({"lm_head.weight": 1, "model.embed_tokens.weight": 2})
    assert intake.broken_tie({"lm_head.weight": 2, "model.embed_tokens.weight": 2}) is None
    assert intake.broken_tie({"model.embed_tokens.weight": 2}) is None


@pytest.mark.parametrize("kind", ["gpt2", "opt"], indirect=True)
def test_names_mean_the_same_with_and_without_their_prefix(kind: Kind, tmp_path: Path) -> None:
    of_hub = kind.intake()
    assert {of_hub.find(name) for name in kind.as_saved} == set(of_hub.required)
    of_trainer = kind.intake(tmp_path)
    assert {of_trainer.find(name) for name in of_hub.required} == set(kind.as_saved)
    assert of_hub.find("nothing") == "nothing"


class Loaded(torch.nn.Module):
    """Loaders of other kinds than vLLM's usual ones."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"stacked": (2, 3), "plain": (4,), "scale": (1,), "assigned": (5,)}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, device="meta"), requires_grad=False))
        self.kept: list[torch.Tensor] = []

    def load_weights(self, pairs: Any) -> None:
        weights = dict(pairs)  # collected first, so that the last name is not the one that is loaded
        if "a" in weights:
            self.stacked.data.copy_(torch.stack([weights["a"].float() * 2, weights["b"].t().contiguous().view(3)]))
        for name in ("plain", "assigned"):
            if name in weights:
                self.get_parameter(name).data.copy_(weights[name])
        if "scale" in weights:
            self.scale.data.fill_(weights["scale"].item())
        if "held" in weights:
            self.kept.append(weights["held"])


def test_a_tensor_is_followed_to_where_it_is_written() -> None:
    shapes = {"a": (3,), "b": (3, 1), "plain": (4,), "scale": (1,), "held": (2,), "ignored": (6,)}
    places = places_of(Loaded(), [TensorMeta(name, "bfloat16", shape) for name, shape in shapes.items()])
    targets = {name: {place.target for place in found} for name, found in places.items()}
    assert targets == {
        "a": {"stacked"},
        "b": {"stacked"},
        "plain": {"plain"},
        "scale": {"value"},
        "held": {"kept"},
        "ignored": set(),
    }


def test_a_tensor_is_ignored_if_every_worker_ignores_it() -> None:
    known = tuple(TensorMeta(name, "float32", (2,)) for name in ("expert.0", "expert.1", "draft", "embed", "head"))
    first = Weights(known, optional=("expert.1", "draft", "head"), ties={"head": "embed"}, prefixes=("model.", "x."))
    second = Weights(known, optional=("expert.0", "draft"), prefixes=("model.",))
    whole = together([first, second])
    assert [one.name for one in whole.required] == ["expert.0", "expert.1", "embed", "head"], (
        "the second needs its head"
    )
    assert whole.ties == {}
    assert whole.prefixes == ("model.",)
    assert together([first]) == first
    assert together([first, Weights((), error="not known")]) == Weights((), error="not known")
    assert Intake(first).required.keys() == {"expert.0", "embed"}, "and each worker misses what it needs itself"


def test_what_the_engines_ignore_is_left_out() -> None:
    known = {"a": torch.zeros(2), "draft": torch.zeros(3)}
    taken = takes(metas(known), optional=("draft",))
    for source in (
        known,
        iter(known.items()),
        {"a": known["a"]},
        {"module.a": known["a"], "module.draft": known["draft"]},
    ):
        assert [meta.name for meta, _ in Checker(taken, "float32", None).check_source(source)] == ["a"]
    assert set(sent(known, metas(known))) == {"a", "draft"}


def test_a_checkpoint_directory_is_taken_under_the_engines_names(
    served: Served,  # noqa: F811
    group: EngineGroup,  # noqa: F811
    tmp_path: Path,
) -> None:
    wanted = weights(1)
    known = [*metas(wanted), TensorMeta("draft", "float32", (3,))]
    taken = takes(known, optional=("draft",), ties={"head": "embed"}, prefixes=("model.",))
    for receiver in itertools.chain.from_iterable(served.receivers.values()):
        receiver.context.intake = Intake(taken)
    on_disk = {f"model.{name}": tensor for name, tensor in wanted.items()}
    extra = {"head": wanted["embed"].clone(), "model.layer.0.rotary_emb.inv_freq": torch.ones(2)}
    for number, more in enumerate([{}, {"draft": torch.ones(3)}, extra]):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(on_disk | more, folder / "model.safetensors")
        send(group, folder, version=number)
        assert served.serves(wanted | ({"draft": torch.ones(3)} if "draft" in more else {}))
    served.weights.clear()
    for name, tensors, reason in (
        ("broken tie", on_disk | {"head": wanted["embed"] + 1}, "head differs from embed"),
        (
            "missing",
            {name: one for name, one in on_disk.items() if "norm" not in name},
            "1 of 5 tensors are missing: norm",
        ),
        ("unknown", on_disk | {"v_head.weight": torch.ones(1)}, "v_head.weight is not a weight"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UpdateAborted, match=reason):
            send(group, folder, version=9)
        assert served.weights == {}


class RealWorker:
    """What a loader asks of vLLM's worker, with a model that vLLM has loaded and packed."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "max_model_len": 32}
        self.vllm_config = vllm_args.EngineArgs(model=str(folder), **arguments).create_engine_config()
        self.rank, self.device, self.model_runner = 0, torch.device("cpu"), SimpleNamespace()
        with vllm_config.set_current_vllm_config(self.vllm_config):
            self.model = vllm_loader.get_model(vllm_config=self.vllm_config)
        assert kind

    def get_model(self) -> Any:
        return self.model

    def reload_weights(self, weights_iterator: Any) -> None:
        reload_weights(self.vllm_config, self.model, weights_iterator)

    def digests(self) -> dict[str, int]:
        return digests_of_model(self.model) | packed_digests(self.model)


@every_kind
def test_an_update_of_what_is_taken_gives_what_a_fresh_engine_of_the_trainers_checkpoint_has(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # as vLLM's worker for CPUs does
    repack_cpu_experts_on_reload()
    trainer = copy.deepcopy(kind.trainer)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    trainer.save_pretrained(tmp_path)
    for source in (trainer, trainer.state_dict()):
        updated = RealWorker(kind, kind.folder)
        before = updated.digests()
        Loader(updated).load(list(sent_to(kind, source).items()))
        fresh = RealWorker(kind, tmp_path).digests()
        assert updated.digests() == fresh
        assert before != fresh
