"""Adapters for the model of a deployment, and the oracle: the greedy tokens of peft's own model, on every engine."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import torch
from cluster import PROMPTS

from harness.peft_models import with_adapter

if TYPE_CHECKING:
    from cluster import Cluster

TOKENS = 8
LONG = random.Random(1).choices(range(3, 100), k=305)  # many blocks of the prefix cache


def adapted(cluster: Cluster, seed: int, **options: Any) -> Any:
    """The trainer's model with an adapter that changes its tokens."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]} | options
    return with_adapter(copy.deepcopy(cluster.model), seed, 0.15, **settings)


def tokens_of(model: Any, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    generated = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
    return generated[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def assert_serves(cluster: Cluster, name: str, model: Any) -> None:
    for prompt in (PROMPTS[0], LONG):
        expected = tokens_of(model, prompt)
        for rank in (0, 1):
            served = cluster.complete(rank, prompt, TOKENS, name)["token_ids"]
            assert served == expected, (name, rank, len(prompt))
