"""Accept the package on GPUs: three updates of a real vLLM, dense and MoE, compared token by token with Hugging Face.

    python -m benchmarks.gpu_smoke --out results.json   # one GPU: ipc, shared memory, disk (two dense engines, one MoE)
    python -m benchmarks.gpu_smoke --out results.json   # more: broadcast too; trainer on the first, an engine on each other

Then, for broadcast and ipc, a second trainer is killed in the handshake and in the middle of the bytes
(``killed_trainer.py``). The next trainer must update the same engines, token by token. ``--no-kill`` leaves that out.

The model has Qwen3's architecture, 100 MB in float32, and random weights. Each run prints a line; the last line is JSON.
Exits with 1 where a token was wrong or a run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment, Node
from harness.report import finish

from .killed_trainer import POINTS

PROMPTS = [[10, 20, 30], list(range(500, 540)), [7] * 5, [1000 + 3 * i for i in range(100)]]
TOKENS = 24
UPDATES = 3


def make_model(folder: Path, moe: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Save a Qwen3 of about 100 MB to ``folder``, without a tokenizer because requests carry token ids."""
    shape: dict[str, Any] = {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "initializer_range": 0.05,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": 0,
        "dtype": dtype,
    }
    torch.manual_seed(0)
    model: PreTrainedModel
    if moe:
        experts = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, intermediate_size=1024))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=1536))
    model = model.to(dtype).eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    model.save_pretrained(folder)
    return model


def expected_tokens(model: PreTrainedModel) -> list[list[int]]:
    """Return the oracle: greedy tokens of the trainer's model."""
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=model.device)
        tokens.append(model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, len(prompt) :].tolist())
    return tokens


def first_difference(model: PreTrainedModel, expected: list[list[int]], served: list[list[int]]) -> str:
    """Return where an engine's tokens leave the oracle's, and the oracle's margin there; empty if they are equal.

    Other weights differ by margins of nats, another order of summation only where two tokens are nearly tied.
    """
    for prompt, own, other in zip(PROMPTS, expected, served, strict=True):
        for place, (wanted, got) in enumerate(zip(own, other, strict=True)):
            if wanted != got:
                ids = torch.tensor([prompt + own[:place]], device=model.device)
                with torch.no_grad():
                    logprobs = model(ids).logits[0, -1].float().log_softmax(-1)
                return f"token {place} is {got}, not {wanted}; the oracle's gap is {logprobs[wanted] - logprobs[got]:.2e} nats"
    return ""


def served_tokens(completions: Completions, rank: int) -> list[list[int]]:
    """Return greedy tokens of an engine; one prompt at a time, because sums depend on the batch."""
    return [completions.greedy([prompt], tokens=TOKENS, engine=rank)[0] for prompt in PROMPTS]


