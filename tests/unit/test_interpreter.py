"""Threads of an update get the interpreter's lock soon, and the engine its own way of things back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from waiting import eventually

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.process import interpreter

if TYPE_CHECKING:
    from pathlib import Path

    from simulated_engine import Deployment


@pytest.fixture
def usual() -> float:
    return sys.getswitchinterval()


def test_the_last_who_wants_it_ends_it(usual: float) -> None:
    interpreter.hurry("one", True)
    interpreter.hurry("two", True)
    interpreter.hurry("one", False)
    assert sys.getswitchinterval() < usual / 10
    interpreter.hurry("two", False)
    interpreter.hurry("two", False)
    assert sys.getswitchinterval() == usual


def test_an_update_hurries_until_it_is_over(deployment: Deployment, key_file: Path, usual: float) -> None:
    seen: dict[str, float] = {}
    with EngineGroup.connect(deployment.directory, key_file=key_file) as group:
        group.wait_ready(len(deployment.engines), timeout=20)
        with group.update(1, on_phase=lambda phase: seen.update({phase: sys.getswitchinterval()})) as update:
            update.send("/nowhere")
        eventually(lambda: sys.getswitchinterval() == usual)
        deployment.engines[1].errors["prepare"] = "no room"
        with pytest.raises(UpdateAborted, match="no room"), group.update(2) as update:
            update.send("/nowhere")
        eventually(lambda: sys.getswitchinterval() == usual)
    assert {phase for phase, seconds in seen.items() if seconds < usual / 10} >= {"prepare", "commit", "resume"}
