"""Weights that vLLM packs on a CPU, planned: packed beside generation by vLLM's own function, committed by an assignment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lazily import Lazily
from test_plan import (
    FFN,
    HEADS,
    HIDDEN,
    TP_SIZE,
    VOCABULARY,
    Layer,
    Weights,
    Worker,
    columns,
    load,
    made,
    of,
    processed,
    rows,
    staged,
    updated,
    vocabulary,
    whole,
)

from areal_vllm_ext.worker.load import cpu_packing
from areal_vllm_ext.worker.load.loader import Loader, repack_tied_layers
from areal_vllm_ext.worker.load.plan import LoadPlan, PlanRun
from areal_vllm_ext.worker.load.proof import readable
from areal_vllm_ext.worker.load.recorder import Recorder, observe_packing
from areal_vllm_ext.worker.load.targets import NotPlanned

utils = Lazily("vllm.model_executor.layers.utils")

SHAPES = {
    "embed": (VOCABULARY, HIDDEN),
    **dict.fromkeys("qkv", (TP_SIZE * HEADS, HIDDEN)),
    "down": (HIDDEN, TP_SIZE * FFN),
    "out": (HIDDEN, HIDDEN),
    "norm": (HIDDEN,),
}
LINEARS = ("embed", "qkv", "down", "out")


def packs(*, remove_weight: bool) -> Any:
    """As vLLM's methods of linear layers (True), and of embeddings and heads (False)."""
    return processed(lambda layer: utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=remove_weight))


def build() -> torch.nn.Module:
    """A rank of two: padded and read elsewhere too, fused, sliced across, whole; and one that is not packed."""
    layers = {
        "embed": Layer(VOCABULARY + 3, HIDDEN, loaders={"embed": vocabulary}),
        "qkv": Layer(3 * HEADS, HIDDEN, loaders={one: rows(i * HEADS, HEADS) for i, one in enumerate("qkv")}),
        "down": Layer(HIDDEN, FFN, loaders={"down": columns}),
        "out": Layer(HIDDEN, HIDDEN, loaders={"out": whole}),
        "norm": Layer(HIDDEN, loaders={"norm": whole}),
    }
    for name in LINEARS:
        layers[name].quant_method = packs(remove_weight=name != "embed")
    return of(**layers)


def started() -> torch.nn.Module:
    """As after vLLM's own load: packed, so that the weights are empty."""
    model = made(build)
    for name in LINEARS:
        layer = model.get_submodule(name)
        layer.quant_method.process_weights_after_loading(layer)
    load(model, staged(SHAPES, 0))
    return model


def answers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What each packed layer computes of unit vectors: its weight."""
    width = {"embed": HIDDEN, "qkv": HIDDEN, "down": FFN, "out": HIDDEN}
    layers = {name: model.get_submodule(name) for name in LINEARS}
    return {name: one.cpu_linear(torch.eye(width[name]), one.weight, None) for name, one in layers.items()}


def equal(model: torch.nn.Module, weights: Weights) -> bool:
    """Whether it serves exactly what a fresh load of ``weights`` would."""
    twin = started()
    load(twin, weights)
    one, two = answers(model) | readable(model), answers(twin) | readable(twin)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def recorded(model: torch.nn.Module, weights: Weights) -> LoadPlan:
    recorder = Recorder(model, readable(model), weights)
    with recorder, observe_packing(recorder):
        load(model, weights)
    return recorder.plan()


def test_packed_weights_are_planned_and_give_what_a_fresh_load_gives() -> None:
    model = started()
    pack = utils.dispatch_cpu_unquantized_gemm
    plan = recorded(model, staged(SHAPES, 1))
    assert utils.dispatch_cpu_unquantized_gemm is pack, "vLLM's own again"
    assert equal(model, staged(SHAPES, 1))
    assert len(plan.packings) == len(LINEARS)
    for seed in (2, 3):
        weights = staged(SHAPES, seed)
        before = answers(model)
        bound = PlanRun(plan)
        for name, tensor in weights.items():  # a bucket each
            assert not bound.complete
            bound.add(plan.copies_of({name: tensor}))
            if name not in ("embed", "norm"):
                tensor.fill_(7)  # nothing is needed of it any more
        assert bound.complete
        assert all(torch.equal(one, before[name]) for name, one in answers(model).items()), "it serves the old ones"
        bound.copy()
        assert equal(model, staged(SHAPES, seed))
        assert plan.fits(model)


def test_only_parts_of_a_shard_are_kept_of_what_is_packed() -> None:
    model = started()
    plan = recorded(model, staged(SHAPES, 1))
    weights = staged(SHAPES, 2)
    bound = PlanRun(plan)
    taken: list[int] = []
    for name, tensor in weights.items():
        parts = plan.copies_of({name: tensor})
        assert parts
        bound.add(parts.moved(lambda nbytes: (taken.append(nbytes), torch.empty(nbytes, dtype=torch.uint8))[1]))
        tensor.fill_(7)
    bound.copy()
    assert equal(model, staged(SHAPES, 2))
    assert sum(taken) < plan.slices_nbytes, "packed weights are not staged beside"


def test_the_loader_packs_beside_generation_and_reloads_once() -> None:
    worker = Worker(started())
    loader = Loader(worker)
    packed_by: list[str] = []
    real = cpu_packing.pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "areal_vllm_ext.worker.load.plan.pack",
            lambda weight: (packed_by.append(threading.current_thread().name), real(weight))[1],
        )
        for seed in range(1, 4):
            weights = staged(SHAPES, seed)
            bound = loader.begin_run()
            if bound:
                intake = threading.Thread(target=lambda: bound.add(bound.plan.copies_of(weights)), name="intake")  # noqa: B023
                intake.start()
                intake.join()
            packed_by.clear() if seed == 1 else None
            loader.load(
                list(weights.items()), bound, planned=bound is not None and bound.complete and loader.fits(bound)
            )
            assert equal(worker.model, weights)
    assert worker.reloads == 1
    assert packed_by[-len(LINEARS) :] == ["intake"] * len(LINEARS)


def unseen(layer: Any) -> None:
    layer.weight.data.numpy()[0] = 7
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def of_something_else(layer: Any) -> None:
    layer.weight = torch.nn.Parameter(torch.ones(HIDDEN, HIDDEN), requires_grad=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def transposed(layer: Any) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.data.t(), requires_grad=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def half_of_it(layer: Any) -> None:
    layer.weight = torch.nn.Parameter(layer.weight.data[HIDDEN // 2 :], requires_grad=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)


def and_another_attribute(layer: Any) -> None:
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    layer.scale = object()


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (unseen, "out is changed before it is packed"),
        (of_something_else, "a weight is packed that was not seen to be loaded"),
        (transposed, "a weight is packed that was not seen to be loaded"),
        (half_of_it, "a weight is packed that was not seen to be loaded"),
        (and_another_attribute, "out.scale is made anew with each load"),
    ],
)
def test_what_is_packed_otherwise_is_refused(process: Callable[[Any], None], reason: str) -> None:
    model = started()
    model.out.quant_method = processed(process)
    with pytest.raises(NotPlanned, match=reason):
        recorded(model, staged(SHAPES, 1))


def test_a_kernel_that_reads_the_weight_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM on an AMD Zen where it does not pack: the weight, which no parameter shows any more, is kept in the closure."""

    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight.detach()
        layer.cpu_linear = lambda x, _, bias: torch.nn.functional.linear(x, weight, bias)
        if remove_weight:
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    model = started()
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch)
    with pytest.raises(NotPlanned, match=r"the loaders keep a copy of .* aside"):
        recorded(model, staged(SHAPES, 1))


