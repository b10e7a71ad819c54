"""Weights that are not in memory are neither read nor written: real clients, receivers and commits, over stand-ins for vLLM's
workers that fall asleep.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from real_commits import Engines, Worker, engines, group, trained, update
from real_receivers import checkpoint, weights
from waiting import eventually

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.errors import RequestError
from areal_vllm_ext.worker.load import proof
from areal_vllm_ext.worker.residency import NotResident, Residency

__all__ = ["checkpoint", "engines", "group"]  # the fixtures

ASLEEP = "the engine sleeps, so its weights have no memory: wake it up"


@pytest.fixture
def sleeper(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker that may fall asleep, and whose weights must not be touched then."""
    worker = engines.workers[1][0]
    digests_of_model, reload_weights = proof.digests_of_model, worker.reload_weights

    def read(model: torch.nn.Module) -> dict[str, int]:
        assert model is not worker.model or not worker.slept, "an illegal memory access"
        return digests_of_model(model)

    def write(weights_iterator: Any) -> None:
        assert not worker.slept, "an illegal memory access"
        reload_weights(weights_iterator)

    monkeypatch.setattr(proof, "digests_of_model", read)
    monkeypatch.setattr(worker, "reload_weights", write)
    yield worker
    worker.wake_up()


def at_phase(phase: str, action: Callable[[], object]) -> Callable[[str], None]:
    return lambda entered: action() and None if entered == phase else None


@pytest.mark.parametrize("phase", ["begin", "prepare"])
def test_an_engine_that_sleeps_refuses_before_anything_is_touched(
    engines: Engines, group: EngineGroup, sleeper: Worker, phase: str
) -> None:
    with pytest.raises(UpdateAborted, match=f"{phase}: NotResident: nothing was applied: {ASLEEP}"):
        update(group, weights(2), 2, on_phase=at_phase(phase, sleeper.sleep))
    assert engines.serve(weights(1))
    assert {state.version for state in group.status()} == {1}
    sleeper.wake_up()
    update(group, weights(3), 3)
    assert engines.serve(weights(3))


def test_an_engine_that_falls_asleep_after_its_vote_writes_nothing(
    engines: Engines, group: EngineGroup, sleeper: Worker
) -> None:
    result = update(group, weights(2), 2, on_phase=at_phase("commit", sleeper.sleep))
    ((lost, why),) = result.lost.items()
    assert lost == engines.deployment.engines[1].name
    assert f"worker 0 applied nothing: {ASLEEP}" in why
    assert torch.equal(sleeper.model.part("embed"), weights(1)["embed"])
    sleeper.wake_up()
    update(group, weights(3), 3)
    assert engines.serve(weights(3))


def test_weights_that_woke_before_the_rest_take_an_update(
    engines: Engines, group: EngineGroup, sleeper: Worker
) -> None:
    """The order of a colocated trainer: wake the weights, update, wake the KV cache."""
    sleeper.sleep(2)
    sleeper.wake_up(["kv_cache"])
    sleeper.slept = 2
    with pytest.raises(UpdateAborted, match=ASLEEP):
        update(group, weights(2), 2)
    sleeper.wake_up(["weights"])
    update(group, weights(2), 2)
    assert engines.serve(weights(2))


def test_an_engine_that_sleeps_is_not_read(group: EngineGroup, sleeper: Worker) -> None:
    sleeper.sleep()
    with pytest.raises(RequestError, match=f"worker 0: NotResident: {ASLEEP}"):
        group.verify()
    sleeper.wake_up()
    assert group.verify().equal


def test_what_is_to_be_kept_is_not_read_asleep(
    engines: Engines, group: EngineGroup, sleeper: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asleep between the check before the vote and the read of it."""
    residency = sleeper._areal_receiver.context.residency
    checked = residency.asleep_reason

    def awake_then_asleep() -> None:
        monkeypatch.setattr(residency, "asleep_reason", checked)
        sleeper.sleep()

    falls_asleep = at_phase("prepare", lambda: monkeypatch.setattr(residency, "asleep_reason", awake_then_asleep))
    with pytest.raises(UpdateAborted, match=ASLEEP):
        update(group, trained(1, 2), 2, on_phase=falls_asleep)
    assert engines.serve(weights(1))


def test_sleep_waits_until_the_weights_are_read(sleeper: Worker) -> None:
    residency = sleeper._areal_receiver.context.residency
    done = threading.Event()
    with residency.access():
        thread = threading.Thread(target=lambda: (sleeper.sleep(), done.set()))
        thread.start()
        time.sleep(0.1)
        assert not sleeper.slept
    assert done.wait(5)
    thread.join()


def test_a_plan_for_memory_that_the_model_left_is_not_used(engines: Engines, group: EngineGroup) -> None:
    """Between the begin of an update and its commit, someone else gives the model other tensors."""
    worker = engines.workers[0][1]
    update(group, weights(2), 2)  # planned by now

    def moves() -> None:
        worker.model.embed = torch.nn.Parameter(torch.zeros_like(worker.model.embed), requires_grad=False)

    update(group, weights(3), 3, on_phase=at_phase("commit", moves))
    assert engines.serve(weights(3))


# What counts as no memory


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.packed = torch.nn.Parameter(torch.empty(0))
        self.lasting = torch.nn.Parameter(torch.empty(3, device="meta"))


def residency_of(model: torch.nn.Module, **config: Any) -> Residency:
    return Residency(SimpleNamespace(get_model=lambda: model, vllm_config=SimpleNamespace(**config)))


def test_parameters_without_memory_are_named() -> None:
    model = Model()
    residency = residency_of(model)
    assert residency.absent_reason() is None, "as it was when it had loaded"
    model.layer.weight.data.untyped_storage().resize_(0)
    assert "layer.weight of the live model has no memory" in str(residency.absent_reason())
    model.layer = torch.nn.Linear(4, 4, device="meta")
    assert "layer.weight of the live model has no memory" in str(residency.absent_reason())


@pytest.mark.parametrize(
    ("backend", "group_size", "refused"),
    [("auto", 8, True), ("prefetch", 8, True), ("uva", 8, False), ("auto", 0, False)],
)
def test_weights_that_are_fetched_for_each_use_are_refused(backend: str, group_size: int, refused: bool) -> None:
    offload = SimpleNamespace(offload_backend=backend, prefetch=SimpleNamespace(offload_group_size=group_size))
    assert (residency_of(Model(), offload_config=offload).absent_reason() is not None) == refused


@pytest.mark.parametrize(("tag", "refused"), [("weights", True), ("runtime", True), ("kv_cache", False)])
def test_memory_that_vllms_allocator_has_unmapped_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, tag: str, refused: bool
) -> None:
    """Also where ``sleep`` went another way than by the worker's method."""
    allocation = SimpleNamespace(tag=tag, is_asleep=True)
    allocator = SimpleNamespace(pointer_to_data={1: SimpleNamespace(tag="weights", is_asleep=False), 2: allocation})
    module: Any = SimpleNamespace(CuMemAllocator=SimpleNamespace(instance=allocator))
    monkeypatch.setitem(sys.modules, "vllm.device_allocator.cumem", module)
    residency = residency_of(Model())
    assert (residency.absent_reason() is not None) == refused
    if refused:
        with pytest.raises(NotResident), residency.access():
            pass
    allocation.is_asleep = False
    assert residency.absent_reason() is None
    eventually(lambda: residency.asleep_reason() is None)
