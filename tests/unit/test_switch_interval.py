"""The switch interval is short during an update, and the usual one afterwards."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from waiting import eventually

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.process.switch_interval import ShortSwitchInterval

if TYPE_CHECKING:
    from pathlib import Path

    from harness.simulated_engine import Deployment


@pytest.fixture
def usual() -> float:
    return sys.getswitchinterval()


def test_the_last_block_restores_the_interval(usual: float) -> None:
    with ShortSwitchInterval():
        with pytest.raises(ValueError, match="inner"), ShortSwitchInterval():
            raise ValueError("inner")
        assert sys.getswitchinterval() < usual / 10
    assert sys.getswitchinterval() == usual


def test_a_second_end_takes_nothing_from_others(usual: float) -> None:
    once = ShortSwitchInterval()
    with ShortSwitchInterval():
        once.begin()
        once.begin()
        once.end()
        once.end()
        assert sys.getswitchinterval() < usual / 10
    assert sys.getswitchinterval() == usual


def test_the_interval_is_short_until_an_update_is_over(deployment: Deployment, key_file: Path, usual: float) -> None:
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
