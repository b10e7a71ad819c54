"""What a trainer hands over: checked by name, shape, dtype and value, and named as checkpoints name it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lazily import Lazily
from torch._subclasses import FakeTensorMode

from areal_vllm_ext import InvalidWeights
from areal_vllm_ext.client.weights import Checker, named_weights
from areal_vllm_ext.integrity import checkpoint
from areal_vllm_ext.protocol import TensorMeta, Weights
from areal_vllm_ext.transport.buckets import Bucket

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen3ForCausalLM, Qwen3MoeForCausalLM

transformers = Lazily("transformers")

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def dense(**options: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model: Qwen3ForCausalLM = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(SMALL | options)))
    return model


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    )
    model: Qwen3MoeForCausalLM = transformers.Qwen3MoeForCausalLM(config)
    return model


def saved(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """What ``save_pretrained`` writes."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return {
        name: tensor for file in checkpoint.names_of_files(folder) for name, tensor in load_file(folder / file).items()
    }


def metas(tensors: dict[str, torch.Tensor]) -> list[TensorMeta]:
    return [TensorMeta(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]


def takes(expected: Iterable[TensorMeta], **more: Any) -> Weights:
    """What engines say of a model that takes ``expected``."""
    return Weights(tensors=tuple(expected), **more)


def sent(
    source: Any, expected: Iterable[TensorMeta], engine_dtype: str = "float32", cast: str | None = None
) -> dict[str, torch.Tensor]:
    """What would go to the engines."""
    checker = Checker(takes(expected), engine_dtype, cast)
    return {meta.name: tensor for meta, tensor in checker.check_source(source)}


PLAIN = {"a": torch.randn(2, 3), "b": torch.randn(4), "count": torch.tensor(3)}

# Sources


def test_a_state_dict_and_an_iterable_are_sent_as_they_are() -> None:
    for source in (PLAIN, list(PLAIN.items()), iter(PLAIN.items())):
        out = sent(source, metas(PLAIN))
        assert list(out) == list(PLAIN)
        assert all(torch.equal(out[name], PLAIN[name]) for name in PLAIN)


def test_an_iterable_is_walked_one_tensor_at_a_time() -> None:
    made: list[str] = []

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in PLAIN.items():
            made.append(name)
            yield name, tensor

    walk = Checker(takes(metas(PLAIN)), "float32", None).check(named_weights(gather()))
    next(walk)
    assert made == ["a"], "a sharded trainer gathers one tensor at a time"


def test_a_module_of_any_kind_is_sent_under_its_own_names() -> None:
    module = torch.nn.Linear(3, 2)
    out = sent(module, metas(module.state_dict()))
    assert set(out) == {"weight", "bias"}
    assert not any(tensor.requires_grad for tensor in out.values())


@pytest.mark.parametrize(
    "make", [dense, mixture, lambda: dense(tie_word_embeddings=True)], ids=["dense", "moe", "tied"]
)
def test_a_hugging_face_model_is_sent_as_it_would_be_saved(make: Any, tmp_path: Path) -> None:
    model = make()
    files = saved(model, tmp_path)
    out = sent(model, checkpoint.describe(str(tmp_path)))
    assert set(out) == set(files)
    assert all(torch.equal(out[name], files[name]) for name in files)


def test_the_experts_of_a_mixture_are_sent_one_by_one(tmp_path: Path) -> None:
    out = sent(mixture(), metas(saved(mixture(), tmp_path)))
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in out
    assert not any("experts.gate_up_proj" in name for name in out)


# Ties


def test_a_tied_lm_head_is_left_out(tmp_path: Path) -> None:
    model = dense(tie_word_embeddings=True)
    files = saved(model, tmp_path)
    assert "lm_head.weight" in model.state_dict()
    assert "lm_head.weight" not in files
    for source in (model, model.state_dict(), list(model.state_dict().items())):
        assert "lm_head.weight" not in sent(source, metas(files))


@pytest.mark.parametrize("copy", [lambda one: one.clone(), lambda one: one.bfloat16().float()], ids=["clone", "cast"])
def test_a_copy_of_a_tied_weight_is_left_out(copy: Any, tmp_path: Path) -> None:
    model = dense(tie_word_embeddings=True)
    files = saved(model, tmp_path)
    state = {name: copy(tensor) for name, tensor in model.state_dict().items()}
    for source in (state, list(state.items())):
        assert set(sent(source, metas(files))) == set(files)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("0.c", r"the checkpoint calls it layer\.0\.c: add the prefix"),
        ("model.a", "the checkpoint calls it a: remove the prefix"),
        ("head", "if it is tied to a, leave it out"),
    ],
)
def test_a_name_that_is_none_gets_a_hint_that_fits(name: str, hint: str) -> None:
    known = PLAIN | {"layer.0.c": torch.zeros(7)}
    given = {"head": PLAIN["a"] + 1} if name == "head" else {name: torch.zeros(9)}
    with pytest.raises(InvalidWeights, match=f"is not a weight.*{hint}"):
        sent(known | given, metas(known))


