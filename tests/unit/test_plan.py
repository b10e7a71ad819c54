"""Load plans, recorded on vLLM's own layerwise reload of models with loaders of vLLM's kinds, and replayed on other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lazily import Lazily

from areal_vllm_ext.integrity import digest
from areal_vllm_ext.worker.load.loader import Loader
from areal_vllm_ext.worker.load.plan import LoadPlan, PlanRun
from areal_vllm_ext.worker.load.proof import readable
from areal_vllm_ext.worker.load.recorder import Recorder
from areal_vllm_ext.worker.load.targets import NotPlanned
from areal_vllm_ext.worker.load.written import wrong_in

vllm_reload = Lazily("vllm.model_executor.model_loader.reload")

Weights = dict[str, torch.Tensor]
TP_SIZE, TP_RANK = 2, 1
HIDDEN, HEADS, FFN, EXPERTS, VOCABULARY = 8, 6, 10, 4, 7


class Layer(torch.nn.Module):
    """One parameter, and how each incoming tensor gets into it."""

    def __init__(
        self, *shape: int, loaders: dict[str, Callable[..., None]], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.weight.weight_loader = lambda param, loaded, name: loaders[name](param, loaded)
        self.names = list(loaders)


def whole(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)


def rows(start: int, size: int, rank: int = TP_RANK) -> Callable[..., None]:
    """This rank's rows of a fused projection."""

    def load(param: torch.Tensor, loaded: torch.Tensor) -> None:
        param.data.narrow(0, start, size).copy_(loaded.narrow(0, rank * size, size))

    return load


def columns(param: torch.Tensor, loaded: torch.Tensor) -> None:
    size = param.shape[1]
    param.data.copy_(loaded.narrow(1, TP_RANK * size, size))


def expert(place: int, start: int, size: int) -> Callable[..., None]:
    def load(param: torch.Tensor, loaded: torch.Tensor) -> None:
        param.data[place].narrow(0, start, size).copy_(loaded)

    return load


def vocabulary(param: torch.Tensor, loaded: torch.Tensor) -> None:
    """Padded with zeros, as vLLM's ``VocabParallelEmbedding``."""
    param[: loaded.shape[0]].data.copy_(loaded)
    param[loaded.shape[0] :].data.fill_(0)


