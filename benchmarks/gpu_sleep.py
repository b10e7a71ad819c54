"""Prove on a GPU that engines sleep and wake up with the right weights, and say how much memory each step gives back.

    python -m benchmarks.gpu_sleep --out results.json --logs logs

Two dense engines on one GPU (one engine on each GPU after the first, where there are more), a trainer on the first GPU.
The tokens of every engine are compared with Hugging Face's for the weights that it must serve, after: sleep at level 1 and wake
up; updates in the order of colocated trainers at levels 1 and 2; wake up after level 2 without an update, and the update that
heals it; a pause before the sleep. Requests that are in flight meanwhile go on. Each step prints a line; the last line is
JSON. Exits with 1 where a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from areal_vllm_ext import ArealError, EngineGroup, PauseFailed
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment, Node
from harness.report import finish

from .gpu_smoke import expected_tokens, first_difference, make_model, served_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONG_PROMPT = [3, 1, 4, 1, 5]
LONG_TOKENS = 1500
NEAR_TIE = 1e-3


class Loop:
    """A trainer's loop over engines that sleep, and what each of its steps left."""

    def __init__(self, model: PreTrainedModel, group: EngineGroup, url: str, engines: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._model, self._group, self._engines = model, group, engines
        self._completions = Completions(url)
        self._version = 0

    def step(self, what: str, work: Callable[[], object]) -> None:
        """Do ``work``, and note how long it took and what is free after it."""
        started = time.monotonic()
        try:
            work()
        except Exception as error:
            self.failures.append(f"{what}: {type(error).__name__}: {error}")
        seconds = time.monotonic() - started
        states = self._group.status()
        self.rows.append(
            {
                "step": what,
                "ms": round(seconds * 1e3, 1),
                "free_mib": torch.cuda.mem_get_info()[0] >> 20,
                "free_by_status_mib": [state.free_memory and state.free_memory >> 20 for state in states],
                "states": sorted({(state.sleep, state.generation, state.update_phase) for state in states}),
                "failed": self.failures[-1:] if self.failures and self.failures[-1].startswith(what) else [],
            }
        )
        print(self.rows[-1], flush=True)

    def update(self) -> None:
        """Change the model and update the engines."""
        self._train()
        self._group.update_weights(self._model, version=self._version, timeout=120)

    def wake_up_with(self) -> None:
        """Change the model and wake the engines up with it."""
        self._train()
        self._group.wake_up_with(self._model, version=self._version, timeout=120)

    def _train(self) -> None:
        self._version += 1
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)

    def exact(self) -> None:
        """Compare the tokens of every engine with those of the model."""
        expected = expected_tokens(self._model)
        served = [served_tokens(self._completions, rank) for rank in range(self._engines)]
        differences = [first_difference(self._model, expected, tokens) for tokens in served]
        if any(differences):
            raise RuntimeError(f"wrong tokens: {differences}")

    def silent(self) -> None:
        """See that no engine generates."""
        if any(state.generation == "running" for state in self._group.status()):
            raise RuntimeError("an engine runs")

    def refused(self, what: str, work: Callable[[], object], kind: type[ArealError]) -> None:
        """See that ``work`` is refused, and fast."""
        started = time.monotonic()
        try:
            work()
        except kind as error:
            print(f"refused: {error}", flush=True)
            if time.monotonic() - started > 5.0:
                raise RuntimeError(f"{what}: the refusal came late") from None
            return
        raise RuntimeError(f"{what} was not refused")


def colocated(loop: Loop, group: EngineGroup, level: Any, *, wake_first: bool) -> None:
    """Sleep, update, wake the KV cache: as colocated trainers do."""
    name = f"level {level}"
    loop.step(f"{name}: sleep", lambda: group.sleep(level, timeout=60))
    if wake_first:
        loop.step(f"{name}: wake weights", lambda: group.wake_up(["weights"], timeout=60))
    loop.step(f"{name}: update", loop.update)
    loop.step(f"{name}: no engine runs", loop.silent)
    loop.step(f"{name}: wake the KV cache", lambda: group.wake_up(["kv_cache"], timeout=60))
    loop.step(f"{name}: tokens", loop.exact)


def trial(model: PreTrainedModel, group: EngineGroup, url: str, engines: int) -> Loop:
    """Take all steps."""
    loop = Loop(model, group, url, engines)
    loop.step("as loaded: tokens", loop.exact)
    loop.step("update", loop.update)
    loop.step("update again, planned", loop.update)
    loop.step("tokens", loop.exact)
    for _ in range(2):
        loop.step("level 1: sleep", lambda: group.sleep(1, timeout=60))
        loop.step("level 1: sleep again", lambda: group.sleep(1, timeout=60))
        loop.step("level 1: wake up", lambda: group.wake_up(timeout=60))
        loop.step("level 1: tokens", loop.exact)
    for wake_first in (True, False):
        for level in (1, 2):
            colocated(loop, group, level, wake_first=wake_first)
    loop.step("level 2: sleep", lambda: group.sleep(2, timeout=60))
    loop.step("level 2: wake up without an update", lambda: group.wake_up(timeout=60))
    loop.step("level 2: no engine runs", loop.silent)
    loop.step("level 2: resume is refused", lambda: loop.refused("a resume", group.resume, PauseFailed))
    loop.step("level 2: update", loop.update)
    loop.step("level 2: tokens", loop.exact)
    for level in (1, 2):
        loop.step(f"one call: sleep at level {level}", lambda level=level: group.sleep(level, timeout=60))  # type: ignore[misc]
        loop.step("one call: wake up with new weights", loop.wake_up_with)
        loop.step("one call: tokens", loop.exact)
    loop.step("paused before: pause", lambda: group.pause(lease=None))
    loop.step("paused before: sleep", lambda: group.sleep(1, timeout=60))
    loop.step("paused before: wake up", lambda: group.wake_up(timeout=60))
    loop.step("paused before: no engine runs", loop.silent)
    loop.step("paused before: resume", group.resume)
    loop.step("paused before: tokens", loop.exact)
    in_flight(loop, model, group, url, engines)
    loop.step("verify", lambda: verified(group))
    loop.step("update without sleep", loop.update)
    loop.step("update without sleep: tokens", loop.exact)
    return loop