def test_a_weight_that_is_not_packed_is_no_plan_and_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM where oneDNN has no memory: it falls back to the parameter, which is empty in the live layer."""

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    model = started()
    plan = recorded(model, staged(SHAPES, 1))
    before = answers(model)
    with monkeypatch.context() as patch:
        patch.setattr(utils.ops, "create_onednn_mm", fails)
        bound = PlanRun(plan)
        with pytest.raises(RuntimeError, match=r"vLLM did not pack a weight of"):
            bound.add(plan.copies_of(staged(SHAPES, 2)))
        assert not bound.complete
        assert all(torch.equal(one, before[name]) for name, one in answers(model).items())
    recorder = Recorder(model, readable(model), weights := staged(SHAPES, 3))
    with recorder, observe_packing(recorder):
        load(model, weights)
    monkeypatch.setattr(utils.ops, "create_onednn_mm", fails)
    with pytest.raises(NotPlanned, match="cannot be packed apart from its layer"):
        recorder.plan()


def test_layers_that_are_not_packed_are_planned_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM where it leaves a layer its weight, and sets the same function with each load."""

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", plain)
    plan = recorded(started(), staged(SHAPES, 1))
    assert not plan.packings


def test_other_tensors_than_planned_are_loaded_layer_by_layer() -> None:
    worker = Worker(started())
    loader = Loader(worker)
    updated(loader, staged(SHAPES, 1))
    wide = staged(SHAPES, 2, torch.float64)
    updated(loader, wide)
    assert worker.reloads == 2
    updated(loader, staged(SHAPES, 3, torch.float64))
    assert worker.reloads == 2
    assert equal(worker.model, staged(SHAPES, 3, torch.float64))


def test_only_a_shared_weight_is_packed_again() -> None:
    """A tied head computes with its own packed copy. Experts share a bias with their router, and are packed once only."""
    model = of(embed=Layer(VOCABULARY + 3, HIDDEN, loaders={"embed": vocabulary}))
    head, gate, experts = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    model.head, model.gate, model.experts = head, gate, experts
    head.weight, head.quant_method = model.embed.weight, packs(remove_weight=False)
    bias = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    gate.weight = torch.nn.Parameter(torch.zeros(4, HIDDEN), requires_grad=False)
    gate.e_score_correction_bias = experts.e_score_correction_bias = bias
    packed: list[torch.nn.Module] = []
    experts.quant_method = processed(packed.append)
    for layer in (model.embed, head):
        packs(remove_weight=False).process_weights_after_loading(layer)
    model.embed.weight.data.normal_()
    repack_tied_layers(model)
    assert torch.equal(head.cpu_linear(torch.eye(HIDDEN), head.weight, None), model.embed.weight.t())
    assert packed == []
