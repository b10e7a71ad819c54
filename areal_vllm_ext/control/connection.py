"""``Connection``: one socket for all engines. Requests go out, answers come in, and each request has a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import math
import os
import threading
import time
import uuid
import weakref
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import parse_monitor_message

from .. import protocol
from ..errors import EngineUnreachable
from ..protocol import security
from ..protocol.server import IO_THREADS, looks_up, set_io_thread, tune_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..protocol import Answer, Message

    OnReply = Callable[[str, Answer | EngineUnreachable], None]

# A request without an answer is sent again under its id after this time, because a cut link may have lost it. A server
# carries out each id once.
_REPEAT_SECONDS = 1.0
# A server without a connection for this time counts as gone, however long its caller would wait.
_GONE_SECONDS = 5.0
# Messages that are read before other work of the loop runs.
_READ_AT_ONCE = 64

# What the events of a connection say about a server that does not answer.
_REFUSED = "the key was refused (trainer and engines need the same key file), or another service listens there"
_FROZEN = "it accepts connections but does not answer: is its process stopped or overloaded, or another service?"
_REASONS = {
    zmq.Event.CONNECTED: _FROZEN,
    zmq.Event.HANDSHAKE_SUCCEEDED: "",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: _REFUSED,
    zmq.Event.HANDSHAKE_FAILED_AUTH: _REFUSED,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "something else than areal-vllm-ext listens there, or its key is another one",
    zmq.Event.CLOSED: "nothing listens there",
    zmq.Event.CONNECT_RETRIED: "nothing listens there",
    zmq.Event.DISCONNECTED: "the connection was lost",
}
_FAILED_HANDSHAKES = (_REFUSED, _FROZEN, _REASONS[zmq.Event.HANDSHAKE_FAILED_PROTOCOL])
# A server with another key closes the connection, which is one of these errors. A handshake that fails for another reason,
# such as EAGAIN after 5 s, got no answer.
_CLOSED_BY_PEER = (errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED)

# Plain numbers, because combining enum flags takes longer than sending a frame.
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


@dataclasses.dataclass(slots=True)
class _Pending:
    """A request in flight: its name, its address, and the bytes that were sent."""

    name: str
    address: str
    peer: bytes
    payload: bytes
    batch: RequestBatch


class RequestBatch:
    """Requests that were sent together and share one timer."""

    def __init__(self, connection: Connection, timeout: float, ends: float, on_reply: OnReply) -> None:
        self.timeout = timeout
        self.ends = ends
        self.on_reply = on_reply
        self.waiting: dict[bytes, _Pending] = {}
        self.timer: asyncio.TimerHandle | None = None
        self._connection = connection

    def cancel(self) -> None:
        """Stop waiting for the requests without an answer."""
        if self.timer:
            self.timer.cancel()
        self._connection.drop(self.waiting)
        self.waiting.clear()


class Connection:
    """A ROUTER socket, connected to many servers. Belongs to one event loop.

    The loop watches the socket itself. ``zmq.asyncio`` would cost several tasks, futures and system calls per message, and
    a command to a thousand engines is two thousand messages. Requests are sent in batches for the same reason.
    """

    def __init__(self, key_for: Callable[[str], security.ClusterKey], max_message_bytes: int = 16 << 20) -> None:
        """
        Args:
            key_for: the key for a host, see ``security.key_for``.
            max_message_bytes: the longest message that engines read; longer ones are refused here, with the reason.
        """
        self._key_for = key_for
        self._max_message_bytes = max_message_bytes
        self.loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(IO_THREADS)
        try:
            self._socket = self._context.socket(zmq.ROUTER)
            self._monitor = self._socket.get_monitor_socket()
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise EngineUnreachable(
                f"this process cannot make a connection ({error}): close files, or raise its limit (ulimit -n)"
            ) from None
        self._socket.routing_id = uuid.uuid4().bytes
        self._socket.linger = 0
        self._socket.router_mandatory = True
        self._socket.sndhwm = 0
        tune_client(self._socket)
        self._peers: dict[str, bytes] = {}
        self._id_prefix = os.urandom(protocol.REQUEST_ID_BYTES - 8)
        self._id_numbers = itertools.count()
        self._pending: dict[bytes, _Pending] = {}
        # What the last event of each address says.
        self._reasons: dict[str, str] = {}
        self._unconnected_since: dict[str, float] = {}
        self._names: list[str] = []  # addresses for which libzmq asks a name server
        # A loop that ends may drop a close that it was asked for. Without this, the garbage collector would then end the
        # context before its sockets, and wait for them for ever.
        self._free = weakref.finalize(self, _free, self._context, self._socket, self._monitor, self._names)
        self._free.atexit = False
        self._reading = False
        self.loop.add_reader(self._socket.fileno(), self._read)
        self.loop.add_reader(self._monitor.fileno(), self._watch)
        self.loop.call_soon(self._watch)  # the ZeroMQ fd is edge-triggered: it signals only after a first read

    def ask(self, requests: Mapping[str, tuple[str, Message]], timeout: float, on_reply: OnReply) -> RequestBatch:
        """Send requests to addresses, by any name. A message to several addresses is encoded once.

        Args:
            requests: address and message, by any name.
            timeout: seconds until a request without an answer counts as unreachable.
            on_reply: called once per name, with the answer or with the reason why there is none. A cancelled batch calls
                it no more.

        Raises:
            ValueError: a message is longer than engines read; nothing was sent.
        """
        now = self.loop.time()
        made = RequestBatch(self, timeout, now + timeout, on_reply)
        encoded, payload = None, b""
        for name, (address, message) in requests.items():
            if message is not encoded:
                encoded, payload = message, self._encoded(message)
            # Count ids instead of drawing them, because each random id would cost a system call.
            request_id = self._id_prefix + next(self._id_numbers).to_bytes(8, "big")
            made.waiting[request_id] = _Pending(name, address, self._peer(address), payload, made)
        self._pending.update(made.waiting)
        if timeout > 0:
            self._send(made)
        else:
            self._repeat(made)
        return made

    def _encoded(self, message: Message) -> bytes:
        payload = protocol.encoder.encode(message)
        if len(payload) > self._max_message_bytes:
            raise ValueError(
                f"a message of {len(payload) >> 20} MiB is more than engines read: raise AREAL_VLLM_MAX_MESSAGE_MIB there"
            )
        return payload

    def drop(self, request_ids: Iterable[bytes]) -> None:
        """Ignore answers to these requests from now on."""
        for request_id in request_ids:
            self._pending.pop(request_id, None)

    def _send(self, made: RequestBatch) -> None:
        """Send the requests without an answer, and start the timer that repeats them."""
        for request_id, pending in made.waiting.items():
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send(pending.peer, _MORE)
                self._socket.send(request_id, _MORE)
                self._socket.send(pending.payload, _NOBLOCK)
        self._read_soon()
        seconds = min(made.ends - self.loop.time(), _REPEAT_SECONDS)
        made.timer = self.loop.call_later(seconds, self._repeat, made)

    def _repeat(self, made: RequestBatch) -> None:
        """Give up the requests whose time is over, and send the others again."""
        now = self.loop.time()
        for request_id, pending in list(made.waiting.items()):
            if now >= made.ends or self._seconds_unconnected(pending.address) > _GONE_SECONDS:
                self._reply(request_id, self._unreachable(pending.address, made.timeout))
        if made.waiting:
            self._send(made)

    def _seconds_unconnected(self, address: str) -> float:
        return time.monotonic() - self._unconnected_since.get(address, math.inf)

    def _reply(self, request_id: bytes, outcome: Answer | EngineUnreachable) -> None:
        if (pending := self._pending.pop(request_id, None)) is None:
            return
        made = pending.batch
        del made.waiting[request_id]
        if not made.waiting:
            made.cancel()
        made.on_reply(pending.name, outcome)

    def _unreachable(self, address: str, timeout: float) -> EngineUnreachable:
        if (seconds := self._seconds_unconnected(address)) > _GONE_SECONDS:
            return EngineUnreachable(f"{address} has not been connected for {seconds:.1f} s{self._why(address)}")
        return EngineUnreachable(f"{address} did not answer within {timeout:.1f} s{self._why(address)}")

    def keep_only(self, addresses: set[str]) -> None:
        """Close the connections to all other addresses, and stop reconnecting to them."""
        for address in self._peers.keys() - addresses:
            del self._peers[address], self._unconnected_since[address]
            self._reasons.pop(address, None)
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(address)
        self._read_soon()

    def close(self) -> None:
        """Close the sockets, in the thread of the loop or once the loop is closed."""
        if self._socket.closed:
            return
        if not self.loop.is_closed():
            self.loop.remove_reader(self._socket.fileno())
            self.loop.remove_reader(self._monitor.fileno())
        self._free()

    def close_from_any_thread(self) -> None:
        """Close the sockets in the loop's thread if the loop runs; otherwise here."""
        try:
            if self.loop.is_running():
                self.loop.call_soon_threadsafe(self.close)
                if not self.loop.is_closed():  # a loop that was closed just now calls nothing any more
                    return
        except RuntimeError:
            pass  # the loop was closed just now
        self.close()

    def _peer(self, address: str) -> bytes:
        if (peer := self._peers.get(address)) is None:
            peer = self._peers[address] = uuid.uuid4().bytes
            host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
            security.join_curve(self._socket, self._key_for(host))
            self._socket.ipv6 = "[" in address
            self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, peer)
            self._unconnected_since[address] = time.monotonic()
            set_io_thread(self._context, self._socket, address)
            if looks_up(address):
                self._reasons[address] = "its name is being looked up: does the name server answer?"
                self._names.append(address)
            self._socket.connect(address)
        return peer

    def _why(self, address: str) -> str:
        reason = self._reasons.get(address)
        return f": {reason}" if reason else ""

    def _read_soon(self) -> None:
        # The ZeroMQ fd is edge-triggered and any socket call may consume the edge, so read again after each call.
        if not self._reading:
            self._reading = True
            self.loop.call_soon(self._read)

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
            if frames[1] not in self._pending:
                continue
            answer: Answer
            try:
                answer = protocol.answer_decoder.decode(frames[2])
            except protocol.UNREADABLE as error:
                answer = protocol.Error(kind="malformed", message=f"the answer cannot be read: {error}")
            self._reply(frames[1], answer)
        self._read_soon()  # other work of this loop runs first

    def _watch(self) -> None:
        while not self._monitor.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            address, kind = event["endpoint"].decode(), zmq.Event(event["event"])
            if address in self._peers:
                self._note(address, kind, int(event["value"]))

    def _note(self, address: str, kind: zmq.Event, value: int) -> None:
        """Note what an event of the connection to ``address`` says about its server."""
        if kind == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._unconnected_since[address] = math.inf
        elif kind == zmq.Event.DISCONNECTED:
            self._unconnected_since[address] = min(self._unconnected_since[address], time.monotonic())
        reason = _REASONS.get(kind)
        if kind == zmq.Event.HANDSHAKE_FAILED_NO_DETAIL and value not in _CLOSED_BY_PEER:
            reason = _FROZEN
        # A handshake that failed ends in a disconnect and a new try. Keep the cause, not its consequence.
        failed = self._reasons.get(address) in _FAILED_HANDSHAKES
        consequence = kind in (zmq.Event.CONNECTED, zmq.Event.DISCONNECTED, zmq.Event.CONNECT_RETRIED)
        if reason is not None and not (failed and consequence):
            self._reasons[address] = reason


def _free(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes], names: list[str]
) -> None:
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close(linger=0)
    if names:  # one of them may still be looked up, which this thread must not wait for
        threading.Thread(target=context.term, name="areal-closing", daemon=True).start()
    else:
        context.destroy(linger=0)
