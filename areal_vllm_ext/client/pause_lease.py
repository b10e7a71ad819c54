"""``PauseLease``: renews a user's pause in the background for as long as its group is there."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING

from .. import protocol

if TYPE_CHECKING:
    from ..control.command import Commander


class PauseLease:
    """The lease of a group's pause. Without renewal, engines resume when it runs out."""

    def __init__(self, commander: Commander) -> None:
        self._commander = commander
        self._renewal: asyncio.Task[None] | None = None

    def renew(self, addresses: list[str], lease: float) -> None:
        """Renew the pause of the engines at ``addresses``, replacing any earlier renewal. A lease of 0 s needs none."""
        self.stop()
        if not lease:
            return
        message = protocol.KeepPaused(holder=self._commander.holder, lease=lease)
        requests = {address: (address, message) for address in addresses}
        group_link = weakref.ref(
            self._commander.link
        )  # the event loop keeps this task, which must not keep a forgotten group

        async def renew() -> None:
            while True:
                await asyncio.sleep(lease / 4)
                if (link := group_link()) is None:
                    return
                await link.request_all(requests, lease / 4)
                del link

        self._renewal = asyncio.create_task(renew())

    def stop(self) -> None:
        """Renew no more."""
        if self._renewal:
            self._renewal.cancel()
            self._renewal = None
