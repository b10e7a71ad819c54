"""Weight updates and pause/resume for every vLLM engine of a cluster: all engines move to a new version, or none does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .client.blocking import EngineGroup
    from .client.group import AsyncEngineGroup
    from .client.state import UpdateResult
    from .errors import (
        ArealError,
        EnginesMissing,
        EngineUnreachable,
        InvalidWeights,
        LaunchError,
        PauseFailed,
        UpdateAborted,
        UpdateInDoubt,
        WeightsTainted,
    )
    from .integrity.verify import Verification

__all__ = [
    "ArealError",
    "AsyncEngineGroup",
    "EngineGroup",
    "EngineUnreachable",
    "EnginesMissing",
    "InvalidWeights",
    "LaunchError",
    "PauseFailed",
    "UpdateAborted",
    "UpdateInDoubt",
    "UpdateResult",
    "Verification",
    "WeightsTainted",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # vLLM imports this package in every process for its plugin: the client's imports wait until somebody uses it.
    if name == "EngineGroup":
        from .client.blocking import EngineGroup

        return EngineGroup
    if name == "AsyncEngineGroup":
        from .client.group import AsyncEngineGroup

        return AsyncEngineGroup
    if name == "UpdateResult":
        from .client.state import UpdateResult

        return UpdateResult
    if name == "Verification":
        from .integrity.verify import Verification

        return Verification
    if name in __all__:
        from . import errors

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
