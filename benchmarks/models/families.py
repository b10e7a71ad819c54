"""The families of models that are tried: a tiny random model of each, made by transformers.

The hidden size is 128 in 4 heads, because vLLM's attention on a CPU takes no heads smaller than 32. There are 2 to 4 layers,
and the vocabulary is the demo's 256 words. So a model has some hundred kB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from areal_vllm_ext.demo.model import PAD, VOCABULARY

from . import images, quantized

_TOKENS = {
    "vocab_size": len(VOCABULARY),
    # No end of sequence, so that answers have the requested length, with vLLM and with Hugging Face.
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": VOCABULARY.index(PAD),
}
_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    # Wider than the usual 0.02: otherwise layers of this size hardly count beside the residual stream.
    "initializer_range": 0.1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_ROUTED = {
    "topk_method": "noaux_tc",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_BLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model: transformers' name of it, without ``Config``.
        config: what its configuration differs in from the usual shape. ``...`` takes a value out.
        bare: whether the configuration gets nothing of the usual shape.
        head: the part of the class's name that says what the model is for.
        auto: transformers' class that makes the model.
        task: what it is asked for: ``generate``, ``image`` (text about one), ``classify``, ``embed``.
        dtype: of checkpoint and engine.
        engine: further settings of ``LLM``.
        drafter: whether the engine speculates with a drafter, which has the model's own weights at the start.
        quantize: changes a saved checkpoint into a quantised one.
    """

    model: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    bare: bool = False
    head: str = "ForCausalLM"
    auto: str = "AutoModelForCausalLM"
    task: str = "generate"
    dtype: str = "float32"
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    drafter: bool = False
    quantize: Callable[[Path], None] | None = None

    def make_config(self) -> Any:
        import transformers

        values = _TOKENS | ({} if self.bare else _SHAPE) | self.config
        return getattr(transformers, f"{self.model}Config")(**{k: v for k, v in values.items() if v is not ...})

    @property
    def architecture(self) -> str:
        return self.model + self.head


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "llama tied": Family("Llama", {"tie_word_embeddings": True}),
    "mistral": Family("Mistral", {"sliding_window": 8}),
    "ministral3": Family("Ministral3"),
    "mixtral": Family("Mixtral", {"num_local_experts": 4}),
    "qwen2": Family("Qwen2"),
    "qwen2 tied": Family("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-moe": Family(
        "Qwen2Moe", _EXPERTS | {"shared_expert_intermediate_size": 48, "norm_topk_prob": True, "decoder_sparse_step": 1}
    ),
    "qwen3": Family("Qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe": Family("Qwen3Moe", _EXPERTS | {"norm_topk_prob": True}),
    "qwen3-next": Family(
        "Qwen3Next",
        _EXPERTS
        | {
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 48,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        dtype="bfloat16",  # vLLM's attention for it on a CPU takes no other
    ),
    "gemma": Family("Gemma", {"head_dim": 32}),
    "gemma2": Family("Gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": Family("Gemma3Text", {"sliding_window": 8, "query_pre_attn_scalar": 32}, head=""),
    "gemma4": Family("Gemma4Text", {"sliding_window": 8}, head=""),
    "phi": Family("Phi"),
    "phi3": Family("Phi3"),
    "phimoe": Family("Phimoe", {"num_local_experts": 4}),
    "gpt2": Family(
        "GPT2", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}, bare=True, head="LMHeadModel"
    ),
    "gpt-j": Family(
        "GPTJ", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512, "rotary_dim": 16}, bare=True
    ),
    "gpt-neox": Family("GPTNeoX"),
    "gpt-bigcode": Family("GPTBigCode", {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 512}, bare=True),
    "gpt-oss": Family("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "opt": Family(
        "OPT",
        {
            "hidden_size": 128,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 128,
            "max_position_embeddings": 512,
            "init_std": 0.1,
        },
        bare=True,
    ),
    "bloom": Family("Bloom", {"hidden_size": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}, bare=True),
    "falcon": Family(
        "Falcon",
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "initializer_range": 0.1,
        },
        bare=True,
    ),
    "falcon-h1": Family(
        "FalconH1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
    ),
    "falcon-mamba": Family("FalconMamba", {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16}, bare=True),
    "mamba": Family("Mamba", {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16}, bare=True),
    "mamba2": Family(
        "Mamba2",
        {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "num_heads": 8, "head_dim": 32, "n_groups": 1},
        bare=True,
    ),
    "jamba": Family(
        "Jamba",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 16,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": Family(
        "Bamba",
        {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "attn_layer_indices": [1]},
    ),
    "zamba2": Family(
        "Zamba2",
        {
            "num_hidden_layers": 4,
            "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 32,
            "attention_head_dim": 64,
            "adapter_rank": 8,
            "num_mem_blocks": 1,
        },
    ),
    "stablelm": Family("StableLm", {"partial_rotary_factor": 0.5}),
    "starcoder2": Family("Starcoder2"),
    "olmo": Family("Olmo"),
    "olmo2": Family("Olmo2"),
    "olmo3": Family("Olmo3", {"sliding_window": 8}),
    "olmoe": Family("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "granite": Family("Granite"),
    "granite-moe": Family("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "granite-moe-shared": Family(
        "GraniteMoeShared",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "shared_intermediate_size": 48},
    ),
    "granite-moe-hybrid": Family(
        "GraniteMoeHybrid",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "shared_intermediate_size": 48,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
    ),
    "glm": Family("Glm", {"partial_rotary_factor": 0.5}),
    "glm4": Family("Glm4", {"partial_rotary_factor": 0.5}),
    "glm4-moe": Family("Glm4Moe", _ROUTED),
    "glm4-moe-lite": Family("Glm4MoeLite", _ROUTED | _MLA),
    "cohere": Family("Cohere"),
    "cohere2": Family("Cohere2", {"sliding_window": 8}),
    "deepseek-v2": Family("DeepseekV2", _ROUTED | _MLA | {"norm_topk_prob": False, "topk_method": "greedy"}),
    "deepseek-v3": Family("DeepseekV3", _ROUTED | _MLA),
    "dbrx": Family(
        "Dbrx",
        {
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 128},
        },
        bare=True,
    ),
    "nemotron": Family("Nemotron"),
    "nemotron-h": Family(
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
            "num_hidden_layers": ...,
        },
    ),
    "ernie4.5": Family("Ernie4_5", {"use_bias": True}),
    "ernie4.5-moe": Family(
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "exaone4": Family("Exaone4", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "minimax-m2": Family(
        "MiniMaxM2", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "rotary_dim": 16}
    ),
    "lfm2": Family(
        "Lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96, "block_auto_adjust_ff_dim": False}
    ),
    "lfm2-moe": Family("Lfm2Moe", _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "apertus": Family("Apertus"),
    "arcee": Family("Arcee"),
    "smollm3": Family("SmolLM3"),
    "seed-oss": Family("SeedOss"),
    "hunyuan": Family("HunYuanDenseV1"),
    "hunyuan-moe": Family("HunYuanMoEV1", {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32}),
    "dots1": Family("Dots1", _ROUTED),
    "longcat-flash": Family(
        "LongcatFlash",
        _MLA
        | {
            "num_layers": 2,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 32,
            "ffn_hidden_size": 96,
            "zero_expert_num": 2,
            "intermediate_size": ...,
            "num_hidden_layers": ...,
        },
    ),
    "helium": Family("Helium"),
    "persimmon": Family("Persimmon", {"num_key_value_heads": ...}),
    "afmoe": Family("Afmoe", _EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8}),
    "flex-olmo": Family("FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}),
    "llama4": Family(
        "Llama4Text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
        },
        head="",
    ),
    "olmo-hybrid": Family(
        "OlmoHybrid",
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        dtype="bfloat16",  # vLLM's attention for it on a CPU takes no other
    ),
    "qwen3.5": Family(
        "Qwen3_5Text",
        {
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        head="",
        dtype="bfloat16",  # vLLM's attention for it on a CPU takes no other
    ),
    "exaone-moe": Family("ExaoneMoe", _ROUTED | {"num_experts": 4, "num_shared_experts": 1, "sliding_window": 8}),
    "hy-v3": Family("HYV3", _EXPERTS),
    "mimo-v2-flash": Family("MiMoV2Flash", {}),
    "vaultgemma": Family("VaultGemma", {"query_pre_attn_scalar": 32, "sliding_window": 8}),
    "minicpm3": Family("MiniCPM3", _MLA),
    "solar-open": Family("SolarOpen", _ROUTED),
    "youtu": Family("Youtu", _MLA),
    "step": Family("Step3p7", {}),
    "hyperclovax": Family("HyperCLOVAX"),
    "laguna": Family("Laguna", _EXPERTS),
    "axk1": Family("AXK1", _ROUTED | _MLA),
    "mellum": Family("Mellum", _EXPERTS),
    "cohere2-moe": Family("Cohere2Moe", _EXPERTS | {"sliding_window": 8}),
    "granite-swa": Family("GraniteSWA", {"sliding_window": 8}),
    "hrm-text": Family("HrmText"),
    "cwm": Family("Cwm", {"sliding_window": 8}),
    "jais2": Family("Jais2"),
    "nanochat": Family("NanoChat"),
    "doge": Family("Doge"),
    "gpt-neo": Family(
        "GPTNeo",
        {"hidden_size": 128, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        bare=True,
    ),
    "mpt": Family("Mpt", {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, bare=True),
    # Other dtypes, heads and parts.
    "qwen2 in bfloat16": Family("Qwen2", dtype="bfloat16"),
    "qwen3-moe in bfloat16": Family("Qwen3Moe", _EXPERTS, dtype="bfloat16"),
    "int8": Family("Llama", dtype="bfloat16", quantize=quantized.to_int8),
    "int4": Family("Llama", dtype="bfloat16", quantize=quantized.to_int4),
    "classification head": Family(
        "Qwen3",
        {"num_labels": 3},
        head="ForSequenceClassification",
        auto="AutoModelForSequenceClassification",
        task="classify",
        engine={"runner": "pooling"},
    ),
    "embedding": Family("Qwen3", task="embed", engine={"runner": "pooling", "convert": "embed"}),
    "bert embedding": Family(
        "Bert",
        {"num_key_value_heads": ..., "head_dim": ...},
        head="Model",
        auto="AutoModel",
        task="embed",
        engine={"runner": "pooling"},
    ),
    "blip2": Family(
        "Blip2",
        dict.fromkeys(_TOKENS, ...)
        | {
            "vision_config": _BLIP | {"image_size": images.SIDE, "patch_size": images.PATCH},
            "qformer_config": _BLIP
            | {"encoder_hidden_size": 64, "vocab_size": len(VOCABULARY), "cross_attention_frequency": 1},
            "text_config": _TOKENS
            | {
                "model_type": "opt",
                "vocab_size": len(VOCABULARY) + 16,
                "hidden_size": 128,
                "word_embed_proj_dim": 128,
                "ffn_dim": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 512,
            },
            "num_query_tokens": images.QUERY_TOKENS,
            "image_token_index": images.IMAGE_TOKEN,
            "image_text_hidden_size": 64,
        },
        bare=True,
        head="ForConditionalGeneration",
        auto="AutoModelForImageTextToText",
        task="image",
    ),
    "drafter": Family("Qwen3", drafter=True),
}
