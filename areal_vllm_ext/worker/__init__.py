"""What lives in a worker process. vLLM imports ``WorkerExtension`` from here by name, before the model loads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extension import WorkerExtension

__all__ = ["WorkerExtension"]


def __getattr__(name: str) -> Any:
    if name == "WorkerExtension":
        # Without the hook no client could command the engine, so refuse to load the extension without it.
        from . import hooks

        hooks.require()
        from .extension import WorkerExtension

        return WorkerExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
