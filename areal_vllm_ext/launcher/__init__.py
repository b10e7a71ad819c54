"""Places vLLM on a Ray cluster, over several nodes where it must be, and sees to it that nothing of it outlives its owner.

    with launch("Qwen/Qwen3-30B-A3B", Placement.deferred(nodes=2, devices_per_node=8), data_parallel_size=16) as replica:
        replica.url, replica.group, replica.status()

Ray schedules, vLLM serves; this package only carries what one must know of the other. docs/placement.md has the strategies.
"""

from __future__ import annotations

from ..errors import LaunchError, SettingsError

RAY_NEEDED = (2, 53)  # the first with __ray_shutdown__

try:
    from ray import __version__ as _ray_version
except ImportError:
    raise SettingsError("the launcher needs Ray: pip install 'areal-vllm-ext[ray]'") from None
if tuple(int(part) for part in _ray_version.split(".")[:2]) < RAY_NEEDED:
    raise SettingsError(f"the launcher needs Ray 2.53 or later, this is {_ray_version}: pip install -U 'ray>=2.53'")

from .http_server import HTTPServerLauncher  # noqa: E402 - after the check that says what is missing
from .node import NodeLauncher, NodeState  # noqa: E402
from .placement import Placement  # noqa: E402
from .replica import Replica, launch, launch_async  # noqa: E402
from .spec import ReplicaSpec  # noqa: E402

__all__ = [
    "HTTPServerLauncher",
    "LaunchError",
    "NodeLauncher",
    "NodeState",
    "Placement",
    "Replica",
    "ReplicaSpec",
    "launch",
    "launch_async",
]