class Trial:
    """A model, the engines that serve it, and the result of each update."""

    def __init__(self, kind: str, model: PreTrainedModel, deployment: Deployment, folder: Path, engines: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._kind, self._model, self._deployment = kind, model, deployment
        self._checkpoint = folder / f"{kind}-checkpoint"
        self._engines = engines

    def served(self) -> list[list[list[int]]]:
        completions = Completions(self._deployment.url)
        return [served_tokens(completions, rank) for rank in range(self._engines)]

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Do ``work`` and note its failure, so that other transports and faults are still tried."""
        try:
            work()
        except Exception as error:
            self.failures.append(f"{self._kind}, {what}: {type(error).__name__}: {error}")
            print(self.failures[-1], file=sys.stderr, flush=True)

    def update(
        self,
        group: EngineGroup,
        transport: str,
        number: int,
        staging: str = "auto",
        *,
        keep_buffers: bool = False,
        only: str = "",
        **facts: Any,
    ) -> None:
        """Change the model (only parameters with ``only`` in their name), update the engines, and compare."""
        model = self._model
        before = expected_tokens(model)
        with torch.no_grad():
            for _, parameter in ((name, one) for name, one in model.named_parameters() if only in name):
                parameter.add_(torch.randn_like(parameter) * 0.02)
        after = expected_tokens(model)
        source: Any = model
        if transport == "disk":
            source = self._checkpoint
            model.save_pretrained(source)
        options: dict[str, Any] = {"staging": staging, "keep_buffers": keep_buffers} | (
            {} if transport == "disk" else {"transport": transport}
        )
        started = time.monotonic()
        with group.update(f"{transport}-{number}", timeout=120, **options) as update:
            update.send(source)
        seconds = time.monotonic() - started
        differences = [first_difference(model, after, tokens) for tokens in self.served()]
        self.rows.append(
            {
                "model": self._kind,
                "transport": transport,
                "engines": self._engines,
                "update": number,
                "staging": staging,
                "keep_buffers": keep_buffers,
                "only": only,
                "kept": update.result.kept,
                # Why the first update was not compared with a fresh load; empty if it was and was equal.
                "unproven": sorted({state.unproven for state in group.status()}),
                **facts,
                "bytes": update.result.nbytes,
                "wall_ms": round(seconds * 1e3, 1),
                "total_ms": round(update.result.total_ms, 1),
                "pause_ms": round(update.result.pause_ms, 1),
                "commit_ms": round(update.result.commit_ms, 1),
                "token_exact": not any(differences),
                "differences": [text for text in differences if text],
                "tokens_changed": before != after,
            }
        )
        print(self.rows[-1], flush=True)

    def verify(self, group: EngineGroup) -> None:
        """Compare every engine's live weights with those of the others and with those after the commit."""
        found = group.verify(timeout=60)
        if not found.equal:
            raise RuntimeError(f"weights differ: {found.differences[:5]}")
        print(f"{self._kind}: verified, {found.tensors} tensors on {found.engines} engines", flush=True)

    def update_after_a_kill(self, transport: str, point: str, number: int) -> None:
        """Kill another trainer in its update; then a new trainer updates the same engines."""
        command = [sys.executable, "-m", "benchmarks.killed_trainer", point, transport, self._deployment.directory]
        killed = subprocess.run(
            [*command, str(self._deployment.model_dir)], check=False, timeout=180, capture_output=True, text=True
        )
        if killed.returncode != -9:
            raise RuntimeError(f"the trainer ended with {killed.returncode}: {killed.stderr[-2000:]}")
        with EngineGroup.connect(self._deployment.directory) as group:
            before = [(engine.name, engine.incarnation) for engine in group.wait_ready(self._engines, timeout=30)]
            # The wall time includes the rest of the dead trainer's lease, at most 10 s.
            self.update(group, transport, number, killed_in=point)
            if before != [(engine.name, engine.incarnation) for engine in group.engines()]:
                raise RuntimeError("an engine was restarted")


def run(
    moe: bool, transports: list[str], kill: bool, device: torch.device, dtype: str, folder: Path, logs: Path
) -> Trial:
    """Start engines and update them by each transport."""
    kind = "moe" if moe else "dense"
    model = make_model(folder / kind, moe, getattr(torch, dtype)).to(device)
    gpus = torch.cuda.device_count()
    # One engine on each further GPU. A single GPU has two, or one if engines need NCCL between them (MoE).
    devices = [str(i) for i in range(1, gpus)] or ["0"] * (1 if moe or not gpus else 2)
    nodes = [Node(env={"CUDA_VISIBLE_DEVICES": index} if gpus else {}) for index in devices]
    arguments = ["--dtype", dtype, "--skip-tokenizer-init"]
    # vLLM's Triton kernels (the experts of an MoE) multiply float32 in TF32 by default; the oracle does not.
    ieee = {"TRITON_F32_DEFAULT": "ieee"}
    with Deployment(folder / kind, nodes, log_dir=logs / kind, vllm_args=arguments, env=ieee) as deployment:
        deployment.wait(timeout=240)
        trial = Trial(kind, model, deployment, folder, len(nodes))
        start = expected_tokens(model)
        print(f"{kind}: as loaded, exact on each engine: {[tokens == start for tokens in trial.served()]}", flush=True)
        with EngineGroup.connect(deployment.directory) as group:
            group.wait_ready(engines=len(nodes), timeout=60)
            for transport in transports:

                def updates(transport: str = transport) -> None:
                    for number in range(1, UPDATES + 1):
                        trial.update(group, transport, number)

                trial.attempt(transport, updates)
            for number, staging in enumerate(("device", "host"), UPDATES + 1):
                work = functools.partial(trial.update, group, transports[0], number, staging)
                trial.attempt(f"staging {staging}", work)
            for transport in (one for one in transports if one in ("broadcast", "ipc")):
                for number in range(UPDATES + 4, UPDATES + 6):
                    work = functools.partial(trial.update, group, transport, number, keep_buffers=True)
                    trial.attempt(f"{transport}, buffers kept", work)
                work = functools.partial(trial.update, group, transport, UPDATES + 6, only="layers.3.self_attn")
                trial.attempt(f"{transport}, a layer's attention only", work)
            trial.attempt("verify", functools.partial(trial.verify, group))
        for transport in transports if kill else ():
            if transport in ("broadcast", "ipc"):
                for number, point in enumerate(POINTS, UPDATES + 1):
                    trial.attempt(
                        f"{transport}, trainer killed in {point}",
                        functools.partial(trial.update_after_a_kill, transport, point, number),
                    )
    return trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--transport", action="append", help="broadcast, ipc, shared_memory, disk (default: all that fit)"
    )
    parser.add_argument("--no-kill", action="store_true", help="kill no trainers")
    parser.add_argument("--model", action="append", choices=("dense", "moe"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    fitting = {0: ["broadcast"], 1: ["ipc"]}.get(gpus, ["broadcast", "ipc"])
    transports = options.transport or [*fitting, "shared_memory", "disk"]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-gpu-smoke-")))
        for kind in options.model or ["dense", "moe"]:
            try:
                logs = options.logs or folder
                trial = run(kind == "moe", transports, not options.no_kill, device, options.dtype, folder, logs)
                rows += trial.rows
                failures += trial.failures
            except Exception as error:
                failures.append(f"{kind}: {type(error).__name__}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
    exact = bool(rows) and not failures and all(row["token_exact"] and row["tokens_changed"] for row in rows)
    seconds = round(time.monotonic() - started, 1)
    finish({"seconds": seconds, "rows": rows, "failures": failures, "token_exact": exact}, options.out)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
