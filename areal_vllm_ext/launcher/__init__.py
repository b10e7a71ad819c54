"""Places vLLM on a Ray cluster, over several nodes where it must be, and sees to it that nothing of it outlives its owner.

    with launch(model, Placement.deferred(nodes=2, devices_per_node=8), data_parallel_size=16) as replica:
        replica.url, replica.group, replica.status()

Ray schedules, vLLM serves; this package only carries what one must know of the other. docs/placement.md has the strategies.
"""

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
