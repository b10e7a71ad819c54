"""What an update raises says what the engines serve afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from groups import update

from areal_vllm_ext import ArealError, EngineGroup, UpdateAborted, UpdateInDoubt, WeightsTainted
from harness.simulated_engine import NEVER, Deployment


def served(group: EngineGroup) -> list[tuple[str, str, object]]:
    return [(state.update_phase, state.generation, state.version) for state in group.status()]


def test_a_commit_that_fails_on_every_engine_says_that_all_are_tainted(
    deployment: Deployment, group: EngineGroup
) -> None:
    for engine in deployment.engines.values():
        engine.errors["commit"] = "out of memory"
    with pytest.raises(WeightsTainted, match=r"out of memory.*partially loaded.*send another update") as raised:
        update(group, 1, timeout=10)
    assert all(engine.name in str(raised.value) for engine in deployment.engines.values())
    assert [(phase, generation) for phase, generation, _ in served(group)] == [("tainted", "paused")] * 2
    for engine in deployment.engines.values():
        engine.errors.clear()
    update(group, 2, timeout=10)
    assert served(group) == [("idle", "running", 2)] * 2


def test_a_commit_that_every_engine_refuses_untouched_is_aborted(
    deployment: Deployment, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(group, 1, timeout=10)
    with refusing_commits(deployment, monkeypatch, (0, 1)), pytest.raises(UpdateAborted, match="resumed by others"):
        update(group, 2, timeout=10)
    assert served(group) == [("idle", "running", 1)] * 2
    update(group, 3, timeout=10)
    assert served(group) == [("idle", "running", 3)] * 2


def test_a_commit_that_one_engine_refuses_and_another_fails_names_the_tainted_one(
    deployment: Deployment, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    update(group, 1, timeout=10)
    deployment.engines[1].errors["commit"] = "out of memory"
    with (
        refusing_commits(deployment, monkeypatch, (0,)),
        pytest.raises(WeightsTainted, match="all other engines serve their old weights") as raised,
    ):
        update(group, 2, timeout=10)
    assert f"paused with a partially loaded set of weights: {deployment.engines[1].name};" in str(raised.value)
    first, second = served(group)
    assert first == ("idle", "running", 1)
    assert second[:2] == ("tainted", "paused")


def test_a_commit_that_no_engine_answers_is_in_doubt(deployment: Deployment, group: EngineGroup) -> None:
    deployment.engines[0].errors["commit"] = "out of memory"
    deployment.engines[1].seconds["commit"] = NEVER
    with pytest.raises(UpdateInDoubt) as raised:
        update(group, 1, timeout=1.0)
    assert f"; tainted and paused: {deployment.engines[0].name};" in str(raised.value)


@contextlib.contextmanager
def refusing_commits(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, engines: tuple[int, ...]
) -> Iterator[None]:
    """These engines refuse the commit before anything is touched."""
    with monkeypatch.context() as patch:
        for number in engines:
            participant = deployment.engines[number].endpoint.participant
            refuse = participant._refuse
            patch.setattr(
                participant, "_commit", lambda caller, _, refuse=refuse: refuse(caller, "state", "resumed by others")
            )
        yield


def test_a_prepared_update_is_held_until_its_block_is_left(deployment: Deployment, group: EngineGroup) -> None:
    with group.update(1, timeout=10) as opened:
        opened.send("/nowhere")
        opened.prepare()
        assert served(group) == [("prepared", "running", 0)] * 2, "old weights, while it is held"
        with pytest.raises(ArealError, match="twice"):
            opened.prepare()
    assert served(group) == [("idle", "running", 1)] * 2
    assert opened.result.version == 1


def test_a_prepared_update_whose_block_fails_leaves_the_old_weights(deployment: Deployment, group: EngineGroup) -> None:
    with contextlib.suppress(KeyError), group.update(1, timeout=10) as opened:
        opened.send("/nowhere")
        opened.prepare()
        raise KeyError
    assert served(group) == [("idle", "running", 0)] * 2


def test_a_no_ends_the_update_when_it_is_prepared(deployment: Deployment, group: EngineGroup) -> None:
    deployment.engines[1].errors["prepare"] = "no room"
    with contextlib.suppress(UpdateAborted), group.update(1, timeout=10) as opened:
        opened.send("/nowhere")
        with pytest.raises(UpdateAborted, match="no room"):
            opened.prepare()
        raise UpdateAborted
    assert served(group) == [("idle", "running", 0)] * 2
