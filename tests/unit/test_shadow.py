"""Shadow loads on vLLM's own models: new weights are built beside the live ones, and the commit makes the live model what a
fresh load would be. A load that fails changes nothing.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from vllm_models import FAMILIES, LoadedWorker, checkpoint, saved, trained, weights_of

from areal_vllm_ext.observability import fault_points
from areal_vllm_ext.transport.base import Cancelled
from areal_vllm_ext.transport.buckets import contents_of
from areal_vllm_ext.worker import hooks
from areal_vllm_ext.worker.live_weights import LiveWeights
from areal_vllm_ext.worker.load import apart, proof
from areal_vllm_ext.worker.load.dry_load import DryModel
from areal_vllm_ext.worker.load.loader import Loader
from areal_vllm_ext.worker.load.plan import PlanRun
from areal_vllm_ext.worker.load.shadow import BuildOptions, Refused, Shadow
from areal_vllm_ext.worker.load.written import wrong_in
from areal_vllm_ext.worker.residency import Residency
from harness.vllm_release import older_than

Weights = dict[str, torch.Tensor]
PLANNED = {"dense", "tied", "biases"}


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    hooks.repack_cpu_experts_on_reload()


def build(loader: Loader, weights: Weights, **options: Any) -> tuple[Shadow | None, str]:
    """Build on a thread, as a receiver does."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(loader.build_shadow(list(weights.items()), contents_of(weights), BuildOptions(**options)))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]  # type: ignore[no-any-return]


def state(model: torch.nn.Module) -> dict[str, int]:
    """Digests of what a model serves."""
    return proof.digests_of_model(model) | proof.packed_digests(model)


def assert_serves(worker: LoadedWorker, weights: Weights, family: str, dtype: torch.dtype = torch.float32) -> None:
    with saved(weights, checkpoint(family, dtype)) as folder:
        fresh = state(LoadedWorker(folder, dtype=str(dtype).removeprefix("torch.")).get_model())
    assert proof.different(state(worker.get_model()), fresh) == []
    assert fresh.keys() == state(worker.get_model()).keys()


def updated(worker: LoadedWorker, loader: Loader, weights: Weights) -> Shadow:
    shadow, reason = build(loader, weights)
    assert shadow is not None, reason
    written = loader.load_shadow(shadow, list(weights.items()))
    assert shadow.digests == proof.digests_of_model(worker.get_model())
    assert wrong_in(written or {}) == []
    shadow.free()
    return shadow


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_first_update_gives_what_a_fresh_load_gives(family: str, dtype: torch.dtype) -> None:
    folder = checkpoint(family, dtype)
    worker = LoadedWorker(folder, dtype=str(dtype).removeprefix("torch."))
    loader, base = Loader(worker), weights_of(folder)
    before = torch.get_default_dtype(), torch.get_default_dtype, torch.set_default_dtype
    registers = dict(worker.vllm_config.compilation_config.static_forward_context)
    updated(worker, loader, trained(base, 1))
    assert_serves(worker, trained(base, 1), family, dtype)
    assert (torch.get_default_dtype(), torch.get_default_dtype, torch.set_default_dtype) == before
    assert worker.vllm_config.compilation_config.static_forward_context == registers
    run = loader.begin_run()
    assert (run is not None) == (family in PLANNED)
    if run is None or (family == "tied" and older_than(0, 24)):  # there the tied head is packed a second time
        updated(worker, loader, trained(base, 2))
    else:
        copied(loader, run, trained(base, 2))
    assert_serves(worker, trained(base, 2), family, dtype)
    assert worker.reloads == 0


def copied(loader: Loader, run: PlanRun, weights: Weights) -> None:
    """Load by the plan that the shadow's load gave."""
    run.add(run.plan.copies_of(weights))
    assert run.complete
    assert loader.fits(run)
    loader.load(list(weights.items()), run, planned=True)


@pytest.fixture(scope="module")
def worker() -> LoadedWorker:
    return LoadedWorker(checkpoint("dense"))


