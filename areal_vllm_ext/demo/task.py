"""The task that the demo learns: the prompt names a colour, and the answer should be different words of that colour.

"blue7 red31 gold2 name green" is well answered by "green5 green61 green12 ...". Each word of an answer is worth 1 if it
is of the right colour and has not been said before, else 0, and an answer's reward is the mean over its words: a random
model gets a quarter. That the words must differ keeps the policy from collapsing into one word: its tokens go on
changing from step to step, so that a comparison of tokens notices an engine that missed an update.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .model import COLOURS, SPECIALS, VOCABULARY, WORDS_PER_COLOUR

if TYPE_CHECKING:
    from collections.abc import Sequence

ANSWER_WORDS = 8
_IDS = {word: i for i, word in enumerate(VOCABULARY)}
_FIRST_WORD = len(SPECIALS) + len(COLOURS)


def make_prompt(colour: str, random: torch.Generator, *, noise_words: int = 3) -> list[int]:
    """Token ids of a prompt: some words of any colour, then ``name`` and the colour that is asked for."""
    noise: list[int] = torch.randint(_FIRST_WORD, len(VOCABULARY), (noise_words,), generator=random).tolist()
    return [*noise, _IDS["name"], _IDS[colour]]


def word_rewards(prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """The worth of each word of an answer; the answer's reward is their mean."""
    first = _FIRST_WORD + WORDS_PER_COLOUR * COLOURS.index(VOCABULARY[prompt[-1]])
    right = range(first, first + WORDS_PER_COLOUR)
    return [float(word in right and word not in answer[:i]) for i, word in enumerate(answer)]


def as_text(ids: Sequence[int]) -> str:
    """The words of a list of token ids."""
    return " ".join(VOCABULARY[i] for i in ids)
