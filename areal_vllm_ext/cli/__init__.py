"""The command ``areal-vllm``."""

from .commands import main

__all__ = ["main"]