def in_flight(loop: Loop, model: PreTrainedModel, group: EngineGroup, url: str, engines: int) -> None:
    """Requests that run when the engines fall asleep go on when they are awake, with the right tokens."""
    answers: list[list[int]] = [[] for _ in range(engines)]

    def ask(rank: int) -> None:
        answers[rank] = Completions(url, timeout=120).greedy([LONG_PROMPT], tokens=LONG_TOKENS, engine=rank)[0]

    threads = [threading.Thread(target=ask, args=(rank,), daemon=True) for rank in range(engines)]
    for thread in threads:
        thread.start()

    def compare() -> None:
        for thread in threads:
            thread.join(120)
        ids = torch.tensor([LONG_PROMPT], device=model.device)
        own = model.generate(ids, max_new_tokens=LONG_TOKENS, do_sample=False)[0, len(LONG_PROMPT) :].tolist()
        gaps = [gap(model, own, answer) for answer in answers]
        print(f"in flight: place of the first other token, and the model's gap in nats: {gaps}", flush=True)
        # A prompt that is computed again sums in another order, which decides where two tokens are nearly tied.
        if any(nats > NEAR_TIE for _, nats in gaps):
            raise RuntimeError(f"requests in flight went on with wrong tokens: {gaps}")
        if any(len(answer) != LONG_TOKENS for answer in answers):
            raise RuntimeError(f"requests in flight ended early: {[len(answer) for answer in answers]} tokens")

    def busy() -> None:
        ends = time.monotonic() + 30
        while any(state.requests == 0 for state in group.status()):
            if time.monotonic() > ends:
                raise RuntimeError("no request is in flight")
            time.sleep(0.05)
        time.sleep(0.3)

    loop.step("in flight: requests run", busy)
    loop.step("in flight: sleep", lambda: group.sleep(1, timeout=60))
    loop.step("in flight: wake up", lambda: group.wake_up(timeout=60))
    loop.step("in flight: tokens", compare)


def gap(model: PreTrainedModel, own: list[int], other: list[int]) -> tuple[int, float]:
    """Return where two answers part, and by how much the model prefers its own token there."""
    for place, (wanted, got) in enumerate(zip(own, other, strict=False)):
        if wanted != got:
            with torch.no_grad():
                logits = model(torch.tensor([LONG_PROMPT + own[:place]], device=model.device)).logits[0, -1]
            logprobs = logits.float().log_softmax(-1)
            return place, float(logprobs[wanted] - logprobs[got])
    return len(own), 0.0


def verified(group: EngineGroup) -> None:
    found = group.verify(timeout=60)
    if not found.equal:
        raise RuntimeError(f"weights differ: {found.differences[:5]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache-gib", type=int, default=8, help="the KV cache of each engine (default: %(default)s)")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs, as vLLM starts by default")
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not gpus:
        print("vLLM's sleep mode needs a GPU", file=sys.stderr)
        return 2
    moe = options.model == "moe"
    devices = [str(index) for index in range(1, gpus)] or ["0"] * (1 if moe else 2)
    nodes = [Node(env={"CUDA_VISIBLE_DEVICES": index}) for index in devices]
    arguments = ["--dtype", "float32", "--skip-tokenizer-init", "--enable-sleep-mode"]
    arguments += ["--kv-cache-memory-bytes", str(options.cache_gib << 30)]
    arguments += ["--no-enforce-eager"] if options.graphs else []
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-gpu-sleep-")))
        model = make_model(folder / "model", moe, torch.float32).to("cuda:0")
        # vLLM's Triton kernels multiply float32 in TF32 by default; the oracle does not.
        deployment = stack.enter_context(
            Deployment(
                folder / "model",
                nodes,
                log_dir=options.logs or folder,
                vllm_args=arguments,
                env={"TRITON_F32_DEFAULT": "ieee"},
            )
        )
        deployment.wait(timeout=300)
        group = stack.enter_context(EngineGroup.connect(deployment.directory))
        group.wait_ready(engines=len(nodes), timeout=60)
        loop = trial(model, group, deployment.url, len(nodes))
    right = not loop.failures
    finish(
        {
            "seconds": round(time.monotonic() - started, 1),
            "engines": len(nodes),
            "model": options.model,
            "rows": loop.rows,
            "failures": loop.failures,
            "token_exact": right,
        },
        options.out,
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
