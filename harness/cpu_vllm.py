"""A real vLLM on a small machine without a GPU: its settings, training steps that change its tokens, and the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.model import greedy_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = [[10, 20, 30], [5, 6, 7, 8, 9], [100, 3, 50, 7]]
TOKENS = 16
# All engines share the machine's cores, so no engine binds its threads to some of them.
CPU_ARGS = ("--enforce-eager", "--max-model-len=512", "--dtype=float32", f"--kv-cache-memory-bytes={1 << 27}")
# The worker in the process of its EngineCore. vLLM for CPU gives it a process of its own, which imports vLLM: 6 s of CPU.
ONE_PROCESS = ("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor")
CPU_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def train(model: PreTrainedModel, step: int) -> None:
    """Move the weights far enough to change the tokens."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def token_exact(model: PreTrainedModel, url: str, engines: int) -> bool:
    """Return whether every engine generates the tokens of Hugging Face's ``generate``."""
    expected = greedy_tokens(model, PROMPTS, TOKENS)
    completions = Completions(url)
    return all(completions.greedy(PROMPTS, tokens=TOKENS, engine=rank) == expected for rank in range(engines))
