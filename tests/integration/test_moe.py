"""An MoE model: two DP ranks in lockstep, on two nodes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from adapters import adapted, assert_serves
from cluster import Cluster, start_cluster

from areal_vllm_ext import EngineGroup, PauseFailed, UpdateAborted

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = [10, 20, 30, 40]

pytestmark = [pytest.mark.vllm, pytest.mark.netns, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    # CPU experts have no LoRA.
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "v_proj", "o_proj")
    with start_cluster(tmp_path_factory.mktemp("moe"), moe=True, vllm_args=lora) as running:
        yield running


def test_three_updates_are_token_exact(cluster: Cluster, group: EngineGroup) -> None:
    cluster.assert_serves_trainers_weights()
    for _ in range(3):
        version = cluster.train()
        with group.update(version, timeout=60) as update:
            update.send(cluster.model)
        assert {state.version for state in group.status()} == {version}
        cluster.assert_serves_trainers_weights()


def test_adapters_with_a_name_that_stays_and_names_of_each_version(cluster: Cluster, group: EngineGroup) -> None:
    def served() -> list[dict[str, object]]:
        return [dict(state.adapters) for state in group.status()]

    targets = {"target_modules": ["q_proj", "v_proj", "o_proj"]}
    first, second, third = (adapted(cluster, seed, **targets) for seed in (1, 2, 3))
    group.update_weights(version="a", adapters={"math": first, "agent-v1": second})
    assert_serves(cluster, "math", first)
    assert_serves(cluster, "agent-v1", second)
    cluster.train()
    group.update_weights(cluster.model, version="b", adapters={"math": second, "agent-v1": None, "agent-v2": third})
    assert served() == [{"math": "b", "agent-v2": "b"}] * 2
    assert_serves(cluster, "math", adapted(cluster, 2, **targets))
    assert_serves(cluster, "agent-v2", adapted(cluster, 3, **targets))
    cluster.assert_serves_trainers_weights()
    experts = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    with pytest.raises(
        UpdateAborted, match=r"adapter math: it changes .*experts, which .*--lora-target-modules leave out"
    ):
        group.update_weights(version="c", adapters={"math": adapted(cluster, 4, **experts)})
    assert served() == [{"math": "b", "agent-v2": "b"}] * 2
    assert_serves(cluster, "math", adapted(cluster, 2, **targets))


def test_update_with_requests_on_one_rank_only(cluster: Cluster, group: EngineGroup) -> None:
    requests = [cluster.start(0, PROMPT, 200), cluster.start(0, PROMPT[1:], 200)]
    cluster.wait_in_flight(group, 0)
    with group.update(cluster.train(), timeout=60) as update:
        update.send(cluster.model)
    for request in requests:
        assert len(request.result(timeout=60)["token_ids"]) == 200
    cluster.assert_serves_trainers_weights()


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_pause_and_resume_under_load(cluster: Cluster, group: EngineGroup, mode: str) -> None:
    requests = [cluster.start(rank, PROMPT, 60) for rank in (0, 1)]
    cluster.wait_in_flight(group, 0, 1)
    group.pause(mode, timeout=30)  # type: ignore[arg-type]
    late = cluster.start(1, PROMPT, 4)
    time.sleep(0.3)
    assert not late.done()
    assert {state.generation for state in group.status()} == {"paused"}
    group.resume(timeout=30)
    for request in requests:
        choice = request.result(timeout=60)
        assert len(choice["token_ids"]) == 60 or (mode == "abort" and choice["finish_reason"] == "abort")
    assert late.result(timeout=60)["token_ids"] == cluster.oracle([PROMPT], tokens=4)[0]


def test_pause_of_an_idle_group_and_again(cluster: Cluster, group: EngineGroup) -> None:
    for _ in range(5):
        group.pause("keep", timeout=10)
        group.pause("keep", timeout=10)
        group.pause("abort", timeout=10)
        group.resume(timeout=10)
        group.resume(timeout=10)
    cluster.assert_serves_trainers_weights()


def test_two_clients_pause_and_resume_at_once(cluster: Cluster, group: EngineGroup) -> None:
    with cluster.connect() as other, ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for call in ("pause", "resume"):
                for future in [pool.submit(getattr(one, call), timeout=20) for one in (group, other)]:
                    future.result(timeout=30)
    assert {state.generation for state in group.status()} == {"running"}
    cluster.assert_serves_trainers_weights()


def test_pause_that_only_some_ranks_got_is_taken_back(cluster: Cluster, group: EngineGroup) -> None:
    """A rank pauses only with the consent of all: asked alone it waits, and runs again after its deadline."""
    import asyncio

    from areal_vllm_ext import AsyncEngineGroup, protocol
    from areal_vllm_ext.errors import RequestError

    async def pause_rank_0_alone() -> None:
        one = AsyncEngineGroup.connect(cluster.deployment.directory, key_file=cluster.key_file)
        async with one, one._commander.command("test", 10) as targets:
            target = next(iter(targets.values()))
            message = protocol.Pause(epoch=target.epoch, mode="keep", kv="keep", timeout=1.0)
            with pytest.raises(RequestError, match="the pause was cancelled"):
                await one._link.request(target.engine.address, message, 5.0)

    asyncio.run(pause_rank_0_alone())
    cluster.assert_serves_trainers_weights()
    group.pause("keep", timeout=10)
    group.resume(timeout=10)
    cluster.assert_serves_trainers_weights()


def test_staggered_arrival(cluster: Cluster, group: EngineGroup) -> None:
    """Rank 1 hears of the pause, and of the resume, a second after rank 0."""
    import asyncio

    from areal_vllm_ext import AsyncEngineGroup, protocol

    async def staggered() -> None:
        one = AsyncEngineGroup.connect(cluster.deployment.directory, key_file=cluster.key_file)
        async with one, one._commander.command("test", 30) as targets:
            for make in (
                lambda epoch: protocol.Pause(epoch=epoch, mode="keep", kv="keep", timeout=20.0),
                lambda epoch: protocol.Resume(epoch=epoch),
            ):
                tasks = []
                for target in targets.values():
                    request = one._link.request(target.engine.address, make(target.epoch), 20.0)
                    tasks.append(asyncio.create_task(request))
                    await asyncio.sleep(1.0)
                await asyncio.gather(*tasks)

    requests = [cluster.start(rank, PROMPT, 100) for rank in (0, 1)]
    asyncio.run(staggered())
    for request in requests:
        assert request.result(timeout=60)["token_ids"] == cluster.oracle([PROMPT], tokens=100)[0]


def test_wait_over_its_deadline_is_taken_back(cluster: Cluster, group: EngineGroup) -> None:
    request = cluster.start(1, PROMPT, 250)
    cluster.wait_in_flight(group, 1)
    with pytest.raises(PauseFailed):
        group.pause("wait", timeout=0.3)
    assert len(request.result(timeout=100)["token_ids"]) == 250
    cluster.assert_serves_trainers_weights()
