"""Train as the demo does on a Ray cluster: a trainer actor and a vLLM replica over two nodes, placed by one file.

    ray up cluster.yaml && ray submit cluster.yaml examples/ray_grpo.py --config ray_grpo.yaml      # a real cluster
    python examples/ray_grpo.py --address 10.0.0.1:6379 --config examples/ray_grpo.yaml             # one that runs
    python examples/ray_grpo.py --namespaces        # as root: two network namespaces as nodes, CPUs as devices

In each step both engines generate, the trainer learns by group-relative policy gradient, and all engines move to the new
weights or none does. Ctrl-C ends the script and every vLLM process on every node.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import ray
import torch

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.model import COLOURS, greedy_tokens, make_model
from areal_vllm_ext.demo.task import ANSWER_WORDS, make_prompt, word_rewards
from areal_vllm_ext.launcher import Placement, ReplicaSpec, launch

if TYPE_CHECKING:
    from areal_vllm_ext.launcher import DirectoryEndpoint

PROMPTS, ANSWERS, LEARNING_RATE = 16, 16, 1e-2
ROOT = Path(__file__).parent.parent


class Trainer:
    """The trainer: one rank, in a bundle of the shared placement group."""

    def __init__(self, model: str, url: str, directory: DirectoryEndpoint, engines: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        self.completions, self.engines = Completions(url), engines
        self.group = EngineGroup.connect(directory.address, key=directory.key)
        self.random = torch.Generator().manual_seed(0)

    def step(self, version: int) -> dict[str, Any]:
        """Roll out, learn, and update the engines to ``version``."""
        prompts = [make_prompt(COLOURS[i % len(COLOURS)], self.random) for i in range(PROMPTS)]
        share = -(-PROMPTS // self.engines)
        sequences, rewards, behaviour = [], [], []
        for engine in range(self.engines):
            mine = prompts[engine * share : (engine + 1) * share]
            answers = self.completions.sample(mine, tokens=ANSWER_WORDS, n=ANSWERS, engine=engine)
            for prompt, group in zip(mine, answers, strict=True):
                for answer in group:
                    sequences.append([*prompt, *answer.tokens])
                    behaviour.append(answer.logprobs)
                    rewards.append(sum(word_rewards(prompt, answer.tokens)) / ANSWER_WORDS)
        self.learn(torch.tensor(sequences), torch.tensor(rewards), torch.tensor(behaviour))
        with self.group.update(version, timeout=60) as update:
            update.send(self.model)
        expected = greedy_tokens(self.model, prompts[:4], ANSWER_WORDS)
        said = [self.completions.greedy(prompts[:4], tokens=ANSWER_WORDS, engine=one) for one in range(self.engines)]
        return {
            "reward": round(sum(rewards) / len(rewards), 3),
            "update_ms": round(update.result.total_ms, 1),
            "pause_ms": round(update.result.pause_ms, 1),
            "exact": all(tokens == expected for tokens in said),
        }

    def learn(self, sequences: torch.Tensor, rewards: torch.Tensor, behaviour: torch.Tensor) -> None:
        """Do one clipped step; an answer's advantage is relative to the other answers to its prompt."""
        groups = rewards.view(-1, ANSWERS)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        logits = self.model(sequences[:, :-1]).logits[:, -ANSWER_WORDS:]
        logprobs = torch.log_softmax(logits, -1).gather(2, sequences[:, -ANSWER_WORDS:, None]).squeeze(2)
        ratio = (logprobs - behaviour).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def train(config: dict[str, Any], steps: int) -> bool:
    """Launch and train; returns whether every engine's tokens were the trainer's after every update."""
    spec = msgspec.convert(config["replica"], ReplicaSpec)
    place = Placement.shared(**config["trainer"])
    group = place.reserve(timeout=60)
    with launch(spec) as replica:
        print(f"serving at {replica.url}: {[node.address for node in replica.nodes]}", flush=True)
        make = ray.remote(Trainer).options(**place.options(group, 0))
        trainer = make.remote(spec.model, replica.url, replica.directory, spec.data_parallel_size)
        exact = True
        for version in range(1, steps + 1):
            facts = ray.get(trainer.step.remote(version))
            exact &= facts["exact"]
            print(f"step {version}: {facts}", flush=True)
    return exact


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=Path(__file__).with_suffix(".yaml"), type=Path)
    parser.add_argument("--address", default="auto", help="of the Ray cluster")
    parser.add_argument("--namespaces", action="store_true", help="make a cluster of two namespaces on this machine")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    config = msgspec.yaml.decode(options.config.read_bytes())
    with contextlib.ExitStack() as stack:
        if options.namespaces:
            sys.path.insert(0, str(ROOT))
            from harness.ray_cluster import ray_cluster

            config["replica"]["model"] = stack.enter_context(tempfile.TemporaryDirectory())
            make_model(config["replica"]["model"])
            stack.enter_context(ray_cluster(devices=2, resource="CPU"))
        else:
            ray.init(options.address, log_to_driver=False)
        return 0 if train(config, options.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
