"""Train in a loop: each step changes the model, and all engines move to the new weights.

    vllm serve DIR --worker-extension-cls areal_vllm_ext.worker.WorkerExtension
    python examples/train_loop.py --model DIR --steps 3                               # blocking
    python examples/train_loop.py --model DIR --steps 3 --form async                  # asyncio
    torchrun --nproc-per-node 2 examples/train_loop.py --model DIR --form sharded     # FSDP2

On another node than the engines, add ``--connect tcp://HEAD:29700`` and set AREAL_VLLM_KEY_FILE (see ``areal-vllm keygen``).
"""

from __future__ import annotations

import argparse
import asyncio

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from areal_vllm_ext import AsyncEngineGroup, EngineGroup, UpdateAborted, UpdateResult


def blocking(options: argparse.Namespace) -> None:
    """Train and update in turn; the trainer waits while its weights are sent."""
    model, optimizer = load(options)
    with EngineGroup.connect(options.connect, key_file=options.key_file) as group:
        group.wait_ready(engines=options.engines, timeout=600)
        for step in range(1, options.steps + 1):
            loss = train_one_step(model, optimizer)
            try:
                # The engines generate while weights are sent, then vote, pause, commit and resume.
                result = group.update_weights(model, version=step, timeout=options.timeout)
            except UpdateAborted as error:
                # All engines still serve the version before. The next step tries again with newer weights.
                print(f"step {step}: {error}")
            else:
                report(loss, result)


async def asynchronous(options: argparse.Namespace) -> None:
    """Do the same on an event loop; other tasks, such as rollouts, run while weights are sent."""
    model, optimizer = load(options)
    async with AsyncEngineGroup.connect(options.connect, key_file=options.key_file) as group:
        await group.wait_ready(engines=options.engines, timeout=600)
        for step in range(1, options.steps + 1):
            loss = await asyncio.to_thread(train_one_step, model, optimizer)
            # A thread of asyncio's pool reads the tensors, so do not train before this returns.
            report(loss, await group.update_weights(model, version=step, timeout=options.timeout))


def sharded(options: argparse.Namespace) -> None:
    """Train on several ranks (FSDP2): all ranks gather, rank 0 sends."""
    dist.init_process_group()
    rank = dist.get_rank()
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    model, _ = load(options)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    # Made after sharding, because its parameters are DTensors.
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate)

    # Every rank connects; rank 0 commands the engines.
    with EngineGroup.connect(options.connect, key_file=options.key_file) as group:
        if rank == 0:
            group.wait_ready(engines=options.engines, timeout=600)
        for step in range(1, options.steps + 1):
            loss = train_one_step(model, optimizer)
            # Tensors are gathered bucket by bucket, so no rank holds the whole model. If one rank fails, all raise.
            with group.update(version=step, timeout=options.timeout, process_group=dist.group.WORLD) as update:
                update.send(model)
            if rank == 0:
                report(loss, update.result)
    dist.destroy_process_group()


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """Load the model in the checkpoint's dtype."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model, torch.optim.SGD(model.parameters(), lr=options.learning_rate)


def train_one_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> float:
    """Stand in for real training: one gradient step on random tokens."""
    tokens = torch.randint(model.config.vocab_size, (2, 16), device=model.device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def report(loss: float, result: UpdateResult) -> None:
    print(
        f"version {result.version}: loss {loss:.3f}, {len(result.engines)} engines, {result.nbytes / 1e6:.1f} MB, "
        f"{result.total_ms:.0f} ms, paused for {result.pause_ms:.0f} ms (commit {result.commit_ms:.0f} ms)",
        flush=True,
    )
    for engine, cause in result.lost.items():  # did not commit although others had
        print(f"  lost: {engine}: {cause}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connect", default="", metavar="ADDRESS", help="the directory, tcp://host:port")
    parser.add_argument("--key-file", metavar="FILE", help="default: AREAL_VLLM_KEY_FILE")
    parser.add_argument("--model", required=True, metavar="DIR", help="the engines' checkpoint")
    parser.add_argument("--engines", type=int, metavar="N", help="wait for N engines (default: all ranks seen)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="of one update")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--form", choices=("blocking", "async", "sharded"), default="blocking")
    options = parser.parse_args()
    if options.form == "async":
        asyncio.run(asynchronous(options))
    elif options.form == "sharded":
        sharded(options)
    else:
        blocking(options)


if __name__ == "__main__":
    main()
