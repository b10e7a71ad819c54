"""Every guard that ``chaos.mutants`` removes is in the code, so that no mutant proves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

import areal_vllm_ext
from chaos.mutants import MUTANTS, SWARM, TESTS, pattern

PACKAGE = Path(areal_vllm_ext.__file__).parent


@pytest.mark.parametrize("name", MUTANTS)
def test_the_guard_is_in_the_code_once(name: str) -> None:
    for file, guard, _ in MUTANTS[name]:
        found = pattern(guard).findall((PACKAGE / file).read_text())
        assert len(found) == 1, f"chaos/mutants.py: {file} has {guard!r} {len(found)} times: name the guard there anew"


def test_every_mutant_has_one_way_to_be_found() -> None:
    assert TESTS.keys() <= MUTANTS.keys()
    assert MUTANTS.keys() >= SWARM
    assert not SWARM & TESTS.keys()


@pytest.mark.parametrize("name", TESTS)
def test_the_test_that_shows_a_guard_exists(name: str) -> None:
    file, _, function = TESTS[name].partition("::")
    assert f"def {function or 'test_'}" in (Path(__file__).parent / file).read_text()