def test_a_wrong_tensor_is_refused_with_the_old_weights_live(worker: LoadedWorker) -> None:
    loader, before = Loader(worker), state(worker.get_model())
    name = "model.layers.1.self_attn.k_proj.weight"
    wrong = trained(weights_of(checkpoint("dense")), 1) | {name: torch.zeros(7, 64)}
    with pytest.raises(Refused, match="the model does not take these weights"):
        build(loader, wrong)
    del wrong["model.norm.weight"], wrong[name]
    with pytest.raises(Refused, match=r"lack weights: model\.norm\.weight"):
        build(loader, wrong)
    assert state(worker.get_model()) == before
    updated(worker, loader, trained(weights_of(checkpoint("dense")), 3))
    assert_serves(worker, trained(weights_of(checkpoint("dense")), 3), "dense")


@pytest.mark.parametrize("error", [MemoryError("none left"), torch.OutOfMemoryError("none left"), Cancelled()])
def test_a_build_that_fails_midway_changes_nothing(worker: LoadedWorker, error: Exception) -> None:
    loader, before = Loader(worker), state(worker.get_model())
    weights = trained(weights_of(checkpoint("dense")), 4)
    reached: list[int] = []

    def fault(nbytes: int) -> int:
        reached.append(nbytes)
        if len(reached) == 12:
            raise error
        return nbytes

    with fault_points.injected("shadow", fault):
        if isinstance(error, torch.OutOfMemoryError):
            assert build(loader, weights) == (None, "the memory for new weights beside the old ones ran out: none left")
        else:
            with pytest.raises((Refused, Cancelled)):
                build(loader, weights)
    assert len(reached) == 12
    assert state(worker.get_model()) == before
    updated(worker, loader, weights)
    assert_serves(worker, weights, "dense")


def test_without_room_there_is_no_shadow(worker: LoadedWorker) -> None:
    loader, weights = Loader(worker), trained(weights_of(checkpoint("dense")), 5)
    with fault_points.injected("shadow", lambda _: 1 << 60):
        shadow, reason = build(loader, weights)
    assert shadow is None
    assert "no room on cpu beside the old weights: 1099511627776 MiB needed" in reason
    assert build(loader, weights)[0] is not None, "with room again there is one"


@pytest.mark.parametrize(
    ("live", "fresh", "reason"),
    [
        (torch.arange(4.0), None, "a fresh load has other tensors than the live model: table"),
        (torch.arange(4.0), torch.ones(4), "table is in no checkpoint, and another value than a fresh load gives it"),
        (torch.ones(4), torch.ones(5), "table has another dtype, shape or layout after a fresh load"),
        (torch.ones(4), torch.ones(4), ""),
    ],
)
def test_a_model_that_is_not_as_after_a_fresh_load_has_no_shadow(
    worker: LoadedWorker, monkeypatch: pytest.MonkeyPatch, live: torch.Tensor, fresh: torch.Tensor | None, reason: str
) -> None:
    loader, weights = Loader(worker), trained(weights_of(checkpoint("dense")), 6)
    new_model = apart.new_model

    def with_table(*arguments: Any) -> torch.nn.Module:
        model = new_model(*arguments)
        if fresh is not None:
            model.register_buffer("table", fresh.clone())
        return model

    monkeypatch.setattr(apart, "new_model", with_table)
    model = worker.get_model()
    model.register_buffer("table", live)
    try:
        shadow, found = build(loader, weights)
        assert (shadow is None) == bool(reason)
        assert reason in found
        if reason:
            monkeypatch.setattr(apart, "new_model", None)
            assert build(loader, weights) == (None, found), "and none is tried again"
    finally:
        del model.table


