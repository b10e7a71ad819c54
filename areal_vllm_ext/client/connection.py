"""One socket for all engines: requests out, answers in, each with its own deadline."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
import uuid
from typing import TYPE_CHECKING

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from .. import protocol, security, wire
from ..errors import EngineUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..protocol import Answer, Message

# A request whose answer is late is sent again under its id: a cut link may have swallowed it. Engines answer an id once.
_REPEAT_SECONDS = 1.0
# A server whose connection is lost for so long is taken for gone, however long its caller would wait.
_GONE_SECONDS = 5.0

_EVENTS = {
    zmq.Event.CONNECTED: "it accepts connections but does not answer",
    zmq.Event.HANDSHAKE_SUCCEEDED: "",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the key was refused: trainer and engines need the same key file",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the key was refused: trainer and engines need the same key file",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "something else than areal-vllm-ext listens there, or its key is another one",
    zmq.Event.CLOSED: "nothing listens there",
    zmq.Event.CONNECT_RETRIED: "nothing listens there",
    zmq.Event.DISCONNECTED: "the connection was lost",
}


class Connection:
    """A ROUTER socket, connected to many servers. Belongs to one event loop."""

    def __init__(self, key_for: Callable[[str], security.ClusterKey], max_message_bytes: int = 16 << 20) -> None:
        """
        Args:
            key_for: the key for a host, see ``security.key_for``.
            max_message_bytes: what engines read at most; longer messages are refused here, with a reason.
        """
        self._key_for = key_for
        self._max_message_bytes = max_message_bytes
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.routing_id = uuid.uuid4().bytes
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.sndhwm = 0
        wire.tune_client(self._socket)
        self._peers: dict[str, bytes] = {}
        self._pending: dict[bytes, asyncio.Future[Answer]] = {}
        self._events: dict[str, zmq.Event] = {}
        self._unconnected_since: dict[str, float] = {}
        self._monitor = self._socket.get_monitor_socket()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    async def request(self, address: str, message: Message, timeout: float) -> Answer:
        """Send ``message`` to ``address`` and wait for its answer.

        Raises:
            EngineUnreachable: no answer within ``timeout`` seconds; the message says what the connection saw.
        """
        payload = protocol.encoder.encode(message)
        if len(payload) > self._max_message_bytes:
            raise ValueError(
                f"a message of {len(payload) >> 20} MiB is more than engines read: raise AREAL_VLLM_MAX_MESSAGE_MIB there"
            )
        peer = self._peer(address)
        request_id = os.urandom(protocol.REQUEST_ID_BYTES)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[request_id] = answer
        ends = asyncio.get_running_loop().time() + timeout
        try:
            while (left := ends - asyncio.get_running_loop().time()) > 0:
                with contextlib.suppress(zmq.ZMQError):
                    await self._socket.send_multipart([peer, request_id, payload], zmq.NOBLOCK)
                done, _ = await asyncio.wait([answer], timeout=min(left, _REPEAT_SECONDS))
                if done:
                    return answer.result()
                if (seconds := time.monotonic() - self._unconnected_since.get(address, math.inf)) > _GONE_SECONDS:
                    raise EngineUnreachable(f"{address} is not connected since {seconds:.1f} s{self._why(address)}")
        finally:
            self._pending.pop(request_id, None)
        raise EngineUnreachable(f"{address} did not answer within {timeout:.1f} s{self._why(address)}")

    def keep_only(self, addresses: set[str]) -> None:
        """Stop reconnecting to engines that are gone."""
        for address in self._peers.keys() - addresses:
            del self._peers[address], self._unconnected_since[address]
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(address)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.destroy(linger=0)

    def _peer(self, address: str) -> bytes:
        if (peer := self._peers.get(address)) is None:
            peer = self._peers[address] = uuid.uuid4().bytes
            host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
            security.join_curve(self._socket, self._key_for(host))
            self._socket.ipv6 = "[" in address
            self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, peer)
            self._unconnected_since[address] = time.monotonic()
            self._socket.connect(address)
        return peer

    def _why(self, address: str) -> str:
        event = self._events.get(address)
        reason = _EVENTS.get(event, "") if event else ""
        return f": {reason}" if reason else ""

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 3:
                continue
            answer = self._pending.get(frames[1])
            if answer is None or answer.done():
                continue
            try:
                answer.set_result(protocol.answer_decoder.decode(frames[2]))
            except protocol.UNREADABLE as error:
                answer.set_result(protocol.Error(kind="malformed", message=f"the answer cannot be read: {error}"))

    async def _watch(self) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            address, kind = event["endpoint"].decode(), zmq.Event(event["event"])
            # A refused handshake ends in a disconnect: the cause is worth more than its consequence.
            refused = self._events.get(address) in (
                zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
                zmq.Event.HANDSHAKE_FAILED_AUTH,
                zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
            )
            if kind == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._unconnected_since[address] = math.inf
            elif kind == zmq.Event.DISCONNECTED and address in self._peers:
                self._unconnected_since[address] = min(self._unconnected_since[address], time.monotonic())
            if kind in _EVENTS and not (refused and kind != zmq.Event.HANDSHAKE_SUCCEEDED):
                self._events[address] = kind
