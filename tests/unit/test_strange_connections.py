"""The short form of ``python -m chaos.strangers``: bad frames and strange connections at every port while updates go on."""

from __future__ import annotations

import pytest

from chaos.strangers import attack


@pytest.mark.timeout(240)
def test_strangers_at_every_port_cost_engines_and_trainer_nothing() -> None:
    facts = attack(frames=800, connections=400, processes=1)
    assert facts["problems"] == []
    assert facts["updates"] >= 10
    assert facts["rendezvous"] >= 3
    assert facts["lifelines_lost"] == 0
    for process in facts["processes"].values():
        before, most, after = process["descriptors"]
        assert before < most, "no stranger was let in as far as a descriptor"
        assert after <= before + 5