class Model(torch.nn.Module):
    """What a rank of a TP=2, EP=2 deployment has: padded, fused, sliced both ways, some experts, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Layer(VOCABULARY + 3, HIDDEN, loaders={"embed": vocabulary})
        self.qkv = Layer(3 * HEADS, HIDDEN, loaders={one: rows(i * HEADS, HEADS) for i, one in enumerate("qkv")})
        self.down = Layer(HIDDEN, FFN, loaders={"down": columns})
        local = {
            f"expert{i}.{w}": expert(i, j * FFN, FFN) for i in range(EXPERTS // 2) for j, w in enumerate(("gate", "up"))
        }
        self.experts = Layer(EXPERTS // 2, 2 * FFN, HIDDEN, loaders=local)
        self.norm = Layer(HIDDEN, loaders={"norm": whole})
        self.head = torch.nn.Module()
        self.head.weight = self.embed.weight
        self.register_buffer("rope", torch.arange(5.0), persistent=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        layers = {name: layer for layer in self.children() for name in getattr(layer, "names", ())}
        for name, tensor in weights:
            if name in layers:  # not another rank's experts
                parameter = layers[name].weight
                parameter.weight_loader(parameter, tensor, name)


def of(**layers: torch.nn.Module) -> torch.nn.Module:
    """A model of a few layers."""

    class Small(torch.nn.Module):
        load_weights = Model.load_weights

    model = Small()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def made(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    model = build()
    vllm_reload.record_metadata_for_reloading(model)
    for layer in model.children():
        if hasattr(layer, "weight"):
            layer.weight.data.normal_()
    return model


SHAPES = {
    "embed": (VOCABULARY, HIDDEN),
    **dict.fromkeys("qkv", (TP_SIZE * HEADS, HIDDEN)),
    "down": (HIDDEN, TP_SIZE * FFN),
    **{f"expert{i}.{w}": (FFN, HIDDEN) for i in range(EXPERTS) for w in ("gate", "up")},
    "norm": (HIDDEN,),
}


def staged(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    """Random tensors, all views of one bucket."""
    generator = torch.Generator().manual_seed(seed)
    bucket = torch.zeros(1 << 16, dtype=torch.uint8)
    tensors, end = {}, 0
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator).to(dtype)
        tensors[name] = bucket[end : end + value.nbytes].view(dtype).view(shape).copy_(value)
        end += -(-value.nbytes // 256) * 256
    return tensors


def load(model: Any, weights: Weights) -> None:
    vllm_reload.initialize_layerwise_reload(model)
    model.load_weights(weights.items())
    vllm_reload.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def fresh(build: Callable[[], torch.nn.Module], weights: Weights) -> torch.nn.Module:
    """What a layerwise load makes of a model."""
    model = made(build)
    load(model, weights)
    return model


def recorded(model: torch.nn.Module, weights: Weights) -> LoadPlan:
    with Recorder(model, readable(model), weights) as recorder:
        load(model, weights)
    return recorder.plan()


def digests_of(weights: Weights) -> dict[str, int]:
    return dict(zip(weights, digest.digests_of(weights.values()), strict=True))


def copied(plan: LoadPlan, weights: Weights) -> None:
    bound = PlanRun(plan)
    bound.add(plan.copies_of(weights), digests_of(weights))
    assert bound.complete
    bound.copy()
    assert wrong_in(bound.written) == []


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    one, two = readable(model), readable(other)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_plan_gives_what_a_layerwise_load_gives() -> None:
    model = made(Model)
    addresses = {name: tensor.data_ptr() for name, tensor in readable(model).items()}
    plan = recorded(model, staged(SHAPES, 1))
    assert plan.nbytes == 4 * (
        VOCABULARY * HIDDEN + 3 * HEADS * HIDDEN + HIDDEN * FFN + EXPERTS * FFN * HIDDEN + HIDDEN
    )
    for seed in (2, 3):
        weights = staged(SHAPES, seed)
        twin = fresh(Model, weights)
        assert not same(model, twin)
        copied(plan, weights)
        assert same(model, twin)
    assert plan.whole.keys() == {"norm", "embed"} | {f"expert{i}.{w}" for i in (0, 1) for w in ("gate", "up")}
    assert all(torch.equal(run, weights[name].view(-1)) for name, (run,) in plan.whole.items())
    assert plan.fits(model)
    assert {name: tensor.data_ptr() for name, tensor in readable(model).items()} == addresses


def test_parts_are_kept_without_the_tensors_that_they_are_of() -> None:
    model = made(Model)
    plan = recorded(model, staged(SHAPES, 1))
    assert plan.of_a_shard
    weights = staged(SHAPES, 2)
    twin = fresh(Model, weights)
    taken: list[torch.Tensor] = []

    def memory(nbytes: int) -> torch.Tensor:
        taken.append(torch.empty(nbytes, dtype=torch.uint8))
        return taken[-1]

    bound = PlanRun(plan)
    for names in (
        ("q", "k", "v"),
        ("expert2.gate", "expert3.up"),
        tuple(weights.keys() - {"q", "k", "v", "expert2.gate", "expert3.up"}),
    ):
        together = plan.copies_of({name: weights[name] for name in names})
        assert together
        bound.add(together.moved(memory), digests_of(weights))
        for name in names:
            weights[name].fill_(7)  # its memory has another use by now
    assert bound.complete
    bound.copy()
    assert same(model, twin)
    assert wrong_in(bound.written) == []
    model.down.weight.data[3, 4] += 1
    assert wrong_in(bound.written) == ["down"]
    assert taken[1].numel() == 0, "another rank's experts"
    assert sum(one.numel() for one in taken) == plan.slices_nbytes
    all_of_it = made(lambda: of(layer=Layer(4, 4, loaders={"w": whole})))
    assert not recorded(all_of_it, staged({"w": (4, 4)}, 1)).of_a_shard


@pytest.mark.parametrize(
    "turned",
    [
        lambda param, loaded: param.data.copy_(loaded.transpose(0, 1)),
        lambda param, loaded: param.data.transpose(0, 1).copy_(loaded),
    ],
    ids=["source", "target"],
)
def test_what_runs_across_its_target_is_turned_round_before_the_commit(turned: Callable[..., None]) -> None:
    def build() -> torch.nn.Module:
        loaders = {"turned": turned}
        return of(turned=Layer(HIDDEN, FFN, loaders=loaders), plain=Layer(FFN, HIDDEN, loaders={"plain": whole}))

    shapes = {"turned": (FFN, HIDDEN), "plain": (FFN, HIDDEN)}
    model = made(build)
    plan = recorded(model, staged(shapes, 1))
    weights = staged(shapes, 2)
    twin = fresh(build, weights)
    batch = plan.copies_of(weights)
    assert batch
    assert [source.data_ptr() for _, source in batch.across] == [weights["turned"].data_ptr()]
    moved = batch.moved(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8), across=True)
    assert moved.across == []
    assert all(target.stride() == source.stride() for target, source in moved.pairs)
    bound = PlanRun(plan)
    bound.add(moved, digests_of(weights))
    weights["turned"].fill_(7)  # the commit does not read it
    bound.copy()
    assert same(model, twin)
    assert wrong_in(bound.written) == []
    model.turned.weight.data[3, 4] += 1
    assert wrong_in(bound.written) == ["turned"]


def test_every_written_element_of_live_memory_can_be_compared() -> None:
    model = made(Model)
    plan = recorded(model, staged(SHAPES, 1))
    weights = staged(SHAPES, 2)
    bound = PlanRun(plan)
    bound.add(plan.copies_of(weights), digests_of(weights))
    bound.copy()
    assert bound.written.keys() == weights.keys()
    for layer in (model.embed, model.qkv, model.down, model.experts, model.norm):
        flat = layer.weight.data.view(-1)
        for place in range(flat.numel()):
            before = float(flat[place])
            flat[place] += 1
            padding = layer is model.embed and place >= VOCABULARY * HIDDEN
            assert len(wrong_in(bound.written)) == (0 if padding else 1)
            flat[place] = before
    assert wrong_in(bound.written) == []


def test_a_plan_is_for_the_tensors_that_it_was_recorded_on() -> None:
    model = made(Model)
    plan = recorded(model, staged(SHAPES, 1))
    weights = staged(SHAPES, 2)
    bound = PlanRun(plan)
    for name, tensor in weights.items():
        assert not bound.complete
        bound.add(plan.copies_of({name: tensor}))
    assert bound.complete
    for wrong in ({"new": weights["norm"]}, {"norm": weights["norm"].double()}, {"norm": weights["norm"][:-1]}):
        bound = PlanRun(plan)
        bound.add(plan.copies_of(weights | wrong))
        assert not bound.complete
    bound = PlanRun(plan)
    for _ in range(2):
        bound.add(plan.copies_of(weights))
    assert not bound.complete, "they came twice"
    assert not plan.fits(made(Model))
    moved = model.norm.weight.data
    model.norm.weight.data = torch.zeros(HIDDEN)
    assert not plan.fits(model)
    model.norm.weight.data = moved
    assert plan.fits(model)
    model.norm.register_buffer("more", torch.zeros(1))
    assert not plan.fits(model), "a tensor more"
    del model.norm.more
    assert plan.fits(model)
    model.norm = copy.copy(model.norm)
    assert not plan.fits(model), "another module, with the same tensors for now"


def transposed(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded.t())


def cloned_first(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded.t().contiguous())


def filled_first(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.zero_()
    param.data.copy_(loaded)


def assigned(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data[...] = loaded


def row_by_row(param: torch.Tensor, loaded: torch.Tensor) -> None:
    for place, row in enumerate(loaded.unbind()):
        param.data[place] = row


def broadcast(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded[:1].expand(4, 4))


MOVERS = [whole, transposed, cloned_first, filled_first, assigned, row_by_row, broadcast]


@pytest.mark.parametrize(
    ("loader", "dtype"),
    [*((one, torch.float32) for one in MOVERS), (whole, torch.bfloat16), (row_by_row, torch.bfloat16)],
)
def test_loaders_that_only_move_and_cast_are_planned_right(loader: Callable[..., None], dtype: torch.dtype) -> None:
    def build() -> torch.nn.Module:
        return of(layer=Layer(4, 4, loaders={"w": loader}, dtype=dtype))

    model = made(build)
    plan = recorded(model, staged({"w": (4, 4)}, 1))
    weights = staged({"w": (4, 4)}, 2)
    copied(plan, weights)
    assert same(model, fresh(build, weights))


class Biased(torch.nn.Module):
    """A fused projection with a bias, as of Qwen2. vLLM's reload leaves a parameter of this name where it is."""

    def __init__(self, between: Callable[[torch.Tensor, str], None] | None = None) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3 * HEADS), requires_grad=False)
        loaders = {one: rows(i * HEADS, HEADS) for i, one in enumerate("qkv")}

        def load(param: torch.Tensor, loaded: torch.Tensor, name: str) -> None:
            loaders[name](param, loaded)
            if between:
                between(param, name)

        self.bias.weight_loader = load

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.bias.weight_loader(self.bias, tensor, name)


