"""A sync of verl's ``CheckpointEngineManager`` that aborts no request, for the backend ``areal``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import ray
from verl.utils.ray_utils import auto_await

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def replace(manager: Any, backend: str) -> None:
    """Replace ``update_weights`` of the class ``manager``, for one backend.

    verl imports this package when it makes a manager, and its trainers of today take no manager class from their configuration.

    Args:
        manager: verl's ``CheckpointEngineManager``.
        backend: of whom; all others go verl's way.
    """
    theirs: Callable[..., Awaitable[Any]] = manager.update_weights

    async def update_weights(self: Any, global_steps: int | None = None) -> Any:
        """Have the actor update every engine. They generate while weights travel, and go on after the commit.

        Args:
            global_steps: the version (default: the next number).

        Returns:
            metrics of the actor's ranks.

        Raises:
            ray.exceptions.RayTaskError: with the ArealError of the actor's rank 0, see docs/transactions.md.
        """
        if self.backend != backend:
            return await theirs(self, global_steps)
        metrics: dict[str, Any] = {}
        for found in ray.get(self.actor_wg.update_weights(global_steps=global_steps, mode=self.backend)):
            metrics |= found or {}
        if global_steps is not None:
            servers = [server for replica in self.replicas for server in replica.servers]
            await asyncio.gather(*[server.set_global_steps.remote(global_steps) for server in servers])
        # Engines that slept have their weights back. Of the others this asks nothing that they do not have.
        await self.resume_kv_cache_replicas()
        return metrics

    manager.update_weights = auto_await(update_weights)
