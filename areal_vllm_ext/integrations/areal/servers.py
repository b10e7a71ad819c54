"""Several servers of one directory: the first of them acts for all, and the others follow it.

AReaL sends every call to all server addresses, and goes on when all have answered 200. So an answer of a server that follows
says nothing about the work, until continue: there it answers 200 only if engines serve what was to be sent.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .calls import Refused

if TYPE_CHECKING:
    from ...client.group import AsyncEngineGroup
    from ...protocol import EngineInfo, Version

_FOLLOW_SECONDS = 180.0
_POLL_SECONDS = 0.1


class Servers:
    """The servers of a directory, as one of them sees them.

    Attributes:
        expected: the version that engines must serve when the server that acts has continued; None if nothing was sent.
    """

    def __init__(self, engines: AsyncEngineGroup, own: tuple[str, int]) -> None:
        """
        Args:
            engines: the deployment.
            own: the replica, and the first DP rank, of this server.
        """
        self.expected: Version | None = None
        self._engines, self._own = engines, own

    async def leader(self) -> EngineInfo | None:
        """Return the engine whose server acts for all; None if it is this one."""
        found = await self._engines.engines()
        first = min(found, key=lambda engine: (engine.replica, engine.dp_rank), default=None)
        if first is None or (first.replica, first.dp_rank) == self._own:
            return None
        return first

    def expect(self, version: Version) -> None:
        """Note the version that engines must serve after continue."""
        if self.expected is None:
            self.expected = version

    async def followed_to_the_end(self, leader: EngineInfo) -> str:
        """Wait until the server that acts has continued, and check that engines serve what was sent.

        Raises:
            Refused: they do not.
        """
        expected, self.expected = self.expected, None
        ends = time.monotonic() + _FOLLOW_SECONDS
        while time.monotonic() < ends:
            states = await self._engines.status()
            if all(state.generation == "running" and state.update_phase == "idle" for state in states):
                break
            await asyncio.sleep(_POLL_SECONDS)
        else:
            raise Refused(f"engines do not generate after {_FOLLOW_SECONDS:.0f} s: see areal-vllm status")
        if expected is not None and any(state.version != expected for state in states):
            raise Refused(
                f"the engines do not serve version {expected}: the server at {leader.node} commits for all servers of this "
                "deployment; if it got no call, give AReaL its address too"
            )
        return followed(leader)


def followed(leader: EngineInfo) -> str:
    """Return the answer to a call that another server carries out."""
    return f"the server at {leader.node} does it for all servers of this deployment"