BIASES = dict.fromkeys("qkv", (TP_SIZE * HEADS,))


def test_a_bias_which_a_reload_writes_twice_is_planned() -> None:
    model = made(Biased)
    plan = recorded(model, staged(BIASES, 1))
    assert plan.nbytes == model.bias.nbytes, "each slice once"
    weights = staged(BIASES, 2)
    copied(plan, weights)
    assert same(model, fresh(Biased, weights))


def test_a_bias_with_another_write_between_two_equal_ones_is_not_planned() -> None:
    def over_the_first(param: torch.Tensor, name: str) -> None:
        if name == "v":
            param.data[:HEADS].copy_(param.data[-HEADS:])

    def zero_first(param: torch.Tensor, name: str) -> None:
        if name == "v":
            param.data[:HEADS].fill_(0)

    for between, reason in (
        (over_the_first, "the live bias is copied|q is loaded by way of another layout"),  # the second: torch 2.10
        (zero_first, "q is overwritten by a constant"),
    ):
        with pytest.raises(NotPlanned, match=reason):
            recorded(made(lambda between=between: Biased(between)), staged(BIASES, 1))


def plus_one(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded + 1)


def plus_one_afterwards(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)
    param.data.add_(1)


def by_value(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded if loaded[0, 0].item() > 0 else -loaded)