def test_other_threads_keep_their_default_dtype_and_see_no_device(worker: LoadedWorker) -> None:
    folder = checkpoint("dense", torch.bfloat16)
    other = LoadedWorker(folder, dtype="bfloat16")
    seen: set[Any] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add((torch.get_default_dtype(), torch.zeros(1).dtype, torch.utils._device.CURRENT_DEVICE))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert build(Loader(other), trained(weights_of(folder), 1))[0] is not None
    finally:
        stop.set()
        thread.join()
    assert seen == {(torch.float32, torch.float32, None)}


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: linear layers compute with their parameters."""
    from vllm.model_executor.layers import utils

    def dispatch(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", dispatch)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("family", ["moe", "mla"])
def test_a_load_that_computes_is_replayed_once_two_updates_have_proven_it(family: str) -> None:
    base, worker = weights_of(checkpoint(family)), LoadedWorker(checkpoint(family))
    loader = Loader(worker)
    for seed in (1, 2):
        shadow = updated(worker, loader, trained(base, seed))
        assert shadow.plan is None
        assert shadow.taped is not None
        assert shadow.taped.proven == (seed == 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apart, "new_model", None)  # no model is built any more
        for seed in (3, 4):
            updated(worker, loader, trained(base, seed))
    assert_serves(worker, trained(base, 4), family)


@pytest.mark.usefixtures("unpacked")
def test_the_same_weights_twice_prove_a_tape_once() -> None:
    base, worker = weights_of(checkpoint("moe")), LoadedWorker(checkpoint("moe"))
    loader = Loader(worker)
    for _ in range(2):
        shadow = updated(worker, loader, trained(base, 1))
        assert shadow.taped is not None
        assert not shadow.taped.proven


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("how", ["looks at a value", "unseen by torch", "unseen value"])
def test_a_load_that_depends_on_more_than_its_operators_is_not_replayed(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    process = UnquantizedFusedMoEMethod.process_weights_after_loading

    def processed(self: Any, layer: Any) -> None:
        weight = layer.w13_weight.data
        if how == "looks at a value":
            weight.mul_(2 if weight.sum() > 0 else 3)
        elif how == "unseen by torch":
            weight.numpy()[0] *= 2
        else:
            weight.mul_(float(weight.numpy().max()))
        process(self, layer)

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "process_weights_after_loading", processed)
    base, worker = weights_of(checkpoint("moe")), LoadedWorker(checkpoint("moe"))
    loader = Loader(worker)
    tapes = [updated(worker, loader, trained(base, seed)).taped for seed in (1, 2, 3)]
    # Only a second set of weights shows that a number came from the first.
    assert [one is not None for one in tapes] == ([True, False, False] if how == "unseen value" else [False] * 3)


@pytest.mark.parametrize(
    ("changed", "damaged"),
    [("model.norm.weight", True), ("model.layers.0.self_attn.attn._k_scale", False), ("", False)],
)
def test_live_weights_that_are_not_the_shadow_s_are_damage(worker: LoadedWorker, changed: str, damaged: bool) -> None:
    loader, weights = Loader(worker), trained(weights_of(checkpoint("dense")), 7)
    live = LiveWeights(worker, Residency(worker), ("none", None))
    reasons: list[str] = []
    live.on_damage = lambda _, reason: reasons.append(reason)
    shadow, _ = build(loader, weights)
    assert shadow is not None
    with live.committing(contents_of(weights), "update"):
        loader.load_shadow(shadow, list(weights.items()))
        live.set_written(None)  # as of a load without a plan
        live.set_proven(weights, shadow.digests)
    if changed:
        tensor = proof.readable(worker.get_model())[changed]
        tensor.data.add_(1)
    live._read_after_commit(live._changes)
    assert [changed in reason for reason in reasons] == [True] * damaged
    if changed:
        tensor.data.sub_(1)


def test_whether_all_parameters_must_get_weights_depends_on_the_models_quantisation() -> None:
    worker = LoadedWorker(checkpoint("dense"))
    few = weights_of(checkpoint("dense"))
    del few["model.norm.weight"]
    dry = DryModel.of(worker)
    assert dry is not None
    assert "model.norm.weight; send all weights" in str(dry.refusal(few))
    worker.vllm_config.model_config.quantization = "fp8"
    dry = DryModel.of(worker)
    assert dry is not None
    assert dry.refusal(few) is None
