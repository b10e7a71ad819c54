"""Work beside generation rests while requests are served, and ends when it must."""

from __future__ import annotations

import time

import pytest

from areal_vllm_ext.worker import pace


@pytest.mark.parametrize("serves", [True, False])
def test_work_rests_only_while_requests_are_served(monkeypatch: pytest.MonkeyPatch, serves: bool) -> None:
    rests: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", rests.append)
    checks: list[int] = []
    step = pace.Pace(lambda: serves, lambda: checks.append(1))
    end = time.perf_counter() + 0.02
    while time.perf_counter() < end:
        step()
    assert bool(rests) == serves
    assert 1 < len(checks) <= 41, "once in half a millisecond"


def test_work_ends_when_it_is_given_up() -> None:
    def check() -> None:
        raise RuntimeError("given up")

    with pytest.raises(RuntimeError, match="given up"):
        pace.Pace(lambda: False, check)()