def half(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data[:2].copy_(loaded[:2])


def twice(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)
    param.data[0].copy_(loaded[1])


def cut_off(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)
    param.data[3].fill_(0)


def unseen(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)
    if not param.is_meta:
        param.data.numpy()[0] = 7


def from_elsewhere(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(torch.ones(4, 4))


kept: list[torch.Tensor] = []


def kept_aside(param: torch.Tensor, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)
    kept.append(loaded.clone())


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (plus_one, r"aten\.add\.Tensor computes with w"),
        (plus_one_afterwards, r"aten\.add_\.Tensor computes with w"),
        (by_value, r"_local_scalar_dense.* computes with w"),
        (half, "layer.weight is written in part only"),
        (twice, "layer.weight is written more than once"),
        (cut_off, "w is overwritten by a constant"),
        (unseen, "layer.weight is changed after it was loaded"),
        (from_elsewhere, "layer.weight is written from an unknown tensor"),
        (kept_aside, "the loaders keep a copy of w aside"),
    ],
)
def test_any_other_loader_is_refused_and_loads_all_the_same(loader: Callable[..., None], reason: str) -> None:
    def build() -> torch.nn.Module:
        return of(layer=Layer(4, 4, loaders={"w": loader}))

    model, weights = made(build), staged({"w": (4, 4)}, 1)
    twin = fresh(build, weights)
    kept.clear()
    try:
        with pytest.raises(NotPlanned, match=reason):
            recorded(model, weights)
    finally:
        kept.clear()
    assert loader is half or same(model, twin)  # what half does not write is anything