def test_a_broken_tie_is_refused(tmp_path: Path) -> None:
    model = dense(tie_word_embeddings=True)
    files = saved(model, tmp_path)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 1)
    for source in (model, model.state_dict()):
        with pytest.raises(InvalidWeights, match=r"lm_head\.weight is not a weight.*tied"):
            sent(source, metas(files))


def test_a_broken_tie_is_refused_in_an_iterable_that_frees_its_tensors(tmp_path: Path) -> None:
    model = dense(tie_word_embeddings=True)
    files = saved(model, tmp_path)
    state = model.state_dict() | {"lm_head.weight": model.lm_head.weight.detach() + 1}
    # As an allocator does that hands the memory of a freed tensor to the next of its size.
    memory: dict[torch.Size, torch.Tensor] = {}

    def gather() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in state.items():
            yield name, memory.setdefault(tensor.shape, torch.empty_like(tensor)).copy_(tensor)

    with pytest.raises(InvalidWeights, match="lm_head"):
        sent(gather(), metas(files))


@pytest.fixture
def one_rank_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("tied", [True, False])
def test_a_sharded_model_is_gathered(tied: bool, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = dense(tie_word_embeddings=tied)
    files = saved(model, tmp_path)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert all(isinstance(tensor, DTensor) for tensor in model.state_dict().values())
    out = sent(model, metas(files))
    assert set(out) == set(files)
    assert not any(isinstance(tensor, DTensor) for tensor in out.values())
    assert all(torch.equal(out[name], files[name]) for name in files)


# Refusals


def wrong(**changes: Any) -> list[tuple[str, torch.Tensor]]:
    return list((PLAIN | changes).items())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (wrong(c=torch.zeros(1)), "c is not a weight of the engines' checkpoint"),
        (wrong(a=torch.zeros(3, 2)), r"a has shape \[3, 2\], the engines' checkpoint \[2, 3\]"),
        (wrong(b=torch.zeros(4, dtype=torch.float16)), "b has dtype float16.*send with dtype='auto'"),
        (wrong(b=torch.zeros(4, dtype=torch.int32)), "b has dtype int32.*send it as float32"),
        (list(PLAIN.items())[:2], "1 of 3 tensors are missing: count"),
        ([*PLAIN.items(), ("a", PLAIN["a"])], "a is there twice"),
        ([], "there was no tensor to send"),
    ],
    ids=["unknown", "shape", "dtype", "integers", "missing", "twice", "nothing"],
)
def test_what_does_not_fit_is_refused_by_name(source: list[tuple[str, torch.Tensor]], message: str) -> None:
    with pytest.raises(InvalidWeights, match=message):
        sent(source, metas(PLAIN))
    with pytest.raises(InvalidWeights, match=message):
        Checker(takes(metas(PLAIN)), "float32", None).check_ahead(source)


