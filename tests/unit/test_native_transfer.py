"""vLLM's own weight transfer over our control plane: tainted from start to finish, one lease, every engine, right ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from waiting import eventually

from areal_vllm_ext import EngineGroup, PauseFailed, RequestError, UpdateAborted, WeightsTainted, plugin
from areal_vllm_ext.engine_core.effects import CallMethod
from areal_vllm_ext.integrations.vllm.client import WeightSyncClient
from areal_vllm_ext.integrations.vllm.session import worker_offsets
from areal_vllm_ext.integrations.vllm.source import full_pass, metadata
from areal_vllm_ext.protocol import security
from areal_vllm_ext.transport.native_handles import from_plain, to_plain
from harness.simulated_engine import Deployment, Shape, deployed

WORKERS = 2


class Steps:
    """What the workers were asked, and where they fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, str, list[Any]]] = []
        self.fails: tuple[int, int, str] | None = None

    def take(self, engine: int, rank: int, effect: CallMethod) -> tuple[bytes, str, str]:
        step = effect.method.removeprefix("areal_transfer_")
        self.asked.append((engine, rank, step, msgspec.msgpack.decode(effect.arguments)))
        if self.fails == (engine, rank, step):
            return b"", "RuntimeError", "out of memory"
        return msgspec.msgpack.encode(None), "", ""

    def of(self, engine: int, rank: int) -> list[str]:
        return [step for one, worker, step, _ in self.asked if (one, worker) == (engine, rank)]


@pytest.fixture(scope="module")
def deployment(key: security.ClusterKey) -> Iterator[Deployment]:
    with deployed(key, 2, shape=Shape(workers=WORKERS)) as engines:
        engines.wait_attached()
        yield engines


@pytest.fixture
def steps(deployment: Deployment) -> Steps:
    found = Steps()
    for number, engine in deployment.engines.items():
        engine.method = lambda rank, effect, number=number: found.take(number, rank, effect)
        engine.worker_ranks = range(WORKERS)
    return found


@pytest.fixture
def group(deployment: Deployment, key_file: Path) -> Iterator[EngineGroup]:
    with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
        client.wait_ready(2, 20)
        yield client
    with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
        healing = WeightSyncClient(client, timeout=20)
        healing.start_weight_update()
        healing.finish_weight_update("healed")
        client.resume()


def states(group: EngineGroup) -> set[tuple[object, str, str]]:
    return {(state.version, state.update_phase, state.generation) for state in group.status()}


