"""One socket for all engines: requests out, answers in, each with its own deadline."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import os
import time
import uuid
from typing import TYPE_CHECKING

import zmq
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
_READ_AT_ONCE = 64

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


@dataclasses.dataclass(slots=True)
class _Pending:
    """A request under way: what was sent where, until when it is waited for, and what repeats it or gives it up."""

    address: str
    peer: bytes
    payload: bytes
    timeout: float
    ends: float
    answer: asyncio.Future[Answer]
    timer: asyncio.TimerHandle | None = None


class Connection:
    """A ROUTER socket, connected to many servers. Belongs to one event loop.

    The loop watches the socket itself, without ``zmq.asyncio``: a command of a thousand engines is two thousand messages,
    and that costs several tasks, futures and system calls for each of them.
    """

    def __init__(self, key_for: Callable[[str], security.ClusterKey], max_message_bytes: int = 16 << 20) -> None:
        """
        Args:
            key_for: the key for a host, see ``security.key_for``.
            max_message_bytes: what engines read at most; longer messages are refused here, with a reason.
        """
        self._key_for = key_for
        self._max_message_bytes = max_message_bytes
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.routing_id = uuid.uuid4().bytes
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.sndhwm = 0
        wire.tune_client(self._socket)
        self._peers: dict[str, bytes] = {}
        # Ids are this connection's own, as its routing id is: counted, since randomness is a system call for each.
        self._id_prefix = os.urandom(protocol.REQUEST_ID_BYTES - 8)
        self._id_numbers = itertools.count()
        self._pending: dict[bytes, _Pending] = {}
        self._events: dict[str, zmq.Event] = {}
        self._unconnected_since: dict[str, float] = {}
        self._monitor = self._socket.get_monitor_socket()
        self._reading = False
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._loop.add_reader(self._monitor.fileno(), self._watch)
        self._loop.call_soon(self._watch)  # a ZeroMQ descriptor tells nothing before the first look

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
        if timeout <= 0:
            raise self._unreachable(address, timeout)
        request_id = self._id_prefix + next(self._id_numbers).to_bytes(8, "big")
        pending = _Pending(
            address, self._peer(address), payload, timeout, self._loop.time() + timeout, self._loop.create_future()
        )
        self._pending[request_id] = pending
        try:
            self._send(request_id, pending)
            return await pending.answer
        finally:
            del self._pending[request_id]
            if pending.timer:
                pending.timer.cancel()

    def _send(self, request_id: bytes, pending: _Pending) -> None:
        """Send it, and look again when it should have been answered."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([pending.peer, request_id, pending.payload], zmq.NOBLOCK)
        self._read_soon()
        seconds = min(pending.ends - self._loop.time(), _REPEAT_SECONDS)
        pending.timer = self._loop.call_later(seconds, self._repeat, request_id, pending)

    def _repeat(self, request_id: bytes, pending: _Pending) -> None:
        """It was not answered: give it up, or say it again."""
        if pending.answer.done():
            return
        address = pending.address
        if (seconds := time.monotonic() - self._unconnected_since.get(address, math.inf)) > _GONE_SECONDS:
            said = f"{address} is not connected since {seconds:.1f} s{self._why(address)}"
            pending.answer.set_exception(EngineUnreachable(said))
        elif self._loop.time() >= pending.ends:
            pending.answer.set_exception(self._unreachable(address, pending.timeout))
        else:
            self._send(request_id, pending)

    def _unreachable(self, address: str, timeout: float) -> EngineUnreachable:
        return EngineUnreachable(f"{address} did not answer within {timeout:.1f} s{self._why(address)}")

    def keep_only(self, addresses: set[str]) -> None:
        """Stop reconnecting to engines that are gone."""
        for address in self._peers.keys() - addresses:
            del self._peers[address], self._unconnected_since[address]
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(address)
        self._read_soon()

    async def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
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

    def _read_soon(self) -> None:
        # A ZeroMQ descriptor tells of a change once, and any call on the socket may use that up: look after each.
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._reading = False
        if self._socket.closed:
            return
        for _ in range(_READ_AT_ONCE):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3:
                continue
            pending = self._pending.get(frames[1])
            if pending is None or pending.answer.done():
                continue
            try:
                pending.answer.set_result(protocol.answer_decoder.decode(frames[2]))
            except protocol.UNREADABLE as error:
                pending.answer.set_result(
                    protocol.Error(kind="malformed", message=f"the answer cannot be read: {error}")
                )
        self._read_soon()  # after others of this loop have had their turn

    def _watch(self) -> None:
        while not self._monitor.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
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
