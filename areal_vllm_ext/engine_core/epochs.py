"""Which epochs an engine obeys. No I/O."""

from __future__ import annotations

from ..protocol import EPOCH_JUMP


def outside(epoch: int, highest: int) -> str:
    """Return why an engine that has seen the epoch ``highest`` refuses ``epoch``; empty if it obeys it."""
    if epoch < highest:
        return f"this request is of epoch {epoch}, but a newer client (epoch {highest}) commands this engine now"
    if epoch > highest + EPOCH_JUMP:
        return (
            f"epoch {epoch} was never issued by a directory (highest seen here: {highest}); "
            "does this client use another directory?"
        )
    return ""
