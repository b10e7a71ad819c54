"""TRL's GRPO in server mode, synced by this package: python examples/trl_grpo.py

It trains a tiny model with two engines, one of them on a second node, and compares the greedy tokens of both engines with the
trainer's model after every sync. It ends with 1 unless all syncs were exact and the reward rose.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment
from areal_vllm_ext.demo.model import COLOURS, greedy_tokens, make_model, make_tokenizer
from areal_vllm_ext.demo.task import ANSWER_WORDS, as_text, make_prompt, word_rewards
from areal_vllm_ext.integrations.trl import use_areal

PROMPTS = [[10, 20, 30], [100, 3, 50, 7]]


def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the share of words that have the colour that the prompt names, and are new."""
    tokenizer = make_tokenizer()
    asked = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return [
        sum(word_rewards(prompt, answer)) / ANSWER_WORDS for prompt, answer in zip(asked, completion_ids, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    random = torch.Generator().manual_seed(0)
    data = Dataset.from_dict({"prompt": [as_text(make_prompt(COLOURS[0], random)) for _ in range(8 * steps)]})
    with tempfile.TemporaryDirectory(prefix="areal-trl-") as folder:
        model, exact = make_model(f"{folder}/model"), list[bool]()
        flags = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
        env = {"VLLM_SERVER_DEV_MODE": "1"}
        with Deployment(f"{folder}/model", log_dir=Path(folder) / "logs", vllm_args=flags, env=env) as deployment:
            deployment.wait(timeout=400)
            engines = Completions(deployment.url)

            def compare(_result: object) -> None:
                expected = greedy_tokens(trainer.model, PROMPTS, 16)
                exact.append(all(engines.greedy(PROMPTS, tokens=16, engine=rank) == expected for rank in (0, 1)))

            use_areal(deployment.directory, engines=2, timeout=60, on_update=compare)
            trainer = GRPOTrainer(
                model,
                reward,
                GRPOConfig(
                    output_dir=f"{folder}/out",
                    use_vllm=True,
                    vllm_mode="server",
                    vllm_server_base_url=deployment.url,
                    max_steps=steps,
                    per_device_train_batch_size=128,
                    num_generations=16,
                    max_completion_length=ANSWER_WORDS,
                    learning_rate=5e-3,
                    lr_scheduler_type="constant",
                    logging_steps=1,
                    save_strategy="no",
                    report_to="none",
                    use_cpu=not torch.cuda.is_available(),
                    bf16=False,
                    gradient_checkpointing=False,
                    disable_tqdm=True,
                ),
                train_dataset=data,
                processing_class=make_tokenizer(),
            )
            trainer.train()
            rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    print(
        f"reward {first:.2f} -> {last:.2f} in {len(rewards)} steps; {sum(exact)} of {len(exact)} syncs exact on both engines"
    )
    return 0 if all(exact) and len(exact) >= min(10, steps) and last > first + 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
