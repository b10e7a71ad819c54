"""The task that the demo learns: the prompt names a colour, and the answer should be different words of that colour.

A good answer to "blue7 red31 gold2 name green" is "green5 green61 green12 ...". A word is worth 1 if it has the right
colour and is new in this answer, otherwise 0. The reward of an answer is the mean over its words, so a random model gets
0.25. Because the words must differ, the policy does not collapse into one word. Its tokens change in every step, so a
comparison of tokens notices an engine that missed an update.
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
    """Return the token ids of a prompt: some words of any colour, then ``name`` and the wanted colour."""
    noise: list[int] = torch.randint(_FIRST_WORD, len(VOCABULARY), (noise_words,), generator=random).tolist()
    return [*noise, _IDS["name"], _IDS[colour]]


def word_rewards(prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Return the reward of each word of an answer; the reward of the answer is their mean."""
    first = _FIRST_WORD + WORDS_PER_COLOUR * COLOURS.index(VOCABULARY[prompt[-1]])
    right = range(first, first + WORDS_PER_COLOUR)
    return [float(word in right and word not in answer[:i]) for i, word in enumerate(answer)]


def as_text(ids: Sequence[int]) -> str:
    """Return the words of a list of token ids."""
    return " ".join(VOCABULARY[i] for i in ids)
