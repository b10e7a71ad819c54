"""A small but real RL run on a vLLM deployment that it starts itself: ``areal-vllm demo``."""

from __future__ import annotations

from .train import run

__all__ = ["run"]
