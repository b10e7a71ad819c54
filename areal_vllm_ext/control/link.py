"""``Link``: requests to engines and to the directory, over one connection that opens with the first request."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING

from .. import protocol
from ..errors import ArealError, EngineUnreachable, RequestError
from .connection import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..protocol import Answer, Message, security
    from .connection import OnReply, RequestBatch


class Link:
    """Requests by address. Belongs to the event loop of its first request, until that loop is closed."""

    def __init__(self, key_for: Callable[[str], security.ClusterKey], max_message_bytes: int) -> None:
        """
        Args:
            key_for: the key for a host, see ``security.key_for``.
            max_message_bytes: the longest message that engines read.
        """
        self._key_for = key_for
        self._max_message_bytes = max_message_bytes
        self._connection: Connection | None = None
        self._closed = False

    async def request(self, address: str, message: Message, timeout: float) -> Answer:
        """Send one request and return its answer.

        Raises:
            EngineUnreachable: no answer arrived within ``timeout`` seconds.
            RequestError: the receiver refused the request.
        """
        outcome = (await self.request_all({"": (address, message)}, timeout))[""]
        if isinstance(outcome, ArealError):
            raise outcome
        return outcome

    async def request_all(
        self, requests: Mapping[str, tuple[str, Message]], timeout: float, *, until_error: bool = False
    ) -> dict[str, Answer | EngineUnreachable | RequestError]:
        """Send all requests at once and return the outcome of each.

        Args:
            requests: address and message, by any name.
            timeout: seconds until a request without an answer counts as unreachable.
            until_error: return at the first error, with the outcomes so far.

        Returns:
            the answer to each request, or the error that ``request`` would raise.
        """
        outcomes: dict[str, Answer | EngineUnreachable | RequestError] = {}
        enough_heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_reply(name: str, outcome: Answer | EngineUnreachable) -> None:
            error = isinstance(outcome, (protocol.Error, EngineUnreachable))
            outcomes[name] = (
                RequestError(outcome.kind, outcome.message) if isinstance(outcome, protocol.Error) else outcome
            )
            enough = len(outcomes) == len(requests) or (until_error and error)
            if enough and not enough_heard.done():
                enough_heard.set_result(None)

        if requests:
            asked = self.ask(requests, timeout, on_reply)
            try:
                await enough_heard
            finally:
                asked.cancel()
        return outcomes

    def ask(self, requests: Mapping[str, tuple[str, Message]], timeout: float, on_reply: OnReply) -> RequestBatch:
        """Send all requests at once; ``on_reply`` gets each outcome. See ``Connection.ask``."""
        self.enter_loop()
        if self._connection is None:
            self._connection = Connection(self._key_for, self._max_message_bytes)
        return self._connection.ask(requests, timeout, on_reply)

    def enter_loop(self) -> None:
        """Drop the connection of an event loop that has been closed.

        Raises:
            ArealError: the connection belongs to another event loop that is open; or the link is closed.
        """
        if self._closed:
            raise ArealError("this group is closed")
        if self._connection and self._connection.loop is not asyncio.get_running_loop():
            if not self._connection.loop.is_closed():
                raise ArealError(
                    "this group belongs to another event loop, which is still open: make a group for each event loop"
                )
            self._connection.close()
            self._connection = None

    def keep_only(self, addresses: set[str]) -> None:
        """Close the connections to all other addresses."""
        if self._connection:
            self._connection.keep_only(addresses)

    def close(self) -> None:
        """Close every connection. Further requests are refused."""
        self._closed = True
        if self._connection:
            self._connection.close()
            self._connection = None

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        # The loop refers to the connection, but not to this object. Without this, sockets and threads would stay for ever.
        if self._connection is not None:
            _warn("a group of engines was not closed: use it in a with block", ResourceWarning, source=self)
            self._connection.close_from_any_thread()
