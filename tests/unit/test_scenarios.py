"""Scenarios of the simulation do what their text says."""

from __future__ import annotations

from pathlib import Path

import pytest

import chaos.scenarios.player
from chaos.scenarios.player import played
from chaos.simulation import simulated_time

FILES = sorted(Path(chaos.scenarios.player.__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_scenario_goes_as_its_text_says(file: Path) -> None:
    """``python -m chaos.scenarios --rewrite`` writes what happens now into the files: read the diff."""
    text = file.read_text()
    with simulated_time():
        assert played(text) == text


def test_an_unknown_command_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such command: explode"):
        played("engines 2\n\nexplode\n")
