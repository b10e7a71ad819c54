"""What engines of the real fault program answer becomes reads, which the tokens prove."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from lazily import Lazily

if TYPE_CHECKING:
    from pathlib import Path

    from areal_vllm_ext.demo.completions import Span
    from chaos.fault_trainer import Weights

demo_model = Lazily("areal_vllm_ext.demo.model")
completions = Lazily("areal_vllm_ext.demo.completions")
fault_trainer = Lazily("chaos.fault_trainer")
real_history = Lazily("chaos.real_history")

PROMPT = [10, 20, 30]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder: Path = tmp_path_factory.mktemp("model")
    demo_model.make_model(folder)
    loaded: Weights = fault_trainer.Weights(str(folder))
    return loaded


def continued(weights: Weights, version: int, before: list[int], tokens: int) -> list[int]:
    """The greedy continuation by the weights of ``version``."""
    options = {"max_new_tokens": tokens, "do_sample": False}
    found: list[int] = weights.set(version).generate(torch.tensor([before]), **options)[0].tolist()  # type: ignore[operator]
    return found[len(before) :]


def answer(weights: Weights) -> list[Span]:
    """An answer that the start weights began and version 1 went on with."""
    first = continued(weights, 0, PROMPT, 4)
    return [completions.Span("default", first), completions.Span("1", continued(weights, 1, [*PROMPT, *first], 6))]


def test_an_answer_over_an_update_is_a_read_of_each_version(weights: Weights) -> None:
    parts = real_history.parts_of("engine 0", PROMPT, answer(weights), 1.0, 2.0)
    assert [(part.version, len(part.before), len(part.tokens)) for part in parts] == [(0, 3, 4), (1, 7, 6)]
    reads = real_history.Prover(weights).reads(parts, [0, 1])
    assert [(read.version, read.proven, read.started, read.ended) for read in reads] == [
        (0, 0, 1.0, 2.0),
        (1, 1, 1.0, 2.0),
    ]


def test_tokens_of_another_version_are_told_from_those_of_none(weights: Weights) -> None:
    _, second = answer(weights)
    before = (*PROMPT, *answer(weights)[0].tokens)
    claimed = real_history.Part("engine 0", 2, before, tuple(second.tokens), 1.0, 2.0)
    none = real_history.Part("engine 0", 1, before, (*second.tokens[:-1], second.tokens[-1] ^ 1), 1.0, 2.0)
    reads = real_history.Prover(weights).reads([claimed, none], [0, 1, 2])
    assert [(read.version, read.proven) for read in reads] == [(2, 1), (1, None)]


@pytest.mark.parametrize(("behind", "tie", "fits"), [(0.005, 0.01, True), (0.05, 0.01, False), (0.005, 0.0, False)])
def test_a_token_that_ties_with_the_most_probable_one_continues(behind: float, tie: float, fits: bool) -> None:
    logits = torch.zeros(1, 3, 8)
    logits[0, :, 5] = 1.0
    logits[0, 2, 6] = 1.0 - behind

    def model(_: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    assert real_history.continues(model, [1, 2], [5, 6], tie) is fits


def test_versions_of_an_adapter_are_told_from_each_other_and_from_the_base_model(tmp_path: Path) -> None:
    demo_model.make_model(tmp_path)
    adapters = fault_trainer.Adapters(str(tmp_path))
    made = {version: tuple(continued(adapters, version, PROMPT, 6)) for version in (0, 1, 2)}
    assert made[0] == tuple(continued(fault_trainer.Weights(str(tmp_path)), 0, PROMPT, 6))
    parts = [real_history.Part("engine 0", 1, tuple(PROMPT), made[version], 1.0, 2.0) for version in made]
    assert [read.proven for read in real_history.Prover(adapters).reads(parts, [0, 1, 2])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("said", "claimed", "problem"),
    [
        ("committed", "1", ""),
        ("killed", "1", ""),
        ("aborted: an engine refused", "1", "that update was aborted"),
        ("committed", "2", "the tokens are of 1"),
        ("committed", "default", "the tokens are of 1"),
    ],
)
def test_the_history_of_a_deployment_is_judged(weights: Weights, said: str, claimed: str, problem: str) -> None:
    observer = real_history.Observer("http://127.0.0.1:9", [0], weights)
    tokens = continued(weights, 1, PROMPT, 6)
    observer.wrote(1, 1.0, 2.0, said)
    observer._unproven += real_history.parts_of("engine 0", PROMPT, [completions.Span(claimed, tokens)], 3.0, 4.0)
    found = "; ".join(observer.problems())
    assert (problem in found) if problem else not found
    assert observer.count == 1
    assert observer.problems() == [], "it was told before"
