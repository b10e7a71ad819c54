"""Comparing what engines serve: who differs is named, and nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from waiting import eventually

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.errors import NotACheckpoint, RequestError
from areal_vllm_ext.integrity import checkpoint, digest
from areal_vllm_ext.integrity.verify import Verification, compare
from areal_vllm_ext.protocol import DigestWeights, ServedAdapter, TensorMeta, WeightDigests, Weights, WorkerWeights
from areal_vllm_ext.worker import live_weights, startup
from areal_vllm_ext.worker.live_weights import LiveWeights, WeightsChanged
from areal_vllm_ext.worker.load import proof
from areal_vllm_ext.worker.load.written import WrittenRun
from areal_vllm_ext.worker.residency import Residency
from harness.simulated_engine import NEVER, Shape, deployed

LIVE = {"embed": 1, "norm": 2}
CHECKPOINT = {"embed": (TensorMeta("embed", "float32", (4, 2)), 11), "norm": (TensorMeta("norm", "float32", (2,)), 12)}


def worker(rank: int = 0, **changes: Any) -> WorkerWeights:
    facts: dict[str, Any] = {
        "layout": f"rank {rank}",
        "manifest": "m",
        "live": LIVE,
        "contents": (*CHECKPOINT.values(),),
    }
    return WorkerWeights(rank=rank, **(facts | changes))


def verified(
    *engines: WorkerWeights | tuple[WorkerWeights, ...],
    checkpoint: Any = None,
    taken: Any = None,
    adapters: tuple[str, ...] = (),
    **status: Any,
) -> Verification:
    answers = {
        f"engine {place}": WeightDigests(workers=one if isinstance(one, tuple) else (one,))
        for place, one in enumerate(engines)
    }
    statuses: Any = {
        name: SimpleNamespace(**{"update_phase": "idle", "unproven": "", "error": "", "adapters": {}} | status)
        for name in answers
    }
    for place, own in enumerate(adapters):
        statuses[f"engine {place}"].adapters = {"math": ServedAdapter(1, own)} if own else {}
    return compare(answers, statuses, checkpoint, taken)


def found(verification: Verification) -> list[str]:
    return [str(difference) for difference in verification.differences]


def test_equal_engines_are_equal() -> None:
    result = verified(*(worker() for _ in range(3)), checkpoint=CHECKPOINT)
    assert result.equal
    assert (result.engines, result.tensors) == (3, 6)


def test_the_one_that_differs_from_most_is_named() -> None:
    result = verified(worker(), worker(), worker(live=LIVE | {"norm": 3}))
    assert found(result) == ["engine 2, worker 0: norm differs from the one on engine 0"]
    result = verified(worker(live={"embed": 1}), worker(), worker())
    assert found(result) == ["engine 0, worker 0: norm differs from the one on engine 1"]


def test_a_tensor_that_changed_since_its_commit_is_named_once() -> None:
    result = verified(worker(), worker(live=LIVE | {"norm": 3}, changed=("norm",)))
    assert found(result) == ["engine 1, worker 0: norm has changed since it was loaded: its memory was damaged"]
    assert found(verified(worker(changed=("norm",)))) != [], "an engine alone is compared with itself"


def test_only_workers_of_one_layout_are_compared_with_each_other() -> None:
    halves = (worker(0), worker(1, live=LIVE | {"embed": 9}))
    assert verified(halves, halves).equal
    other = (worker(0), worker(1, live=LIVE | {"embed": 8}))
    assert found(verified(halves, halves, other)) == ["engine 2, worker 1: embed differs from the one on engine 0"]


def test_engines_on_different_updates_are_named() -> None:
    result = verified(worker(), worker(), worker(manifest="other"))
    assert found(result) == ["engine 2, worker 0: the weights belong to another update than those on engine 0"]


@pytest.mark.parametrize("other", ["m2", ""])
def test_an_engine_with_another_adapter_is_named(other: str) -> None:
    assert not verified(worker(), worker(), adapters=("m1", "m1")).differences
    (difference,) = found(verified(worker(), worker(), worker(), adapters=("m1", other, "m1")))
    assert "engine 1" in difference
    assert "adapter math is not as on engine 0" in difference


def test_tainted_weights_are_never_equal() -> None:
    assert found(verified(worker(), update_phase="tainted", error="the commit failed")) == [
        "engine 0, worker 0: the weights are partially loaded: the commit failed"
    ]


def test_weights_that_another_user_has_changed_are_never_equal() -> None:
    assert found(verified(worker(), update_phase="foreign", error="reload_weights was called")) == [
        "engine 0, worker 0: the weights are not from an update: reload_weights was called"
    ]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ((CHECKPOINT["embed"], (CHECKPOINT["norm"][0], 13)), "norm differs from the one in the checkpoint"),
        ((CHECKPOINT["embed"],), "norm is in the checkpoint but was never applied"),
        ((*CHECKPOINT.values(), (TensorMeta("new", "int8", ()), 1)), "new is not in the checkpoint"),
        ((CHECKPOINT["embed"], (TensorMeta("norm", "bfloat16", (2,)), 12)), "norm was applied as bfloat16"),
        ((CHECKPOINT["embed"], (TensorMeta("norm", "float32", (1, 2)), 12)), r"norm was applied with shape [1, 2]"),
    ],
)
def test_what_differs_from_the_checkpoint_is_named(contents: Any, message: str) -> None:
    (one,) = found(verified(worker(), worker(contents=contents), checkpoint=CHECKPOINT))
    assert one.startswith("engine 1, worker 0: ")
    assert message in one


def test_what_the_model_ignores_of_a_checkpoint_is_no_difference() -> None:
    (meta, value), norm = CHECKPOINT["embed"], CHECKPOINT["norm"]
    known = (meta, norm[0], TensorMeta("draft", "float32", (2,)))
    taken = Weights(tensors=known, optional=("draft",), ties={"head": "embed"}, prefixes=("model.",))
    saved = {"model.embed": (meta, value), "model.norm": norm, "head": (meta, value), "draft": (known[2], 7)}
    saved["model.layers.0.rotary_emb.inv_freq"] = (TensorMeta("f", "float32", (2,)), 3)

    def against(checkpoint: Any, *contents: Any) -> list[str]:
        served = contents or tuple(CHECKPOINT.values())
        return found(verified(worker(contents=served), checkpoint=checkpoint, taken=taken))

    assert against(saved) == []
    assert against(CHECKPOINT) == []
    assert against(CHECKPOINT, *CHECKPOINT.values(), (known[2], 7)) == [], "as the engine was started with it"
    (wrong,) = against(saved | {"head": (meta, value + 1)})
    assert "head is in the checkpoint but was never applied" in wrong
    (wrong,) = against(saved, *CHECKPOINT.values(), (known[2], 8))
    assert "draft differs from the one in the checkpoint" in wrong
    (wrong,) = against(saved | {"other": norm})
    assert "other is in the checkpoint but was never applied" in wrong


def test_what_cannot_be_compared_with_the_checkpoint_is_not_equal() -> None:
    one, other = worker(), worker(uncompared={"norm": "no load plan"})
    assert found(verified(one, other, checkpoint=CHECKPOINT)) == [
        "engine 1, worker 0: norm cannot be compared with the checkpoint: no load plan"
    ]
    assert verified(one, other).equal, "no checkpoint was asked about"


def test_an_unproven_engine_is_told_of() -> None:
    assert verified(worker(), unproven="no room").unproven == {"engine 0": "no room"}


def test_every_engine_is_asked_and_a_busy_one_again(key: Any, key_file: Path) -> None:
    with (
        deployed(key, 3, shape=Shape(workers=2)) as deployment,
        EngineGroup.connect(deployment.directory, key_file=key_file) as client,
    ):
        deployment.wait_attached()
        client.wait_ready(3, timeout=10)
        assert client.verify(timeout=5).equal
        deployment.engines[1].live = {"embed": 1}
        assert [one.engine for one in client.verify(timeout=5).differences] == [deployment.engines[1].name] * 2
        del deployment.engines[1].live["embed"]
        deployment.engines[2].busy = 2
        assert client.verify(timeout=5).equal
        assert deployment.engines[2].busy == 0
        deployment.engines[2].errors["digest"] = "RuntimeError: out of memory"
        started = time.monotonic()
        with pytest.raises(RequestError, match=r"DP rank 2 .*: worker \d: RuntimeError: out of memory"):
            client.verify(timeout=5)
        assert time.monotonic() - started < 3, "only a busy engine is asked again"
        del deployment.engines[2].errors["digest"]
        deployment.engines[0].seconds["digest"] = NEVER
        started = time.monotonic()
        with pytest.raises(RequestError, match=r"DP rank 0 .*: no digests from worker 0, 1 in time"):
            client.verify(timeout=0.5)
        assert time.monotonic() - started < 2
        with pytest.raises(NotACheckpoint, match="is not a directory"):
            client.verify("/nowhere")


def test_an_engine_that_commits_is_busy(key: Any, key_file: Path, raw: Any) -> None:
    with deployed(key, 1) as deployment:
        deployment.wait_attached()
        (engine,) = deployment.engines.values()
        engine.endpoint.participant.update_phase = "committing"
        answer = raw(engine.endpoint.address).ask(DigestWeights(request="r", timeout=5))
        assert (answer.kind, answer.message) == ("busy", "the engine is committing an update")
        engine.endpoint.participant.update_phase = "idle"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(64, 8)
        self.register_buffer("scale", torch.ones(3))


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> tuple[LiveWeights, Model]:
    model = Model()
    parallel = SimpleNamespace(
        tensor_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False, data_parallel_size=1
    )
    config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(dtype=torch.float32))
    stand_in = SimpleNamespace(rank=0, device=torch.device("cpu"), vllm_config=config, get_model=lambda: model)
    return LiveWeights(stand_in, Residency(stand_in), ("/nowhere", None)), model


@pytest.mark.parametrize(("model", "warned"), [(object(), True), (None, False)])
def test_the_end_of_vllms_worker_is_no_reason_to_warn(
    live: tuple[LiveWeights, Model], caplog: pytest.LogCaptureFixture, model: object, warned: bool
) -> None:
    weights, _ = live
    weights._worker.get_model = lambda: model
    weights._read_after_commit(weights._changes)
    assert ("no digests of the live weights could be taken" in caplog.text) == warned


def test_a_weight_that_changes_without_a_commit_is_damage(live: tuple[LiveWeights, Model]) -> None:
    weights, model = live
    with weights.committing(dict(CHECKPOINT)):
        model.embed.weight.data += 1
    eventually(lambda: weights._after_commit)
    assert weights.describe(contents=True).changed == ()
    model.embed.weight.data[3, 5] += 1
    model.scale[2] = 0
    told = weights.describe(contents=True)
    assert told.changed == ("embed.weight", "scale")
    assert {meta.name: (meta, value) for meta, value in told.contents} == CHECKPOINT
    with weights.committing({}):
        pass
    eventually(lambda: weights._after_commit)
    assert weights.describe(contents=False).changed == (), "the next commit counts"


def test_digests_that_a_commit_cut_through_are_not_told(
    live: tuple[LiveWeights, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, model = live
    reading, committed = threading.Event(), threading.Event()
    take = proof.digests_of_model

    def slowly(model: torch.nn.Module) -> dict[str, int]:
        values = take(model)
        reading.set()
        assert committed.wait(5)
        return values

    monkeypatch.setattr(live_weights.proof, "digests_of_model", slowly)
    errors: list[Exception] = []

    def describe() -> None:
        try:
            weights.describe(contents=False)
        except WeightsChanged as error:
            errors.append(error)

    thread = threading.Thread(target=describe)
    thread.start()
    assert reading.wait(5)
    with weights.committing({}):
        model.embed.weight.data += 1
    committed.set()
    thread.join(5)
    assert len(errors) == 1
    eventually(lambda: weights._after_commit)
    assert weights.describe(contents=False).changed == ()


def test_while_a_commit_is_under_way_there_are_no_digests(live: tuple[LiveWeights, Model]) -> None:
    weights, _ = live
    with weights.committing({}), pytest.raises(WeightsChanged):
        weights.describe(contents=False)


def test_after_a_failed_switch_nothing_is_claimed(live: tuple[LiveWeights, Model]) -> None:
    weights, _ = live
    with pytest.raises(RuntimeError), weights.committing(dict(CHECKPOINT)):
        raise RuntimeError
    told = weights.describe(contents=True)
    assert (told.manifest, told.contents) == ("", ())


def test_a_second_model_needs_room(live: tuple[LiveWeights, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    weights, model = live
    worker: Any = weights._worker
    worker.vllm_config.parallel_config.enable_eplb = False
    monkeypatch.setattr(proof, "free_bytes", lambda _device: 1000)
    big = [("embed.weight", torch.zeros(1 << 20))]
    reason = proof.prove(worker, big, proof.digests_of_model(model))
    assert reason == "no room on cpu for a second model: 5 MiB needed, 0 MiB free"
    with weights.committing({}):
        assert weights.prove(big) == reason
        assert weights.prove(big) == reason, "it is tried again with each update"


def test_free_memory_is_some() -> None:
    assert 1 << 20 < proof.free_bytes(torch.device("cpu")) < 1 << 50


def written(model: Model, contents: Any) -> Any:
    """What a load plan says that it wrote: ``a`` to ``embed.weight``, ``b`` to ``scale``."""
    runs = {"a": model.embed.weight.data.view(-1), "b": model.scale}
    return {name: (WrittenRun(run, contents[name][1]),) for name, run in runs.items()}


def contents_of(model: Model) -> Any:
    values = digest.digests_of([model.embed.weight, model.scale])
    return {name: (TensorMeta(name, "float32", ()), value) for name, value in zip("ab", values, strict=True)}


def test_what_a_commit_wrote_must_be_what_was_received(live: tuple[LiveWeights, Model]) -> None:
    weights, model = live
    contents = contents_of(model)
    told: list[tuple[str, str]] = []
    weights.on_damage = lambda update, reason: told.append((update, reason))
    for damaged in (False, True):
        with weights.committing(contents, f"update {damaged}"):
            weights.set_written(written(model, contents))
            if damaged:
                model.scale[1] = 5
        eventually(lambda: weights._after_commit)
        wanted = ("b",) if damaged else ()
        eventually(lambda wanted=wanted: weights._wrong == wanted)
    assert weights.describe(contents=False).changed == ("b",)
    eventually(lambda: told)
    assert told == [("update True", "1 live tensors differ from what was received (b)")]


def test_weights_that_change_before_they_are_first_read_are_not_equal(live: tuple[LiveWeights, Model]) -> None:
    """Within 0.2 s of the commit, as by a reload of someone else."""
    weights, model = live
    contents = contents_of(model)
    with weights.committing(contents):
        weights.set_written(written(model, contents))
    model.embed.weight.data += 1
    told = weights.describe(contents=True)
    assert (told.changed, told.uncompared) == (("a",), {})


def test_tensors_of_which_nothing_tells_where_they_are_are_not_called_equal(live: tuple[LiveWeights, Model]) -> None:
    weights, model = live
    contents = contents_of(model)
    with weights.committing(contents):
        weights.set_written(None)
    assert weights.describe(contents=True).uncompared.keys() == {"a", "b"}
    assert weights.describe(contents=False).uncompared == {}, "nobody asked"
    with weights.committing(contents):
        weights.set_written({"a": written(model, contents)["a"]})
    assert weights.describe(contents=True).uncompared.keys() == {"b"}
    with weights.committing(contents):  # a delta update: b stays
        weights.set_written({"a": written(model, contents)["a"]}, kept=["b"])
    assert weights.describe(contents=True).uncompared.keys() == {"b"}, "it was not known before either"


def test_a_fresh_load_that_gave_the_same_in_the_pause_compares_all(
    live: tuple[LiveWeights, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, model = live
    contents = contents_of(model)
    weights._worker.vllm_config.parallel_config.enable_eplb = False
    monkeypatch.setattr(proof, "prove", lambda *_: "")
    sent = [(name, torch.zeros(1)) for name in contents]
    for _ in range(2):  # proven now, and as before
        with weights.committing(contents):
            weights.set_written(None)
            assert weights.prove(sent) == ""
            model.scale[0] += 1  # before they would be read beside generation
        told = weights.describe(contents=True)
        assert (told.uncompared, told.changed) == ({}, ("scale",))


def test_another_packed_weight_is_a_change(live: tuple[LiveWeights, Model]) -> None:
    """A packed weight cannot be read beside a running engine. It changes only with the function that computes with it."""
    weights, model = live
    model.embed.cpu_linear = packed = object()
    with weights.committing(contents_of(model)):
        pass
    assert weights.describe(contents=False).changed == ()
    model.embed.cpu_linear = object()
    assert weights.describe(contents=False).changed == ("embed (packed)",)
    model.embed.cpu_linear = packed


# What an engine was started from


def started_from(folder: Path) -> LiveWeights:
    model = Model()
    parallel = SimpleNamespace(
        tensor_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False, data_parallel_size=1
    )
    config = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(dtype=torch.float32))
    stand_in = SimpleNamespace(rank=0, device=torch.device("cpu"), vllm_config=config, get_model=lambda: model)
    return LiveWeights(stand_in, Residency(stand_in), (str(folder), None))


def saved(folder: Path, seed: int, name: str = "model.safetensors") -> Path:
    torch.manual_seed(seed)
    save_file({"w": torch.randn(4)}, folder / name)
    return folder


def test_a_folder_that_was_overwritten_is_not_what_the_engine_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    monkeypatch.setattr(startup, "_IMPORTED_NS", time.time_ns())
    weights = started_from(tmp_path)
    assert weights.describe(contents=True).uncompared == {}
    assert [meta.name for meta, _ in weights.describe(contents=True).contents] == ["w"]
    before = (tmp_path / "model.safetensors").stat()
    os.utime(saved(tmp_path, 2) / "model.safetensors", ns=(1, before.st_mtime_ns))  # as `cp -p` and rsync leave it
    told = weights.describe(contents=True)
    assert told.contents == ()
    assert "model.safetensors has changed since the engine loaded it" in told.uncompared[""]
    (one,) = found(verified(told, checkpoint=checkpoint.contents(tmp_path)))
    assert one.startswith("engine 0, worker 0: the weights cannot be compared with the checkpoint: ")


def test_files_that_came_while_or_after_the_engine_loaded_are_not_what_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "_IMPORTED_NS", time.time_ns() - 1_000_000_000)
    saved(tmp_path, 1)
    assert "was written while the engine loaded it" in started_from(tmp_path).describe(contents=True).uncompared[""]
    monkeypatch.setattr(startup, "_IMPORTED_NS", time.time_ns())
    weights = started_from(tmp_path)
    saved(tmp_path, 1, "model-2.safetensors")
    assert "has other files" in weights.describe(contents=True).uncompared[""]


def test_an_engine_without_a_checkpoint_is_not_called_equal(tmp_path: Path) -> None:
    told = started_from(tmp_path).describe(contents=True)
    assert "holds no *.safetensors file" in told.uncompared[""]


# The read of the live weights, which begins 0.2 s after a commit, takes longer than the end of a process may wait for it.
LEAVES = """
import sys, time
from types import SimpleNamespace
import torch
from areal_vllm_ext.worker.live_weights import LiveWeights
from areal_vllm_ext.worker.load import proof
from areal_vllm_ext.worker.residency import Residency

def read_for_ever(model):
    while True:
        torch.zeros(8, 8).t().contiguous()

proof.digests_of_model = read_for_ever
worker = SimpleNamespace(device=torch.device("cpu"), get_model=torch.nn.Module, rank=0)
served = LiveWeights(worker, Residency(worker), ("", None))
with served.committing({}):
    pass
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["before the read", "in the read"])
def test_a_process_that_leaves_after_a_commit_ends_in_order(seconds: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVES, str(seconds)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
