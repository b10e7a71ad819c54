"""Which vLLM the tests run on: ``make matrix`` runs some of them on older ones."""

from __future__ import annotations

from importlib.metadata import version


def older_than(major: int, minor: int) -> bool:
    """Return whether the installed vLLM is older."""
    return tuple(int(part) for part in version("vllm").split(".")[:2]) < (major, minor)
