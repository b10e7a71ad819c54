"""The demo's model, a tiny random Qwen3, and Hugging Face's greedy tokens from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

COLOURS = ("red", "green", "blue", "gold")
"""Classes of words; ``task.py`` asks for words of one class."""

UNKNOWN, PAD = "<unk>", "<pad>"
SPECIALS = (UNKNOWN, PAD, "name", ".")
WORDS_PER_COLOUR = 62
VOCABULARY = (*SPECIALS, *COLOURS, *(f"{colour}{i}" for colour in COLOURS for i in range(WORDS_PER_COLOUR)))
"""256 words; the index in this tuple is the token id."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a WordLevel tokenizer over ``VOCABULARY``: words are separated by spaces, and each word is a token."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN, pad_token=PAD, model_max_length=512)


def make_model(
    directory: Path | str,
    *,
    moe: bool = False,
    seed: int = 0,
    tie_word_embeddings: bool = True,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Make a tiny random Qwen3 (or Qwen3-MoE), save it to ``directory``, and return it.

    The same arguments give the same weights. The directory has everything that ``vllm serve`` needs: config, safetensors,
    tokenizer and generation config.
    """
    shape: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        # Wider than the usual 0.02. With 0.02, layers of this size hardly count beside the residual stream, so the model
        # would only repeat the last token, and tokens could not distinguish two sets of weights.
        "initializer_range": 0.1,
        "tie_word_embeddings": tie_word_embeddings,
        # No end of sequence, so that answers have the requested length, with vLLM and with Hugging Face.
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": VOCABULARY.index(PAD),
        "dtype": dtype,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if moe:
            experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
            model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model = model.to(dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=model.config.pad_token_id)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return model


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Return Hugging Face's greedy continuation of each prompt, which an engine with these weights must generate too."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=VOCABULARY.index(PAD))
    answers: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:  # batches of one length need no padding
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[place]) for place in places], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        answers.update(zip(places, out[:, length:].tolist(), strict=True))
    return [answers[place] for place in range(len(prompts))]
