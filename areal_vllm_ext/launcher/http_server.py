"""Run an HTTP server of any kind, such as a trainer's proxy, in an actor."""

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
        """Start the server, wait until it is healthy, and return its URL.

        Args:
            command: ``{host}`` and ``{port}`` in its arguments stand for the address where the server must listen.
            env: environment variables, in addition to this actor's.
            health: the path that answers 200 once the server is healthy.
            timeout: seconds until then.

        Raises:
            LaunchError: the server ended, or time is up; nothing of it is left.
        """
        address = await self.reserve(1)
        for name, value in (("{host}", address.host), ("{port}", str(address.ports[0]))):
            command = [argument.replace(name, value) for argument in command]
        await self.start(command, env or {})
        ends = time.monotonic() + timeout
        while not (state := await self.poll(health)).healthy:
            if state.exit_code is not None:
                await self.stop()
                raise LaunchError(f"{self.name} on {address.host} {state.stage}: {state.cause}; see {state.log}")
            if time.monotonic() > ends:
                await self.stop()
                raise LaunchError(
                    f"{self.name} on {address.host}: {health} did not answer 200 within {timeout:g} s; raise timeout=, or "
                    f"pass the right health=\n{state.last_lines}"
                )
            await asyncio.sleep(0.1)
        return f"http://{address.host}:{address.ports[0]}"
