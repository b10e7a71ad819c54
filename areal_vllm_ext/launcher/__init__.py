"""Start vLLM on a Ray cluster so that nothing of it outlives its owner: docs/placement.md."""

from __future__ import annotations

from ..errors import LaunchError, SettingsError

try:
    from ray import __version__ as _ray
except ImportError:
    raise SettingsError("launcher: Ray is not installed; run: pip install 'areal-vllm-ext[ray]'") from None
if tuple(map(int, _ray.split(".")[:2])) < (2, 53):  # the first version that calls __ray_shutdown__
    raise SettingsError(f"launcher: Ray {_ray} is too old, 2.53 is needed; run: pip install -U 'ray>=2.53'")

from .http_server import HTTPServerLauncher
from .placement import Placement
from .replica import Replica, launch, launch_async
from .spec import ReplicaSpec
from .state import DirectoryEndpoint, NodeState, ReplicaState

__all__ = [
    "DirectoryEndpoint",
    "HTTPServerLauncher",
    "LaunchError",
    "NodeState",
    "Placement",
    "Replica",
    "ReplicaSpec",
    "ReplicaState",
    "launch",
    "launch_async",
]
