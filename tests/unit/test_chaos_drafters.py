"""The fault programs tell by vLLM's counters whether an engine drafts with the weights that it claims."""

from __future__ import annotations

from itertools import accumulate

import pytest

from chaos.drafters import counted, rejected


def metrics(drafted: int, accepted: int) -> str:
    """/metrics of two engines; these are the counters of engine 1."""
    label, lines = '{engine="%d",model_name="m"}', ["# HELP vllm:spec_decode_num_draft_tokens_total Number"]
    for engine, counters in ((0, (7, 0)), (1, (drafted, accepted))):
        for name, value in zip(("draft", "accepted"), counters, strict=True):
            lines.append(f"vllm:spec_decode_num_{name}_tokens_total{label % engine} {float(value)}")
    lines.append('vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",position="0"} 5.0')
    return "\n".join(lines)


def test_each_engine_has_counters_of_its_own() -> None:
    assert (counted(metrics(12, 9), 0), counted(metrics(12, 9), 1), counted("", 1)) == ((7, 0), (12, 9), (0, 0))


@pytest.mark.parametrize(
    ("windows", "problem"),
    [
        ([(30, 30)], ""),
        ([(30, 28)], ""),
        # An update met a request of the first attempt.
        ([(30, 20), (30, 30)], ""),
        ([(0, 0), (30, 30)], ""),
        ([(90, 1)] * 9, "1 of 90 drafted tokens were accepted"),
        ([(0, 0)] * 9, "0 of 0 drafted tokens were accepted"),
    ],
)
def test_a_drafter_is_right_if_almost_all_of_its_tokens_are_accepted(
    windows: list[tuple[int, int]], problem: str
) -> None:
    totals = list(accumulate(windows, lambda one, other: (one[0] + other[0], one[1] + other[1]), initial=(5, 3)))
    asked: list[None] = []
    assert rejected(lambda: metrics(*totals[len(asked)]), lambda: asked.append(None), 1) == problem
    assert len(asked) <= 4
