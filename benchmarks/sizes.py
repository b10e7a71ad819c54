"""Models of many sizes with random weights: the trainer's model, and a checkpoint of its shape for vLLM.

The checkpoint is a safetensors file with a true header whose data is a hole in the file, so it takes no time and no disk.
It is for ``vllm serve --load-format dummy``: the engines' weights have a meaning only after the first update.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from areal_vllm_ext.client.weights import named_weights
from areal_vllm_ext.demo.model import greedy_tokens

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# By name. ``shape`` is hidden size, layers, heads, KV heads, width of the MLP, and vocabulary. ``experts`` is how many there
# are, how many each token is given to, and their width. ``family`` is Qwen3 if it is not named.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"shape": (128, 2, 4, 2, 256, 512), "head_dim": 32},
    "300mb": {"shape": (1024, 5, 16, 8, 3072, 6144), "head_dim": 64},  # in float32
    # A thousand matrices of 98 kB each, and norms. The hidden size depends on the dtype.
    "1000-tensors": {"shape": (0, 143, 3, 3, 192, 512), "head_dim": 64},
    "1gb-dense": {"shape": (2048, 8, 16, 8, 6144, 32768), "head_dim": 128},
    "qwen3-8b": {"shape": (4096, 36, 32, 8, 12288, 151936), "head_dim": 128},
    "tiny-moe": {"shape": (128, 2, 4, 2, 256, 512), "head_dim": 32, "experts": (8, 2, 64)},
    # 1,152 matrices of experts: 64 experts of three matrices in each of 6 layers.
    "1gb-moe": {"shape": (1024, 6, 16, 8, 3072, 32768), "head_dim": 64, "experts": (64, 8, 384)},
    # Qwen3-30B-A3B's shape with 8 of its 48 layers.
    "qwen3-30b-a3b-8l": {"shape": (2048, 8, 32, 4, 6144, 151936), "head_dim": 128, "experts": (128, 8, 768)},
    # With biases in attention.
    "tiny-qwen2": {"family": "qwen2", "shape": (128, 2, 4, 2, 256, 512)},
    "qwen2.5-7b": {"family": "qwen2", "shape": (3584, 28, 28, 4, 18944, 152064)},
    # DeepSeek-V2-Lite's shape (latent attention, shared experts) with 7 of its 27 layers.
    "tiny-deepseek": {"family": "deepseek", "shape": (128, 2, 4, 4, 256, 512), "experts": (8, 2, 64)},
    "deepseek-v2-lite-7l": {"family": "deepseek", "shape": (2048, 7, 16, 16, 10944, 102400), "experts": (64, 6, 1408)},
    # GPT-OSS-20B's shape in bf16 with 4 of its 24 layers.
    "tiny-gpt-oss": {"family": "gpt-oss", "shape": (128, 2, 4, 2, 128, 512), "head_dim": 32, "experts": (8, 2, 128)},
    "gpt-oss-20b-4l": {
        "family": "gpt-oss",
        "shape": (2880, 4, 64, 8, 2880, 201088),
        "head_dim": 64,
        "experts": (32, 4, 2880),
    },
}


class TrainerModel:
    """The trainer's model.

    Attributes:
        model: the Hugging Face model.
        nbytes, tensors: size and number of the tensors that an update sends.
    """

    def __init__(self, size: str, dtype: torch.dtype, device: torch.device) -> None:
        # The engines use the same cores. A torch thread that waits for a core delays all others: with two threads on two
        # cores, beside a busy engine, one text takes a minute.
        if device.type == "cpu":
            torch.set_num_threads(max((os.cpu_count() or 1) // 2, 1))
        self.model = _make(size, dtype, device)
        self.set(0)
        weights = self.weights()
        self.nbytes = sum(tensor.nbytes for _, tensor in weights)
        self.tensors = len(weights)

    @torch.no_grad()
    def set(self, version: int) -> None:
        """Set weights that follow from ``version`` alone; they are complete when this returns."""
        self.version = version
        parameters = list(self.model.parameters())
        generator = torch.Generator(parameters[0].device).manual_seed(version)
        for name, parameter in self.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1, generator=generator)
            elif parameter.dim() > 1:
                # Wide enough that versions differ in their tokens, narrow enough for moderate logits.
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5, generator=generator)
            else:
                parameter.normal_(1.0, 0.1, generator=generator)
        if parameters[0].is_cuda:
            torch.cuda.synchronize()

    def weights(self) -> list[tuple[str, torch.Tensor]]:
        """Return what an update sends: checkpoint names (one per expert) and full tensors."""
        weights = list(named_weights(self.model))
        if weights[0][1].is_cuda:  # tensors of experts are copies out of fused ones
            torch.cuda.synchronize()
        return weights

    def save(self, folder: Path, *, weights: bool) -> None:
        """Write a checkpoint.

        Args:
            folder: where to.
            weights: whether with the tensors. Without, ``vllm serve`` needs ``--load-format dummy``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        GenerationConfig(do_sample=False, pad_token_id=0).save_pretrained(folder)
        # vLLM needs a tokenizer to return log-probabilities. This one has a word for each token.
        words = {f"t{i}": i for i in range(self.model.config.vocab_size)}
        unknown = "t0"
        backend = Tokenizer(WordLevel(words, unk_token=unknown))
        backend.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown).save_pretrained(folder)
        if weights:
            save_file({name: tensor.contiguous() for name, tensor in self.weights()}, folder / "model.safetensors")
            return
        header: dict[str, dict[str, Any]] = {}
        end = 0
        for name, tensor in self.weights():
            start, end = end, end + tensor.nbytes
            dtype = _SAFETENSORS_DTYPES[tensor.dtype]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Return the oracle for float32: Hugging Face's own continuation of each prompt."""
        return greedy_tokens(self.model, prompts, tokens)

    @torch.no_grad()
    def logprobs(self, prompt: list[int]) -> list[float]:
        """Return the oracle for bf16: the log-probability of each token of ``prompt`` after those before it."""
        ids = torch.tensor([prompt], device=self.model.device)
        logprobs = self.model(ids).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()

    def logprobs_of_others(self, prompt: list[int]) -> list[float]:
        """Return ``logprobs`` under other weights than these."""
        version = self.version
        self.set(version + 1000)
        others = self.logprobs(prompt)
        self.set(version)
        return others