def test_generation_is_held_from_start_to_finish(deployment: Deployment, steps: Steps, group: EngineGroup) -> None:
    client = WeightSyncClient(group, timeout=20)
    ran = states(group)
    client.init_weight_transfer_engine({"packed": True})
    assert states(group) == ran
    client.start_weight_update()
    assert {(phase, generation) for _, phase, generation in states(group)} == {("tainted", "paused")}
    client.update_weights({"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]})
    client.update_weights({"names": ["b"], "dtype_names": ["float32"], "shapes": [[1]]})
    assert {generation for *_, generation in states(group)} == {"paused"}
    client.finish_weight_update("step-7")
    assert states(group) == {("step-7", "idle", "running")}
    assert {(state.loaded, bool(state.unproven)) for state in group.status()} == {("vLLM's weight transfer", True)}
    expected = ["init", "ready", "start", "update", "update", "finish"]
    assert [steps.of(engine, rank) for engine in (0, 1) for rank in (0, 1)] == [expected] * 4


def test_no_other_client_commands_meanwhile(
    deployment: Deployment, steps: Steps, group: EngineGroup, key_file: Path
) -> None:
    client = WeightSyncClient(group, timeout=20)
    client.start_weight_update()
    with EngineGroup.connect(deployment.directory, key_file=key_file) as other:
        with pytest.raises(RequestError, match="the lease was not free"):
            other.resume(timeout=0.5)
        with pytest.raises(RequestError, match="has been started by this client"):
            client.start_weight_update()
        with pytest.raises(RequestError, match="would wait for itself"):
            group.resume(timeout=0.5)
        client.finish_weight_update()
        other.resume(timeout=5)
    assert {version for version, *_ in states(group)} == {1}


@pytest.mark.parametrize("step", ["start", "update", "finish"])
def test_an_error_after_the_start_says_tainted(
    deployment: Deployment, steps: Steps, group: EngineGroup, step: str, key_file: Path
) -> None:
    client = WeightSyncClient(group, timeout=20)
    steps.fails = (1, 1, step)

    def send() -> None:
        client.start_weight_update()
        client.update_weights({"names": []})
        client.finish_weight_update("new")

    with pytest.raises(WeightsTainted, match=rf"failed at {step}: .*worker 1: RuntimeError: out of memory.*send again"):
        send()
    failed = [state for state in group.status() if state.update_phase == "tainted"]
    assert 1 in {state.dp_rank for state in failed}
    assert {state.generation for state in failed} == {"paused"}
    assert all("vLLM's weight transfer" in state.error for state in failed)
    assert steps.of(0, 0)[-1] == steps.of(1, 1)[-1] == "abandon"
    with pytest.raises(PauseFailed, match="tainted"):
        group.resume(timeout=5)
    steps.fails = None
    client.start_weight_update()
    client.finish_weight_update("again")
    assert states(group) == {("again", "idle", "running")}


def test_who_cannot_take_part_is_refused_before_anything_is_touched(steps: Steps, group: EngineGroup) -> None:
    before = states(group)
    steps.fails = (0, 1, "ready")
    with pytest.raises(UpdateAborted, match=r"was not begun: .*worker 1: RuntimeError: out of memory"):
        WeightSyncClient(group, timeout=10).start_weight_update()
    assert states(group) == before
    assert "start" not in steps.of(1, 0)
    steps.fails = None


def test_after_its_time_the_lease_is_free_and_the_engines_stay_tainted(steps: Steps, group: EngineGroup) -> None:
    client = WeightSyncClient(group, timeout=1.0)
    client.start_weight_update()
    time.sleep(1.2)
    with pytest.raises(WeightsTainted, match="was not finished within 1 s, and the engines serve nothing"):
        client.update_weights({"names": []})
    eventually(lambda: {phase for _, phase, _ in states(group)} == {"tainted"})


def test_an_argument_that_cannot_travel_ends_the_session_as_tainted(steps: Steps, group: EngineGroup) -> None:
    client = WeightSyncClient(group, timeout=10)
    client.start_weight_update()
    with pytest.raises(WeightsTainted, match="msgpack cannot carry object"):
        client.update_weights({"names": object()})
    with pytest.raises(RequestError, match="call start_weight_update first"):
        client.finish_weight_update()


def test_a_pause_of_the_user_outlasts_the_update(steps: Steps, group: EngineGroup) -> None:
    group.pause()
    client = WeightSyncClient(group, timeout=10)
    client.start_weight_update()
    client.finish_weight_update("paused")
    assert states(group) == {("paused", "idle", "paused")}
    group.resume()


def test_each_worker_gets_a_rank_of_its_own(steps: Steps, group: EngineGroup) -> None:
    client = WeightSyncClient(group, timeout=10)
    with pytest.raises(ValueError, match=r"world_size is 3, but 1 trainer ranks and 4 workers .* pass world_size=5"):
        client.init_weight_transfer_engine({"world_size": 3, "rank_offset": 1})
    assert not steps.asked
    client.init_weight_transfer_engine({"world_size": 5, "rank_offset": 1})
    infos = [arguments[0] for *_, step, arguments in steps.asked if step == "init"]
    assert infos == [{"world_size": 5, "rank_offset": 1}] * 4, "one replica: vLLM adds the DP rank"


def test_workers_of_several_replicas_are_counted_on(group: EngineGroup) -> None:
    first, second = group.engines()
    other = [msgspec.structs.replace(engine, replica="zzz") for engine in (first, second)]
    engines = {engine.name: engine for engine in (first, second, *other)}
    offsets, total = worker_offsets(engines)
    assert total == 8
    assert [offsets[engine.name] for engine in (first, second, *other)] == [0, 0, 4, 4]


def test_a_list_has_one_entry_for_each_worker(steps: Steps, group: EngineGroup) -> None:
    client = WeightSyncClient(group, timeout=10)
    client.start_weight_update()
    client.update_weights([{"part": number} for number in range(4)])
    parts = {arguments[0][0]["part"] for *_, step, arguments in steps.asked if step == "update"}
    assert parts == {0}, "the list of one replica is whole, because vLLM indexes it by DP rank and rank"
    with pytest.raises(WeightsTainted, match="update_info has 3 entries, and there are 4 workers"):
        client.update_weights([{}, {}, {}])


def test_handles_travel_without_pickle() -> None:
    handle = (
        torch.Tensor,
        torch.Size([2, 3]),
        (3, 1),
        0,
        torch.UntypedStorage,
        torch.bfloat16,
        0,
        b"\x00\xff",
        12,
        0,
        False,
    )
    info = {"names": ["a"], "ipc_handles": [{"GPU-1": handle}]}
    sent = from_plain(msgspec.msgpack.decode(msgspec.msgpack.encode(to_plain(info))))
    assert sent["ipc_handles"][0]["GPU-1"] == [torch.Tensor, [2, 3], [3, 1], *handle[3:]]
    for name in ("load", "system", 3, "nn"):
        with pytest.raises(ValueError, match="is no dtype and no class"):
            from_plain({"areal_torch": name})
    with pytest.raises(TypeError, match="msgpack cannot carry"):
        to_plain([torch.zeros(1)])


def test_sources_of_both_versions_are_read() -> None:
    pairs = [("a", torch.zeros(1))]

    class Older:
        def metadata(self) -> list[str]:
            return ["a"]

        def __iter__(self) -> Iterator[Any]:
            return iter(pairs)

    class Newer:
        metadata = ("a",)
        whole = True

        def implements_iter_full(self) -> bool:
            return self.whole

        def iter_full(self) -> Iterator[Any]:
            return iter(pairs)

    for source in (Older(), Newer()):
        assert metadata(source) == ["a"]
        assert list(full_pass(source)) == pairs == list(full_pass(source))
    shards = Newer()
    shards.whole = False
    with pytest.raises(TypeError, match=r"has no iter_full\(\), so it gives no whole tensors: define it, or"):
        full_pass(shards)


def test_vllm_knows_the_backend_by_name() -> None:
    factory = pytest.importorskip("vllm.distributed.weight_transfer.factory")
    if not hasattr(factory, "WeightTransferTrainerFactory"):
        pytest.skip("it has no trainer engines")

    plugin.register_backends()
    plugin.register_backends()
    for registry, name in (
        (factory.WeightTransferEngineFactory, "ArealWeightTransferEngine"),
        (factory.WeightTransferTrainerFactory, "ArealTrainerEngine"),
    ):
        assert registry._registry["areal"]().__name__ == name
