"""A small but true RL run on a real vLLM deployment, all of it made on the spot: ``areal-vllm demo``."""

from __future__ import annotations

from .train import run

__all__ = ["run"]
