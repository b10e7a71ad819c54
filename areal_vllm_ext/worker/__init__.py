"""What lives in a worker process. vLLM imports ``WorkerExtension`` from here by name, before the model loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extension import WorkerExtension

__all__ = ["WorkerExtension"]


def __getattr__(name: str) -> Any:
    if name == "WorkerExtension":
        # Whoever asks for the extension wants the hook too: without it, nobody could command the engine.
        from ..engine_core import hooks

        hooks.require()
        from .extension import WorkerExtension

        return WorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
