"""An engine as the directory knows it, for tests that need one of which little matters."""

from __future__ import annotations

from typing import Any

from areal_vllm_ext.protocol import EngineInfo


def engine_info(dp_rank: int = 0, dp_size: int = 2, **given: Any) -> EngineInfo:
    """DP rank ``dp_rank`` of replica ``r``; ``given`` are other fields of it."""
    fields: dict[str, Any] = {
        "replica": "r",
        "headless": False,
        "node": "n/10.0.0.1",
        "pid": 1,
        "incarnation": str(dp_rank),
        "address": "tcp://127.0.0.1:1",
        "dtype": "float32",
    }
    return EngineInfo(dp_rank=dp_rank, dp_size=dp_size, **(fields | given))
