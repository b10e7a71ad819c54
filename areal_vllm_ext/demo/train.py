"""The demo: a trainer learns by policy gradient from rollouts of a real vLLM deployment, a head and a headless node.

In each step both engines generate rollouts, the trainer learns from them, and the new weights go to all engines with
``EngineGroup.update``. Then the greedy tokens of each engine must equal the tokens that Hugging Face generates from the
trainer's model.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from .. import EngineGroup
from ..errors import SettingsError
from ..process.leftovers import left_on_disk
from .completions import Completions
from .deployment import Deployment, DeploymentError, Node, gpu_count
from .display import GrowingTable
from .model import COLOURS, greedy_tokens, make_model
from .task import ANSWER_WORDS, as_text, make_prompt, word_rewards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from .completions import Answer

STEPS = 10
PROMPTS = 16
ROLLOUTS_PER_PROMPT = 16
EPOCHS = 2
LEARNING_RATE = 1.5e-2
CLIP = 0.2
CHECKED_TOKENS = 16
ENGINES = (0, 1)  # DP ranks: the head's engine, and the headless node's


def run(moe: bool = False, steps: int | None = None, seed: int = 0, keep_logs: bool = False) -> int:
    """Run the demo and return the exit code; the last line on standard output is the result as JSON."""
    steps = STEPS if steps is None else steps
    if steps < 1:
        raise SettingsError(f"--steps: {steps} is not a number of steps; give at least 1")
    started = time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    # The model is tiny and the engines use the same cores, so more threads would only wait for each other.
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="areal-vllm-demo-"))
    left_before = left_on_disk()
    code = 1
    try:
        result = _train(home, moe, steps, seed)
        left = sorted(map(str, left_on_disk() - left_before))
        result["left_on_disk"] = len(left)
        code = 0 if result["token_exact"] and not result["mixed_versions"] and not left else 1
    except KeyboardInterrupt:
        code = 0  # the user ended it, so the logs are not kept
        raise
    except DeploymentError as error:
        print(error, file=sys.stderr)  # several lines, with the end of the logs
        return code
    finally:
        if keep_logs or code:
            shutil.rmtree(home / "model", ignore_errors=True)
            print(f"The engines' logs are in {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
    print(f"All engines have ended; it took {time.monotonic() - started:.0f} s.")
    if left:
        print(f"They left on disk: {', '.join(left)}")
    print(json.dumps(result), flush=True)
    return code


def _train(home: Path, moe: bool, steps: int, seed: int) -> dict[str, object]:
    random = torch.Generator().manual_seed(seed)
    model = make_model(home / "model", moe=moe, seed=seed)
    model.to(_trainer_device())
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    kind, size = "MoE" if moe else "dense", sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"Made a random {kind} Qwen3 of {size / 1e3:.0f} kB, float32.")

    checks = _check_prompts(random)
    rewards, update_ms, pause_ms = [], [], []
    exact, mixed = True, 0
    heads = ("step", "reward", "update ms", "pause ms", *(f"engine {rank}" for rank in ENGINES), "exact")
    with (
        Deployment(home / "model", (Node(), Node()), log_dir=home, vllm_args=["--enable-scale-out"]) as deployment,
        EngineGroup.connect(deployment.directory) as group,
        ThreadPoolExecutor(len(ENGINES)) as pool,
    ):
        print("Starting vLLM: a head and a headless node, one engine each.", flush=True)
        deployment.wait(300)
        group.wait_ready(len(ENGINES), timeout=60)
        completions = Completions(deployment.url)
        table = GrowingTable(heads)
        # Nothing was sent yet. This comparison must work before it can tell right weights from wrong ones.
        same = _greedy_matches(model, completions, checks, pool)
        exact &= same
        table.add(("0", "", "", "", *(str(s.version) for s in group.status()), "yes" if same else "NO"))
        for step in range(1, steps + 1):
            prompts = [make_prompt(COLOURS[i % len(COLOURS)], random) for i in range(PROMPTS)]
            answers = _rollouts(completions, prompts, pool)
            rewards.append(learn(model, optimizer, prompts, answers))
            with group.update(version=step, timeout=60) as update:
                update.send(model)
            update_ms.append(update.result.total_ms)
            pause_ms.append(update.result.pause_ms)

            versions = [state.version for state in group.status()]
            spans = [completions.spans(checks[0], tokens=2, engine=rank) for rank in ENGINES]
            stamps = [span.version for answer in spans for span in answer]
            mixed += versions != [step] * len(ENGINES) or stamps != [str(step)] * len(ENGINES)
            same = _greedy_matches(model, completions, checks, pool)
            exact &= same
            times = (f"{update_ms[-1]:.1f}", f"{pause_ms[-1]:.1f}")
            table.add((str(step), f"{rewards[-1]:.3f}", *times, *map(str, versions), "yes" if same else "NO"))
        [[answer]] = completions.sample(checks[:1], tokens=ANSWER_WORDS)
        print(f"Prompt: {as_text(checks[0])}\nAnswer: {as_text(answer.tokens)}")
    return {
        "engines": len(ENGINES),
        "headless": 1,
        "steps": steps,
        "reward_first": round(rewards[0], 4),
        "reward_last": round(rewards[-1], 4),
        "token_exact": exact,
        "mixed_versions": mixed,
        "update_ms_median": round(statistics.median(update_ms), 2),
        "pause_ms_median": round(statistics.median(pause_ms), 2),
    }


def learn(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Answer]],
) -> float:
    """Do one step of clipped policy gradient (GRPO, with credit by word), and return the mean reward.

    The return of a word is the mean reward from that word to the end of the answer. Its advantage compares that return
    with the returns of the other answers to the same prompt. Importance weights compare with the log-probabilities that
    vLLM reported.
    """
    device = model.device
    group = len(answers[0])
    flat = [(prompt, answer) for prompt, some in zip(prompts, answers, strict=True) for answer in some]
    sequences = torch.tensor([[*prompt, *answer.tokens] for prompt, answer in flat], device=device)
    behaviour = torch.tensor([answer.logprobs for _, answer in flat], device=device)
    rewards = torch.tensor([word_rewards(prompt, answer.tokens) for prompt, answer in flat], device=device)

    words = rewards.shape[1]
    left = torch.arange(words, 0, -1, device=device)
    returns = (rewards.flip(1).cumsum(1).flip(1) / left).view(-1, group, words)
    advantages = (returns - returns.mean(1, keepdim=True)) / (returns.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1, words)

    spoken = sequences[:, -words:, None]
    for _ in range(EPOCHS):
        logits = model(sequences[:, :-1]).logits[:, -words:]
        logprobs = torch.log_softmax(logits, -1).gather(2, spoken).squeeze(2)
        ratio = (logprobs - behaviour).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return rewards.mean().item()


def _rollouts(completions: Completions, prompts: list[list[int]], pool: ThreadPoolExecutor) -> list[list[Answer]]:
    """Sample answers to each prompt; every engine gets the same share of the prompts at the same time."""
    share = -(-len(prompts) // len(ENGINES))

    def ask(rank: int) -> list[list[Answer]]:
        mine = prompts[rank * share : (rank + 1) * share]
        return completions.sample(mine, tokens=ANSWER_WORDS, n=ROLLOUTS_PER_PROMPT, engine=rank)

    return [answers for part in pool.map(ask, ENGINES) for answers in part]


def _check_prompts(random: torch.Generator) -> list[list[int]]:
    """Make the prompts whose greedy tokens are compared in every step: one for each colour, and a long one.

    vLLM caches keys and values of prompts that are longer than a block (128 tokens on CPU). If an engine reused those of
    old weights, its answer to the long prompt would differ.
    """
    short = [make_prompt(colour, random) for colour in COLOURS]
    return [*short, make_prompt(COLOURS[0], random, noise_words=300)]


def _greedy_matches(
    model: PreTrainedModel, completions: Completions, prompts: list[list[int]], pool: ThreadPoolExecutor
) -> bool:
    """Return whether every engine's greedy tokens equal Hugging Face's on the trainer's model."""
    said = pool.map(lambda rank: completions.greedy(prompts, tokens=CHECKED_TOKENS, engine=rank), ENGINES)
    expected = greedy_tokens(model, prompts, CHECKED_TOKENS)
    return all(tokens == expected for tokens in said)


def _trainer_device() -> torch.device:
    """Return the first GPU that no engine uses, or the CPU."""
    return torch.device("cuda", len(ENGINES)) if gpu_count() > len(ENGINES) else torch.device("cpu")
