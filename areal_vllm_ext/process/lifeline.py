"""A connection that tells two processes on different nodes of each other's end, in seconds.

Ray takes longer: 15 s for a lost node, a minute for a lost head. The kernel closes a dead process's connection at once,
and keepalive ends that of a dead machine, or one that was cut off, after ``LOST_AFTER`` seconds.
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
    """Where an owner listens, and what it wants to hear."""

    host: str
    port: int
    token: str


class Lifelines:
    """The owner's end: ``lost`` is called with the name of whoever was connected, and is no more."""

    def __init__(self, lost: Callable[[str], None]) -> None:
        self._lost = lost
        self._token = secrets.token_hex(16)
        self._server: asyncio.Server | None = None

    async def listen(self, host: str) -> LifelineAddress:
        """Begin, on own address ``host``."""
        self._server = await asyncio.start_server(self._connected, host, 0)
        return LifelineAddress(host, self._server.sockets[0].getsockname()[1], self._token)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _keep_alive(writer)
        with contextlib.closing(writer), contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
            token, _, name = (await asyncio.wait_for(reader.readline(), LOST_AFTER)).decode().strip().partition(" ")
            if hmac.compare_digest(token.encode(), self._token.encode()):
                with contextlib.suppress(OSError):
                    await reader.read()
                self._lost(name)


async def connect(address: LifelineAddress, name: str, ended: Callable[[], None]) -> asyncio.Task[None]:
    """The other end, as ``name``; ``ended`` is called when the owner is no more. The task must be kept.

    Raises:
        OSError: the owner cannot be reached in the first place.
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
