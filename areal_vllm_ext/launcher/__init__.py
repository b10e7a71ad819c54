"""Places vLLM on a Ray cluster, and sees to it that nothing of it outlives its owner: docs/placement.md."""

from __future__ import annotations

from ..errors import LaunchError, SettingsError

try:
    from ray import __version__ as _ray
except ImportError:
    raise SettingsError("the launcher needs Ray: pip install 'areal-vllm-ext[ray]'") from None
if tuple(map(int, _ray.split(".")[:2])) < (2, 53):  # the first with __ray_shutdown__
    raise SettingsError(f"the launcher needs Ray 2.53 or later, this is {_ray}: pip install -U 'ray>=2.53'")

from .http_server import HTTPServerLauncher
from .placement import Placement
from .replica import Replica, launch, launch_async
from .spec import ReplicaSpec

__all__ = ["HTTPServerLauncher", "LaunchError", "Placement", "Replica", "ReplicaSpec", "launch", "launch_async"]
