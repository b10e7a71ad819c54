"""``HTTPServerLauncher``: an actor that runs an HTTP server of any kind, such as a trainer's proxy, from its command."""

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
        timeout: float = 60.0,
    ) -> str:
        """Start the server and wait until its health check answers 200; returns its URL.

        Args:
            command: ``{host}`` and ``{port}`` in its arguments stand for where it must listen.
            env: further environment variables.
            health: path of the health check.
            timeout: in seconds.

        Raises:
            LaunchError: it ended, or time is up; nothing of it is left.
        """
        (port,) = (await self.reserve(1)).ports
        places = {"{host}": self.address, "{port}": str(port)}
        for name, value in places.items():
            command = [argument.replace(name, value) for argument in command]
        await self.start(command, env or {})
        ends = time.monotonic() + timeout
        while not (state := await self.poll(health)).healthy:
            if state.exit_code is not None or time.monotonic() > ends:
                await self.stop()
                why = state.doing if state.exit_code is not None else f"{health} does not answer after {timeout:.0f} s"
                raise LaunchError(f"{self.name} on {self.address}: {why}: {state.cause}\n{state.last_lines}")
            await asyncio.sleep(0.1)
        return f"http://{self.address}:{port}"