# Made in the test: a FakeTensorMode imports torch._dynamo, 1.1 s of CPU for each process that collects the tests.
NOT_TENSORS: dict[str, tuple[Callable[[], Any], str]] = {
    "extra state": (
        lambda: {"layer._extra_state": io.BytesIO()},
        r"layer\._extra_state is BytesIO, not a tensor: leave it out",
    ),
    "none": (lambda: {"a": None}, "a is None, not a tensor"),
    "nested": (lambda: {"model": PLAIN}, "model is a mapping, not a tensor: give the state dict inside it"),
    "numpy": (lambda: {"a": np.zeros(3)}, "a is ndarray, not a tensor"),
    "lazy": (lambda: {"a": torch.nn.LazyLinear(3).weight}, "a is not initialized, so it has no values"),
    "lazy module": (lambda: torch.nn.LazyLinear(3), "weight is not initialized, so it has no values"),
    "fake": (lambda: {"a": FakeTensorMode().from_tensor(torch.zeros(2, 3))}, "a is a FakeTensor, so it has no values"),
    "meta": (lambda: {"a": torch.zeros(2, 3, device="meta")}, "a is on the meta device, so it has no values"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "a is sparse"),
    "csr": (lambda: {"a": torch.eye(3).to_sparse_csr()}, "a is sparse"),
    "quantized": (
        lambda: {"a": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)},
        "a is nested or quantized",
    ),
    "a name that is none": (lambda: {0: torch.zeros(1)}, r"got \(int, Tensor\) where it needs \(name, tensor\)"),
    "parameters": (
        lambda: [torch.zeros(2)],
        r"got Tensor where it needs \(name, tensor\): give model\.named_parameters",
    ),
    "a tensor": (lambda: torch.zeros(2), "got Tensor: give a module"),
    "a number": (lambda: 5, "got int: give a module"),
    "nothing": (lambda: None, "got None: give a module"),
}


@pytest.mark.parametrize("case", NOT_TENSORS)
def test_a_value_that_is_no_tensor_with_values_is_refused_by_name(case: str) -> None:
    make, message = NOT_TENSORS[case]
    source = make()
    for given in (source, iter(source.items())) if isinstance(source, dict) else (source,):
        with pytest.raises(InvalidWeights, match=message):
            sent(given, metas(PLAIN))


