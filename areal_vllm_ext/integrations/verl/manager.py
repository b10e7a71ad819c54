"""``ArealCheckpointEngineManager``: a sync that aborts no request."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from verl.checkpoint_engine import CheckpointEngineManager
from verl.utils.ray_utils import auto_await

from .engine import BACKEND


class ArealCheckpointEngineManager(CheckpointEngineManager):  # type: ignore[misc]
    """For ``rollout.checkpoint_manager_class``: engines generate while weights travel, and go on after the commit."""

    @auto_await  # type: ignore[untyped-decorator]
    async def update_weights(self, global_steps: int | None = None) -> dict[str, Any]:
        """Have the actor update every engine.

        Args:
            global_steps: the version (default: the next number).

        Returns:
            metrics of the actor's ranks.

        Raises:
            ray.exceptions.RayTaskError: with the ArealError of the actor's rank 0, see docs/transactions.md.
        """
        if self.backend != BACKEND:
            return dict(await super().update_weights(global_steps) or {})
        metrics: dict[str, Any] = {}
        for found in ray.get(self.actor_wg.update_weights(global_steps=global_steps, mode=self.backend)):
            metrics |= found or {}
        if global_steps is not None:
            servers = [server for replica in self.replicas for server in replica.servers]
            await asyncio.gather(*[server.set_global_steps.remote(global_steps) for server in servers])
        # Engines that slept have their weights back. Of the others this asks nothing that they do not have.
        await self.resume_kv_cache_replicas()
        return metrics
