"""Every row of the table "Outcomes" in docs/transactions.md: what the trainer gets, and what the engines then do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_transaction import refusing_commits
from waiting import eventually

from areal_vllm_ext import ArealError, EngineGroup
from harness.simulated_engine import NEVER, Deployment

PAGE = Path(__file__).parents[2] / "docs" / "transactions.md"


def rows() -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    table = PAGE.read_text().partition("## Outcomes")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells[2:]}


@pytest.fixture
def group(deployment: Deployment, key_file: Path) -> Iterator[EngineGroup]:
    with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
        client.wait_ready(2, timeout=10)
        client.update_weights("/checkpoint", version=1, timeout=10)
        yield client


def outcome_of(group: EngineGroup, timeout: float = 10.0) -> str:
    """Update to version 2; returns the name of what the trainer gets, as the table writes it."""
    try:
        result = group.update_weights("/checkpoint", version=2, timeout=timeout)
    except ArealError as error:
        return f"`{type(error).__name__}`"
    return "`UpdateResult` with `lost`" if result.lost else "`UpdateResult`"


def states(group: EngineGroup) -> list[tuple[object, str, str]]:
    return [(state.version, state.generation, state.update_phase) for state in group.status()]


OLD, NEW, TAINTED = (1, "running", "idle"), (2, "running", "idle"), ("?", "paused", "tainted")
Scenario = Callable[[Deployment, pytest.MonkeyPatch, EngineGroup], str]
SCENARIOS: dict[str, tuple[Scenario, list[tuple[object, str, str]]]] = {}


def scenario(row: str, *expected: tuple[object, str, str]) -> Callable[[Scenario], Scenario]:
    def add(played: Scenario) -> Scenario:
        SCENARIOS[row] = (played, list(expected))
        return played

    return add


@scenario("every engine committed", NEW, NEW)
def all_commit(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, group: EngineGroup) -> str:
    return outcome_of(group)


@scenario("given up before the first commit", OLD, OLD)
def given_up(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, group: EngineGroup) -> str:
    deployment.engines[1].seconds["pause"] = NEVER
    return outcome_of(group, timeout=1.0)


@scenario("some engines failed after the first commit", NEW, TAINTED)
def some_fail(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, group: EngineGroup) -> str:
    deployment.engines[1].errors["commit"] = "out of memory"
    return outcome_of(group)


@scenario("every engine refused the commit before it touched its weights", OLD, OLD)
def all_refuse(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, group: EngineGroup) -> str:
    with refusing_commits(deployment, monkeypatch, (0, 1)):
        return outcome_of(group)


@scenario("the commit failed on every engine, or on the only one", TAINTED, TAINTED)
def all_fail(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, group: EngineGroup) -> str:
    for engine in deployment.engines.values():
        engine.errors["commit"] = "out of memory"
    return outcome_of(group)


@scenario("the time ended while commits were under way, and no engine answered", NEW, NEW)
def in_doubt(deployment: Deployment, monkeypatch: pytest.MonkeyPatch, group: EngineGroup) -> str:
    for engine in deployment.engines.values():
        engine.seconds["commit"] = 2.5
    return outcome_of(group, timeout=1.0)


@pytest.mark.parametrize("row", rows())
def test_what_the_trainer_gets_says_what_the_engines_serve(
    row: str, deployment: Deployment, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    played, expected = next(found for name, found in SCENARIOS.items() if row.startswith(name))
    gets, serves, generates, _ = rows()[row]
    outcome = played(deployment, monkeypatch, group)
    assert outcome in re.split(r", (?=`)", gets), gets

    def as_expected() -> bool:
        found = [("?", *rest) if "tainted" in rest else (version, *rest) for version, *rest in states(group)]
        return found == expected

    eventually(as_expected, timeout=15)
    assert ("new version" in serves) == (NEW in expected)
    assert ("before" in serves or "old" in serves) == (
        OLD in expected or "doubt" in outcome.lower() or "(on some" in row
    )
    assert ("do not" in generates) == (TAINTED in expected)


def test_every_scenario_is_a_row_of_the_table() -> None:
    assert len(rows()) == len(SCENARIOS)
    for name in SCENARIOS:
        assert any(row.startswith(name) for row in rows()), name
