"""Engines that sleep while a trainer on the same GPUs works, and the weights with which they wake up.

They cannot stage, so a checkpoint that comes meanwhile is kept, and engines are updated as they wake up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from .kept_files import KeptFiles

if TYPE_CHECKING:
    from ...client.group import AsyncEngineGroup
    from ...protocol import SleepTag, Version


class SleepingEngines:
    """The engines of a deployment, as far as they sleep.

    Attributes:
        asleep: whether they do, by the calls so far.
    """

    def __init__(self, engines: AsyncEngineGroup, timeout: float) -> None:
        """
        Args:
            engines: the deployment.
            timeout: seconds for the update with which they wake up.
        """
        self.asleep = False
        self._engines, self._timeout = engines, timeout
        self._kept: tuple[KeptFiles, Version] | None = None

    async def sleep(self, level: Literal[1, 2]) -> None:
        """Put every engine to sleep."""
        await self._engines.sleep(level)
        self.asleep = True

    async def keep(self, path: str, version: Version) -> None:
        """Keep the checkpoint at ``path``, for engines to wake up with."""
        self.drop_kept()
        self._kept = await asyncio.to_thread(KeptFiles, path), version

    async def wake_up(self, tags: list[SleepTag]) -> None:
        """Wake every engine up, with the weights that came meanwhile; no tags: all of it."""
        if self._kept is None or tags == ["kv_cache"]:
            await self._engines.wake_up(tags or None)
        else:
            await self._wake_up_with(*self._kept)
            if tags != ["weights"]:
                await self._engines.wake_up()
        self.asleep = await self.sleeps()

    async def sleeps(self) -> bool:
        """Ask whether an engine sleeps."""
        return any(state.sleep.startswith("asleep") for state in await self._engines.status())

    def drop_kept(self) -> None:
        """Remove what is kept."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[0].remove()

    async def _wake_up_with(self, kept: KeptFiles, version: Version) -> None:
        """Put the weights there that came during the sleep: an update wakes the weights' memory up."""
        try:
            await self._engines.update_weights(kept.path, version=version, timeout=self._timeout)
        finally:
            self.drop_kept()  # a second try would find the same
