"""The history of a real deployment for ``history.py``: its updates, and what its engines answer all the time.

A thread for each engine sends greedy requests without a break. vLLM says which version sampled which tokens of an answer. The
tokens prove it: with these weights, Hugging Face's model continues what came before with the same tokens.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from areal_vllm_ext.demo.completions import Completions, Span
from areal_vllm_ext.errors import ArealError

from .history import Outcome, Read, Write, problems

if TYPE_CHECKING:
    from .fault_trainer import Adapters, Weights

# Two prompts of different length, the longer of which fills blocks of the prefix cache.
PROMPTS = ([10, 20, 30], [7 + index % 200 for index in range(64)])
TOKENS = 24
# vLLM's name of the weights with which an engine starts; here they are version 0.
FIRST = "default"
# Two tokens whose logits differ by no more tie on a GPU, which computes otherwise than the oracle's CPU, by up to 0.003. Other
# weights differ by nats.
TIE_ON_GPU = 0.01
# The same where the engines compute in bfloat16.
TIE_16_BITS = 0.15
_PAUSE_SECONDS = 0.1
_ANSWER_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Part:
    """The tokens of an answer that one version sampled, and all tokens before them."""

    engine: str
    version: object
    before: tuple[int, ...]
    tokens: tuple[int, ...]
    started: float
    ended: float


def parts_of(engine: str, prompt: Sequence[int], answer: Sequence[Span], started: float, ended: float) -> list[Part]:
    """Return the parts of an answer; each was sampled at some time between ``started`` and ``ended``."""
    found, before = [], tuple(prompt)
    for span in answer:
        version = 0 if span.version == FIRST else int(span.version)
        found.append(Part(engine, version, before, tuple(span.tokens), started, ended))
        before += tuple(span.tokens)
    return found


class Prover:
    """Finds out which version's weights made the tokens of a part."""

    def __init__(self, weights: Weights | Adapters, tie: float = 0.0) -> None:
        self._weights, self._tie = weights, tie

    def reads(self, parts: Iterable[Part], versions: Sequence[object]) -> list[Read]:
        """Return the parts as reads; ``versions`` are those to try where tokens do not fit the claimed version."""
        by_version: dict[object, list[Part]] = {}
        for part in parts:
            by_version.setdefault(part.version, []).append(part)
        found = []
        for version, its_parts in by_version.items():
            for part, fits in zip(its_parts, self._fit(version, its_parts), strict=True):
                proven = version if fits else self._other(part, versions)
                found.append(Read(part.engine, version, proven, part.started, part.ended))
        return found

    def _other(self, part: Part, versions: Sequence[object]) -> object:
        return next((one for one in reversed(versions) if one != part.version and self._fit(one, [part])[0]), None)

    @torch.no_grad()
    def _fit(self, version: object, parts: Sequence[Part]) -> list[bool]:
        assert isinstance(version, int)
        model = self._weights.set(version)
        return [continues(model, part.before, part.tokens, self._tie) for part in parts]


def continues(model: Callable[..., object], before: Sequence[int], tokens: Sequence[int], tie: float = 0.0) -> bool:
    """Return whether a model greedily continues ``before`` with ``tokens``, where logits that differ by ``tie`` are equal."""
    logits = model(torch.tensor([[*before, *tokens][:-1]])).logits[0, len(before) - 1 :]  # type: ignore[attr-defined]
    chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return bool((logits.max(-1).values - chosen <= tie).all())


class Observer:
    """Asks every engine without a break, inside of its context.

    Attributes:
        count: how many parts of answers were checked.
    """

    def __init__(
        self, url: str, ranks: Sequence[int], weights: Weights | Adapters, adapter: str = "", tie: float = 0.0
    ) -> None:
        self.count = 0
        self._completions = Completions(url, timeout=_ANSWER_SECONDS, adapter=adapter)
        self._prover = Prover(weights, tie)
        self._writes = [Write(0, -math.inf, -math.inf, "committed")]
        self._reads: list[Read] = []
        self._unproven: list[Part] = []
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(rank,), daemon=True) for rank in ranks]

    def __enter__(self) -> Observer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def wrote(self, version: int, started: float, ended: float, said: str) -> None:
        """Note an update and its outcome, as the trainer said it."""
        outcome: Outcome = "unknown"
        if said == "committed":
            outcome = "committed"
        elif said.startswith("aborted"):
            outcome = "aborted"
        self._writes.append(Write(version, started, ended, outcome))

    def problems(self) -> list[str]:
        """Return what is wrong with the history and was not returned before; no update is in progress."""
        with self._lock:
            parts, self._unproven = self._unproven, []
        self.count += len(parts)
        self._reads += self._prover.reads(parts, [write.version for write in self._writes])
        new = [what for what in problems(self._writes, self._reads) if what not in self._told]
        self._told.update(new)
        return new

    def _ask(self, rank: int) -> None:
        """Send request after request to an engine, until the context is left. Requests that fail tell nothing."""
        number = rank
        while not self._over.wait(_PAUSE_SECONDS):
            prompt = PROMPTS[(number := number + 1) % len(PROMPTS)]
            started = time.monotonic()
            try:
                answer = self._completions.spans(prompt, tokens=TOKENS, engine=rank)
            except ArealError:  # it is stopped, or has ended
                continue
            parts = parts_of(f"engine {rank}", prompt, answer, started, time.monotonic())
            with self._lock:
                self._unproven += parts
