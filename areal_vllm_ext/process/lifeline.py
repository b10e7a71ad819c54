"""A TCP connection by which two processes on different nodes notice each other's end within seconds.

Ray takes longer: 15 s for a lost node, a minute for a lost head. The kernel closes the connection of a dead process at
once. TCP keepalive closes the connection of a machine that is dead or cut off, after ``LOST_AFTER`` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LOST_AFTER = 6


@dataclass(frozen=True)
class LifelineAddress:
    """Where an owner listens, and the token that a peer must send."""

    host: str
    port: int
    token: str


class Lifelines:
    """The owner's end; ``lost`` is called with the name of a peer whose connection has ended."""

    def __init__(self, lost: Callable[[str], None]) -> None:
        self._lost = lost
        self._token = secrets.token_hex(16)
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> LifelineAddress:
        """Listen on ``host``, one of this node's addresses."""
        self._server = await asyncio.start_server(self._connected, host, 0)
        return LifelineAddress(host, self._server.sockets[0].getsockname()[1], self._token)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _keep_alive(writer)
        ignored = (OSError, ValueError, asyncio.TimeoutError, asyncio.CancelledError)  # cancelled: the event loop ends
        with contextlib.closing(writer), contextlib.suppress(*ignored):
            token, _, name = (await asyncio.wait_for(reader.readline(), LOST_AFTER)).decode().strip().partition(" ")
            if hmac.compare_digest(token.encode(), self._token.encode()):
                with contextlib.suppress(OSError):
                    await reader.read()
                self._lost(name)


async def connect(address: LifelineAddress, name: str, ended: Callable[[], None]) -> asyncio.Task[None]:
    """Connect to an owner as ``name``; ``ended`` is called when the owner has ended.

    Returns:
        The task that watches; keep a reference, because the event loop holds none.

    Raises:
        OSError: the owner cannot be reached.
    """
    opening = asyncio.open_connection(address.host, address.port)
    reader, writer = await asyncio.wait_for(opening, LOST_AFTER)
    _keep_alive(writer)
    writer.write(f"{address.token} {name}\n".encode())

    async def hold() -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await reader.read()
        ended()

    return asyncio.create_task(hold())


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, LOST_AFTER - 2)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_AFTER * 1000)
