"""One engine in this process, and what it says: tokens with log-probabilities, or what a pooling model returns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .families import Family

PROMPTS = [[10, 20, 30, 100], [5, 6, 7, 8, 9]]
TOKENS = 8

# For each prompt: the greedy tokens (of a pooling model: none), and the log-probability of each (of a pooling model: values).
Said = list[tuple[list[int], list[float]]]

SETTINGS: dict[str, Any] = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 1 << 27,
    "disable_log_stats": True,
}


class Engine:
    """vLLM's ``LLM`` without another process."""

    def __init__(self, family: Family, folder: Path, *, updatable: bool) -> None:
        """
        Args:
            family: what is served.
            folder: its checkpoint.
            updatable: whether it gets our worker extension.
        """
        from vllm import LLM

        settings = SETTINGS | {"dtype": family.dtype} | family.engine
        if family.drafter:
            drafter = {"method": "draft_model", "model": str(folder / "drafter"), "num_speculative_tokens": 3}
            settings |= {"speculative_config": drafter, "disable_log_stats": False}
        if updatable:
            settings["worker_extension_cls"] = "areal_vllm_ext.worker.WorkerExtension"
        self._family = family
        self.llm = LLM(str(folder), **settings)

    @property
    def worker(self) -> Any:
        client: Any = self.llm.llm_engine.engine_core
        return client.engine_core.model_executor.driver_worker.worker

    def says(self) -> Said:
        """Return the engine's answer to each prompt."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts: list[Any] = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
        match self._family.task:
            case "classify":
                return [([], list(one.outputs.probs)) for one in self.llm.classify(prompts, use_tqdm=False)]
            case "embed":
                return [([], list(one.outputs.embedding)) for one in self.llm.embed(prompts, use_tqdm=False)]
            case "image":
                from .images import PROMPT, pictures

                prompts = [{"prompt": PROMPT, "multi_modal_data": {"image": one}} for one in pictures()]
        options = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
        said: Said = []
        for answer in self.llm.generate(prompts, options, use_tqdm=False):
            output = answer.outputs[0]
            tokens = list(output.token_ids)
            said.append((tokens, [one[token].logprob for one, token in zip(output.logprobs, tokens, strict=True)]))
        return said

    def accepted(self) -> tuple[int, int]:
        """Return how many tokens of the drafter were accepted until now, and how many it made."""
        counted = {one.name: getattr(one, "value", 0) for one in self.llm.get_metrics()}
        return tuple(counted.get(f"vllm:spec_decode_num_{what}_tokens", 0) for what in ("accepted", "draft"))


def hugging_face_says(family: Family, model: Any) -> Said:
    """Return the answers of a model of transformers."""
    import torch

    if family.task == "image":
        from . import images

        make = images.processor()
        asked = [dict(make(images=one, text=images.PROMPT, return_tensors="pt")) for one in images.pictures()]
    else:
        asked = [{"input_ids": torch.tensor([prompt])} for prompt in PROMPTS]
    said: Said = []
    for inputs in asked:
        ids = inputs["input_ids"]
        with torch.no_grad():
            out = model.generate(
                **(inputs | {"attention_mask": torch.ones_like(ids)}),
                max_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = out.sequences[0, ids.shape[1] :].tolist()
        rows = [one[0].float().log_softmax(-1) for one in out.logits]
        said.append((tokens, [float(row[token]) for row, token in zip(rows, tokens, strict=True)]))
    return said


def distance(one: Said, other: Said) -> float:
    """Return the largest difference of two values; infinite where tokens differ."""
    worst = 0.0
    for (tokens, values), (other_tokens, other_values) in zip(one, other, strict=True):
        if list(tokens) != list(other_tokens):
            return math.inf
        worst = max([worst, *(abs(a - b) for a, b in zip(values, other_values, strict=True))])
    return worst
