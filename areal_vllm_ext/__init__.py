"""Weight updates and pause/resume for every vLLM engine of a cluster: all engines move to a new version, or none does.

``__all__`` is the public API, together with ``areal_vllm_ext.launcher``. Everything else is private.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .client.blocking import EngineGroup
    from .client.blocking_update import Update
    from .client.calls import CallFailed, CallResult, WorkerAnswer
    from .client.group import AsyncEngineGroup
    from .client.options import UpdateOptions
    from .client.state import EngineState, UpdateResult
    from .client.update import AsyncUpdate
    from .client.weights import named_weights
    from .errors import (
        ArealError,
        EnginesMissing,
        EngineUnreachable,
        HookError,
        InvalidWeights,
        LaunchError,
        NotACheckpoint,
        PauseFailed,
        RequestError,
        SettingsError,
        SleepFailed,
        UpdateAborted,
        UpdateInDoubt,
        WeightsTainted,
    )
    from .integrity.verify import Difference, Verification
    from .protocol import EngineInfo

__all__ = [
    "ArealError",
    "AsyncEngineGroup",
    "AsyncUpdate",
    "CallFailed",
    "CallResult",
    "Difference",
    "EngineGroup",
    "EngineInfo",
    "EngineState",
    "EngineUnreachable",
    "EnginesMissing",
    "HookError",
    "InvalidWeights",
    "LaunchError",
    "NotACheckpoint",
    "PauseFailed",
    "RequestError",
    "SettingsError",
    "SleepFailed",
    "Update",
    "UpdateAborted",
    "UpdateInDoubt",
    "UpdateOptions",
    "UpdateResult",
    "Verification",
    "WeightsTainted",
    "WorkerAnswer",
    "__version__",
    "named_weights",
]

_MODULES = {
    "AsyncEngineGroup": "client.group",
    "AsyncUpdate": "client.update",
    "CallFailed": "client.calls",
    "CallResult": "client.calls",
    "Difference": "integrity.verify",
    "EngineGroup": "client.blocking",
    "EngineInfo": "protocol",
    "EngineState": "client.state",
    "Update": "client.blocking_update",
    "UpdateOptions": "client.options",
    "UpdateResult": "client.state",
    "Verification": "integrity.verify",
    "WorkerAnswer": "client.calls",
    "named_weights": "client.weights",
}


def __getattr__(name: str) -> Any:
    # vLLM imports this package in every process for its plugin, so the client is imported when it is first used.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_MODULES.get(name, 'errors')}", __name__)
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
