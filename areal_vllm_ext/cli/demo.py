"""The command ``demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import count

if TYPE_CHECKING:
    import argparse

    from .options import Commands


def add_to(commands: Commands) -> None:
    """Add the command to ``areal-vllm``."""
    parser = commands.add(
        "demo",
        _demo,
        "Train a tiny model with two vLLM engines on this machine",
        "It needs vLLM, and takes about two minutes on two cores. The last line of its output is the result as JSON.",
    )
    parser.add_argument("--moe", action="store_true", help="a mixture-of-experts model (default: a dense one)")
    parser.add_argument("--steps", metavar="N", type=count, help="training steps (default: 10)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of model and prompts (default: %(default)s)")
    parser.add_argument("--keep-logs", action="store_true", help="keep the engines' logs and say where they are")


def _demo(options: argparse.Namespace) -> int:
    from ..demo.train import run

    return run(moe=options.moe, steps=options.steps, seed=options.seed, keep_logs=options.keep_logs)