def test_the_extra_state_of_a_module_is_no_weight() -> None:
    class Extra(torch.nn.Linear):
        def get_extra_state(self) -> object:
            return io.BytesIO()

    module = Extra(3, 2)
    assert "_extra_state" in module.state_dict()
    assert set(sent(module, metas({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}))) == {"weight", "bias"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_number_is_refused_by_name(value: float, dtype: torch.dtype) -> None:
    good, bad = torch.zeros(300, dtype=dtype), torch.zeros(300, dtype=dtype)
    bad[217] = value
    tensors = {"good": good, "count": torch.tensor([1]), "bad": bad}
    with pytest.raises(InvalidWeights, match="bad holds NaN or infinite values"):
        packed(tensors).digests()
    assert len(packed({"good": good}).digests()) == 1


def test_values_of_integers_and_of_nothing_pass() -> None:
    assert len(packed({"empty": torch.zeros(0), "count": torch.tensor([1])}).digests()) == 2
    assert packed({}).digests() == []


def packed(tensors: dict[str, torch.Tensor]) -> Bucket:
    """A bucket of ``tensors``, as the trainer fills it."""
    bucket = Bucket(torch.empty(1 << 16, dtype=torch.uint8))
    for meta, tensor in zip(metas(tensors), tensors.values(), strict=True):
        bucket.add(meta, tensor)
    return bucket


def test_checking_ahead_leaves_no_state_behind() -> None:
    checker = Checker(takes(metas(PLAIN)), "float32", None)
    checker.check_ahead(list(PLAIN.items()))
    assert [meta.name for meta, _ in checker.check(PLAIN.items())] == list(PLAIN)


def test_names_are_not_checked_if_the_checkpoint_is_unknown() -> None:
    assert list(sent({"anything": torch.zeros(1)}, ())) == ["anything"]
    with pytest.raises(InvalidWeights, match="twice"):
        sent([("a", torch.zeros(1)), ("a", torch.zeros(1))], ())


# Dtypes


def test_floating_point_is_cast_and_nothing_else() -> None:
    expected = [
        TensorMeta("a", "bfloat16", (2, 3)),
        TensorMeta("b", "bfloat16", (4,)),
        TensorMeta("count", "int64", ()),
    ]
    out = sent(PLAIN, expected, "bfloat16", cast="bfloat16")
    assert {name: tensor.dtype for name, tensor in out.items()} == {
        "a": torch.bfloat16,
        "b": torch.bfloat16,
        "count": torch.int64,
    }
    assert torch.equal(out["a"], PLAIN["a"].to(torch.bfloat16))


HALF = [TensorMeta(m.name, "bfloat16" if m.dtype == "float32" else m.dtype, m.shape) for m in metas(PLAIN)]
# A router's bias is kept in float32, because rounding it chooses other experts.
MIXED = [TensorMeta("a", "bfloat16", (2, 3)), TensorMeta("b", "float32", (4,)), TensorMeta("count", "int64", ())]


def test_the_dtype_that_the_engines_compute_in_is_accepted() -> None:
    assert sent(PLAIN, HALF, engine_dtype="float32")["a"].dtype == torch.float32


def test_a_tensor_that_is_wider_than_in_the_checkpoint_is_cast_by_default() -> None:
    out = sent({name: one.double() if name == "b" else one for name, one in PLAIN.items()}, MIXED, "bfloat16")
    assert {name: one.dtype for name, one in out.items()} == {
        "a": torch.bfloat16,
        "b": torch.float32,
        "count": torch.int64,
    }
    assert torch.equal(out["a"], PLAIN["a"].bfloat16())
    assert torch.equal(out["b"], PLAIN["b"])


@pytest.mark.parametrize("trainer", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_auto_casts_each_tensor_to_its_own_dtype_in_the_checkpoint(trainer: torch.dtype) -> None:
    source = PLAIN | {name: PLAIN[name].to(trainer) for name in "ab"}
    out = sent(source, MIXED, "bfloat16", cast="auto")
    assert torch.equal(out["a"], source["a"].bfloat16())
    assert torch.equal(out["b"], source["b"].float())
    assert out["a"].dtype == torch.bfloat16
    assert out["b"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_cast_never_rounds_what_the_checkpoint_keeps_wider(dtype: Any) -> None:
    for source in (PLAIN, PLAIN | {"b": PLAIN["b"].double()}):
        out = sent(source, MIXED, "bfloat16", cast=dtype)
        assert out["a"].dtype == torch.bfloat16
        assert out["b"].dtype == torch.float32
        assert torch.equal(out["b"], PLAIN["b"])


@pytest.mark.parametrize("kept", ["int8", "float8_e4m3fn", "uint8"])
@pytest.mark.parametrize("dtype", [None, "auto", "bfloat16"])
def test_the_engines_dtype_is_no_quantized_tensors_dtype(kept: str, dtype: str | None) -> None:
    expected = [TensorMeta("a", kept, (2, 3)), *MIXED[1:]]
    with pytest.raises(
        InvalidWeights, match=f"a has dtype bfloat16, the engines' checkpoint {kept}: send it as {kept}"
    ):
        sent(PLAIN | {"a": PLAIN["a"].bfloat16()}, expected, "bfloat16", cast=dtype)


@pytest.mark.parametrize("dtype", ["fp32", "int32", torch.int64, "float8_e4m3fn", ""])
def test_a_dtype_that_is_none_is_named(dtype: Any) -> None:
    with pytest.raises(
        ValueError, match="dtype must be one of 'auto', 'float64', 'float32', 'bfloat16', 'float16', not"
    ):
        Checker(takes(MIXED), "bfloat16", dtype)
    with pytest.raises(TypeError, match=r"dtype must be .auto., a string"):
        Checker(takes(MIXED), "bfloat16", 16)  # type: ignore[arg-type]


def test_a_tied_weight_that_is_cast_stays_tied(tmp_path: Path) -> None:
    model = dense(tie_word_embeddings=True)
    files = {name: tensor.to(torch.bfloat16) for name, tensor in saved(model, tmp_path).items()}
    out = sent(model.state_dict(), metas(files), "bfloat16", cast="bfloat16")
    assert set(out) == set(files)


def test_checking_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sent(mixture(), metas(saved(mixture(), tmp_path)))
