"""``HTTPServerLauncher``: an actor that runs an HTTP server of any kind, such as a trainer's proxy, from a command."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from ..errors import LaunchError
from .node import NodeLauncher

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class HTTPServerLauncher(NodeLauncher):
    """Use: ``ray.remote(HTTPServerLauncher).options(num_cpus=1).remote("proxy")``, then ``serve``."""

    async def serve(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        health: str = "/health",
        timeout: float = 60,
    ) -> str:
        """Start the server, wait until the path ``health`` answers 200; returns its URL. ``{host}`` and ``{port}`` in the
        command's arguments stand for where it must listen. ``LaunchError``: it ended, or it takes too long; nothing is left.
        """
        facts = await self.reserve(1)
        for name, value in (("{host}", facts.address), ("{port}", str(facts.ports[0]))):
            command = [argument.replace(name, value) for argument in command]
        await self.start(command, env or {})
        ends = time.monotonic() + timeout
        while not (state := await self.poll(health)).healthy:
            if state.exit_code is not None or time.monotonic() > ends:
                await self.stop()
                raise LaunchError(f"{self.name} on {facts.address} {state.doing or 'does not answer'}: {state.cause}")
            await asyncio.sleep(0.1)
        return f"http://{facts.address}:{facts.ports[0]}"