def processed(process: Callable[[Any], None]) -> Any:
    """What a layer's backend makes of the loaded weight, as one of vLLM's quantization methods."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    class Processed(QuantizeMethodBase):
        def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None: ...

        def apply(self, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise NotImplementedError

        def process_weights_after_loading(self, layer: Any) -> None:
            process(layer)

    return Processed()


def onto_itself(layer: Any) -> None:
    layer.weight.data.copy_(layer.weight.data)


def new_parameter_of_the_same(layer: Any) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.data.clone(), requires_grad=False)


def quantised(layer: Any) -> None:
    layer.weight.data.copy_(layer.weight.data.round())


def swapped(layer: Any) -> None:
    layer.weight.data.copy_(layer.weight.data.flip(0))


def packed_unseen(layer: Any) -> None:
    """As oneDNN: an operator that no mode sees took the bytes, and the parameter goes on as it is."""
    layer.handle = object()


def packed_away(layer: Any) -> None:
    layer.weight.data.numpy().sum()
    layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


def derived(layer: Any) -> None:
    layer.absorbed = layer.weight.data.t().contiguous()


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (onto_itself, ""),
        (new_parameter_of_the_same, ""),
        (quantised, r"aten\.round\.default computes with w"),
        (swapped, r"aten\.flip\.default computes with w"),
        (packed_unseen, "layer.handle is made anew with each load"),
        (packed_away, "w is loaded into memory that no live tensor shows"),
        (derived, "w is loaded by way of another layout"),
    ],
)
def test_what_a_backend_makes_of_weights_decides(process: Callable[[Any], None], reason: str) -> None:
    def build() -> torch.nn.Module:
        layer = Layer(4, 4, loaders={"w": whole})
        layer.quant_method = processed(process)
        return of(layer=layer)

    model = made(build)
    process(model.layer)  # as its first load did
    load(model, staged({"w": (4, 4)}, 0))
    weights = staged({"w": (4, 4)}, 1)
    if reason:
        with pytest.raises(NotPlanned, match=reason):
            recorded(model, weights)
    else:
        plan = recorded(model, weights)
        copied(plan, staged({"w": (4, 4)}, 2))
        assert torch.equal(model.layer.weight, staged({"w": (4, 4)}, 2)["w"])


class Worker:
    """What the loader needs of vLLM's worker."""

    def __init__(self, model: torch.nn.Module, *, eplb: bool = False) -> None:
        self.model, self.reloads, self.resets = model, 0, 0
        self.device = torch.device("cpu")
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(enable_eplb=eplb))
        self.model_runner = SimpleNamespace(reset_encoder_cache=self.reset)

    def reset(self) -> None:
        self.resets += 1

    def get_model(self) -> torch.nn.Module:
        return self.model

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.reloads += 1
        load(self.model, dict(weights_iterator))


def updated(loader: Loader, weights: Weights) -> None:
    bound = loader.begin_run()
    if bound:
        bound.add(bound.plan.copies_of(weights))
    loader.load(list(weights.items()), bound, planned=bound is not None and bound.complete and loader.fits(bound))


def test_the_loader_reloads_once_and_copies_from_then_on() -> None:
    worker = Worker(made(Model))
    loader = Loader(worker)
    for seed in range(4):
        updated(loader, staged(SHAPES, seed))
        assert same(worker.model, fresh(Model, staged(SHAPES, seed)))
    assert worker.reloads == 1
    assert worker.resets == 3, "what vLLM computed with the old weights must go"
    # Other dtypes, weights that moved: layerwise, and where it can be, planned anew.
    updated(loader, staged(SHAPES, 5, torch.bfloat16))
    assert worker.reloads == 2
    updated(loader, staged(SHAPES, 6, torch.bfloat16))
    assert worker.reloads == 2
    worker.model.norm.weight.data = torch.zeros(HIDDEN)
    updated(loader, staged(SHAPES, 7))
    assert worker.reloads == 3
    assert torch.equal(worker.model.norm.weight, staged(SHAPES, 7)["norm"])


def test_a_model_that_cannot_be_planned_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(made(lambda: of(layer=Layer(4, 4, loaders={"w": plus_one}))))
    loader = Loader(worker)
    recordings: list[int] = []
    record = loader._load_and_record
    monkeypatch.setattr(loader, "_load_and_record", lambda weights: (recordings.append(1), record(weights)))
    for seed in range(3):
        updated(loader, staged({"w": (4, 4)}, seed))
        assert loader.begin_run() is None
    assert recordings == [1]
    assert worker.reloads == 3
    assert torch.equal(worker.model.layer.weight, staged({"w": (4, 4)}, 2)["w"] + 1)


def test_experts_that_move_are_never_planned() -> None:
    loader = Loader(Worker(made(Model), eplb=True))
    updated(loader, staged(SHAPES, 1))
    assert loader.begin_run() is None
