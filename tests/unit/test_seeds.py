"""Seeds of the simulation that broke a promise once break none now."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

import chaos.simulate
from chaos.simulate import play, round_of
from chaos.simulation import simulated_time

FILE = Path(chaos.simulate.__file__).with_name("seeds.txt")
SEEDS = [line.split(maxsplit=2)[:2] for line in FILE.read_text().splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(("kind", "seed"), SEEDS, ids=[" ".join(seed) for seed in SEEDS])
def test_a_seed_that_failed_once(kind: str, seed: str) -> None:
    assert kind in ("simulated", "swarm")
    options = argparse.Namespace(swarm=kind == "swarm", engines=0, trace=False, only="")
    with simulated_time():
        violation = play(round_of(options, int(seed)))
    assert violation is None, f"python -m chaos --{kind} --rounds 1 --seed {seed} --trace: {violation}"