def _make(size: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    architecture, config = _architecture(size, dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = architecture(config)
    finally:
        torch.set_default_dtype(default)
    # Avoid ``model.to(dtype)``, which rounds the rotary embedding's frequencies; vLLM keeps them in float32.
    model = model.eval().requires_grad_(False)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def _architecture(size: str, dtype: torch.dtype) -> tuple[Callable[[Any], PreTrainedModel], PretrainedConfig]:
    known = SIZES[size]
    hidden, layers, heads, kv_heads, width, vocabulary = known["shape"]
    shape: dict[str, Any] = {
        "hidden_size": hidden or 512 // dtype.itemsize,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
        "dtype": dtype,
    }
    if "head_dim" in known:
        shape["head_dim"] = known["head_dim"]
    experts, chosen, expert_width = known.get("experts", (0, 0, 0))
    match known.get("family", "qwen3"):
        case "qwen2":
            return Qwen2ForCausalLM, Qwen2Config(**shape)
        case "deepseek":
            latent = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
            latent["v_head_dim"] = 128
            routing = {
                "n_routed_experts": experts,
                "num_experts_per_tok": chosen,
                "moe_intermediate_size": expert_width,
            }
            routing |= {"n_shared_experts": 2, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1}
            return DeepseekV2ForCausalLM, DeepseekV2Config(**shape, **latent, **routing, topk_group=1)
        case "gpt-oss":
            return GptOssForCausalLM, GptOssConfig(**shape, num_local_experts=experts, num_experts_per_tok=chosen)
    if experts:
        shape |= {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": expert_width}
        return Qwen3MoeForCausalLM, Qwen3MoeConfig(**shape, norm_topk_prob=True)
    return Qwen3ForCausalLM, Qwen3Config(**shape)
