"""Another package's extension: it takes vLLM's one slot, and knows nothing of areal_vllm_ext."""

from __future__ import annotations

from typing import Any


class Theirs:
    """The extension that the engines of this folder are started with."""

    def theirs(self: Any, word: str) -> str:
        return f"{word} {self.rank}"
