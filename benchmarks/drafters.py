"""Compare how many drafted tokens are accepted after three updates with what a freshly started engine accepts.

    python -m benchmarks.drafters                      # on a CPU: EAGLE, MTP and a draft model
    python -m benchmarks.drafters --methods eagle

For each method an engine starts with one set of weights, takes three updates of base weights and drafter, and answers greedily.
Another one, in a process of its own and without our worker, starts from a checkpoint of the third set and answers the same.
Drafters are noisy, so that a part of what they draft is accepted. The numbers must be equal. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from areal_vllm_ext.demo.model import make_tokenizer
from harness import report

from .apart import ENVIRONMENT, apart, import_once

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS = ("draft_model", "eagle", "mtp")
UPDATES = 3
WIDTH, VOCABULARY = 128, 256
# Of the drafter's weights, beside those of the base model.
NOISE = 0.1
PROMPTS = [[(7 * index + place) % VOCABULARY for place in range(4)] for index in range(64)]
TOKENS = 16


class Trainer:
    """A model whose next token depends on the last one only, so that a layer that changes nothing can draft it."""

    def __init__(self, method: str) -> None:
        shape: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "eos_token_id": None,
            "bos_token_id": None,
            "pad_token_id": 1,
        }
        self.method = method
        self.model: Any = (
            Qwen2ForCausalLM(Qwen2Config(**shape)) if method == "mtp" else LlamaForCausalLM(LlamaConfig(**shape))
        )

    @torch.no_grad()
    def make(self, seed: int) -> dict[str, torch.Tensor]:
        """Give the model the weights of ``seed``. Returns those of the drafter."""
        torch.manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.normal_(std=0.3)
        layer = self.model.model.layers[0]
        for one in (layer.self_attn.o_proj, layer.mlp.down_proj):
            one.weight.zero_()
        for one in (layer.input_layernorm, layer.post_attention_layernorm):
            one.weight.fill_(1)
        signs = (torch.rand(WIDTH) < 0.5) * 2.0 - 1
        self.model.model.norm.weight.copy_(signs)
        noise, of_layer = NOISE * torch.randn(WIDTH, WIDTH) / WIDTH**0.5, layer.state_dict()
        if self.method == "draft_model":
            drafter = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            drafter["model.embed_tokens.weight"] += 0.3 * NOISE * torch.randn(VOCABULARY, WIDTH)
            return drafter
        if self.method == "eagle":
            inner = {f"layers.0.{name}": one.clone() for name, one in of_layer.items() if "input_layernorm" not in name}
            return inner | {"fc.weight": torch.cat([torch.diag(signs) + noise, torch.zeros(WIDTH, WIDTH)], 1)}
        at = "model.mtp_layers.0."
        ones = {f"{at}{name}.weight": torch.ones(WIDTH) for name in ("token_layernorm", "hidden_layernorm")}
        project = torch.cat([noise, torch.eye(WIDTH) + noise], 1)
        drafter = {at + name: one.clone() for name, one in of_layer.items()} | ones
        return drafter | {at + "input_proj.weight": project, at + "final_layernorm.weight": signs}

    def save(self, folder: Path, drafter: dict[str, torch.Tensor]) -> None:
        """Save a checkpoint from which an engine can start."""
        config, tensors = self.model.config.to_dict() | {"dtype": "float32"}, self.model.state_dict()
        if self.method == "mtp":
            config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
            tensors |= drafter
        else:
            config["architectures"] = ["LlamaForCausalLM"]
            _save(folder / "drafter", config, drafter)
        _save(folder, config, tensors)


def _save(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)


def engine(method: str, folder: Path, **settings: Any) -> Any:
    """Start an engine in this process."""
    from vllm import LLM

    speculative: dict[str, Any] = {"method": method, "num_speculative_tokens": 1 if method == "mtp" else 3}
    if method != "mtp":
        speculative["model"] = str(folder / "drafter")
    return LLM(
        str(folder),
        enforce_eager=True,
        max_model_len=256,
        dtype="float32",
        kv_cache_memory_bytes=1 << 26,
        speculative_config=speculative,
        disable_log_stats=False,
        **settings,
    )


def answered(llm: Any) -> dict[str, Any]:
    """Have an engine answer all prompts; returns how many tokens it drafted and accepted, and what it said."""
    from vllm import SamplingParams

    def counted(what: str) -> int:
        return sum(int(one.value) for one in llm.get_metrics() if one.name == f"vllm:spec_decode_num_{what}_tokens")

    before = counted("draft"), counted("accepted")
    options = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    said = [list(one.outputs[0].token_ids) for one in llm.generate(prompts, options, use_tqdm=False)]
    return {"drafted": counted("draft") - before[0], "accepted": counted("accepted") - before[1], "said": said}


def updated(method: str, folder: Path) -> dict[str, Any]:
    """Start an engine, update it, and save the last weights; returns what it answers at the start and after each update."""
    from areal_vllm_ext import EngineGroup

    trainer = Trainer(method)
    trainer.save(folder / "first", trainer.make(0))
    llm = engine(method, folder / "first", worker_extension_cls="areal_vllm_ext.worker.WorkerExtension")
    rows = [answered(llm)]
    with EngineGroup.connect() as group:
        group.wait_ready(engines=1, timeout=60)
        for version in range(1, UPDATES + 1):
            drafter = trainer.make(version)
            if method == "mtp":
                weights = (trainer.model.state_dict() | drafter).items()
                result = group.update_weights(weights, version=version, timeout=120)
            else:
                result = group.update_weights(trainer.model, draft=drafter, version=version, timeout=120)
            assert result.draft == "sent", result
            rows.append(answered(llm))
        # What it accepts with a drafter of other weights than the base model's.
        trainer.save(folder / "last", drafter)
        trainer.make(UPDATES + 1)
        group.update_weights(trainer.model, version=UPDATES + 1, timeout=120)
    return {"updated": rows, "stale": answered(llm)}


def fresh(method: str, folder: Path) -> dict[str, Any]:
    """Return what an engine answers that starts from the last weights, without our worker."""
    return answered(engine(method, folder / "last"))


def succeeded(
    function: Callable[[str, Path], dict[str, Any]], method: str, folder: Path, timeout: float
) -> dict[str, Any]:
    """Call ``function`` in a process of its own, which must answer."""
    answer = apart(lambda: function(method, folder), folder, timeout)
    if "error" in answer:
        raise SystemExit(f"{method}, {function.__name__}: {answer['error']}")
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one engine (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the results here")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    import_once()
    rows: dict[str, Any] = {}
    for method in options.methods.split(","):
        with tempfile.TemporaryDirectory(prefix="drafters-") as scratch:
            folder = Path(scratch)
            found = succeeded(updated, method, folder, options.timeout)
            new = succeeded(fresh, method, folder, options.timeout)
        equal = found["updated"][-1] == new
        for one in (*found["updated"], found["stale"], new):
            del one["said"]
        rows[method] = found | {"fresh": new, "equal": equal}
        print(f"{method}: {json.dumps(rows[method])}", flush=True)
    report.finish({"methods": rows}, options.out)
    return int(not all(row["equal"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
