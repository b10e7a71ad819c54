"""Every guard that ``chaos.mutants`` removes is in the code, so that no mutant proves nothing."""

from __future__ import annotations

from pathlib import Path

import areal_vllm_ext
from chaos.mutants import MUTANTS, SWARM, TESTS, pattern

PACKAGE = Path(areal_vllm_ext.__file__).parent


def test_every_guard_is_in_the_code_once() -> None:
    code = {file: (PACKAGE / file).read_text() for edits in MUTANTS.values() for file, _, _ in edits}
    missing = [
        f"{name}: {file} has {guard!r} {count} times: name the guard in chaos/mutants.py or chaos/guards.txt anew"
        for name, edits in MUTANTS.items()
        for file, guard, _ in edits
        if (count := len(pattern(guard).findall(code[file]))) != 1
    ]
    assert not missing, "\n".join(missing)


def test_every_mutant_has_one_way_to_be_found() -> None:
    assert TESTS.keys() <= MUTANTS.keys()
    assert MUTANTS.keys() >= SWARM
    assert not SWARM & TESTS.keys()


def test_the_test_that_shows_a_guard_exists() -> None:
    tests = {test.partition("::")[::2] for test in TESTS.values()}
    here = Path(__file__).parent
    missing = [one for one in tests if f"def {one[1] or 'test_'}" not in (here / one[0]).read_text()]
    assert not missing
