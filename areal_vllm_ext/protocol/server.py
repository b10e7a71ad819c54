"""The serving end of the wire: a ROUTER socket behind CURVE. A bad frame costs only its sender an error."""

from __future__ import annotations

import collections
import ipaddress
import time
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from ..errors import SettingsError
from . import REQUEST_ID_BYTES, UNREADABLE, Answer, Error, Message, encoder, security

T = TypeVar("T")

# A caller repeats a request whose answer it has not seen, under the same id. At most 64 replies per peer are cached for
# that, and 64 MiB for all peers; older ones are evicted.
_KEPT_ANSWERS = 64
_LONGEST_KEPT_ANSWER = 16 << 10
_KEPT_BYTES = 64 << 20
# At most 32 messages are read in a round; then the server sleeps 2 ms, so that excess messages queue at their senders and
# other users of this thread and of the interpreter can run.
_ROUND = 32
_REST_SECONDS = 0.002
# Queue length per peer and direction, in messages of any allowed length.
_QUEUE = 64
# I/O threads of a context with clients: the second one looks up names (``set_io_thread``).
IO_THREADS = 2
# Bytes that encryption adds to a frame.
_CURVE_OVERHEAD = 33


class ReplyTo(msgspec.Struct, frozen=True):
    """Where an answer goes: the peer's routing id and the id of its request."""

    peer: bytes
    request_id: bytes


class ReplyCache:
    """The replies sent so far, None while a request is being handled. A peer can only evict its own replies."""

    def __init__(self) -> None:
        # Peers, the longest silent first; and the requests of each, the oldest first.
        self._peers: collections.OrderedDict[bytes, collections.OrderedDict[bytes, bytes | None]] = (
            collections.OrderedDict()
        )
        self.nbytes = 0

    def __contains__(self, caller: ReplyTo) -> bool:
        return caller.request_id in self._peers.get(caller.peer, ())

    def __getitem__(self, caller: ReplyTo) -> bytes | None:
        return self._peers[caller.peer][caller.request_id]

    def __setitem__(self, caller: ReplyTo, answer: bytes | None) -> None:
        del self[caller]
        kept = self._peers.setdefault(caller.peer, collections.OrderedDict())
        self._peers.move_to_end(caller.peer)
        kept[caller.request_id] = answer
        self.nbytes += _size(caller.peer, answer)
        if len(kept) > _KEPT_ANSWERS:
            self.nbytes -= _size(caller.peer, kept.popitem(last=False)[1])
        while self.nbytes > _KEPT_BYTES:
            peer, forgotten = self._peers.popitem(last=False)
            self.nbytes -= sum(_size(peer, one) for one in forgotten.values())

    def __delitem__(self, caller: ReplyTo) -> None:
        kept = self._peers.get(caller.peer)
        if kept and caller.request_id in kept:
            self.nbytes -= _size(caller.peer, kept.pop(caller.request_id))

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._peers.values())


def _size(peer: bytes, answer: bytes | None) -> int:
    """Return the bytes that an entry takes, with its id and its places in the dictionaries."""
    return 512 + len(peer) + len(answer or b"")


class Server(Generic[T]):
    """Requests in, answers out; used from one thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        port: int,
        key: security.ClusterKey,
        decoder: msgspec.msgpack.Decoder[T],
        max_message_bytes: int,
    ) -> None:
        """Bind ``tcp://host:port`` (port 0: any free one).

        Raises:
            SettingsError: if the address is in use or not of this machine.
        """
        self._decoder = decoder
        self._answers = ReplyCache()
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.rcvhwm = self.socket.sndhwm = _QUEUE
        self.socket.ipv6 = ":" in host
        self.socket.affinity = 1  # not the thread that looks up names
        # A peer that reconnects after a cut link takes over the routing id of its dead connection.
        self.socket.router_handover = True
        self.socket.maxmsgsize = max_message_bytes + _CURVE_OVERHEAD
        # Only clients send ZMTP heartbeats (see ``tune_client``). libzmq 4.3.5 aborts the process if a heartbeat is due on a
        # connection that the peer has closed while its messages still wait to be read.
        self.socket.handshake_ivl = 5000
        security.serve_curve(self.socket, key)
        bracketed = f"[{host}]" if ":" in host else host
        try:
            self.socket.bind(f"tcp://{bracketed}:{port or '*'}")
        except zmq.ZMQError as error:
            self.socket.close()
            raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        bound_port = bytes(self.socket.getsockopt(zmq.LAST_ENDPOINT)).decode().rpartition(":")[2].rstrip("\0")
        self.address = f"tcp://{bracketed}:{bound_port}"

    def requests(self) -> Iterator[tuple[ReplyTo, T]]:
        """Yield the new requests among the messages that wait now, after handling bad and repeated ones."""
        for _ in range(_ROUND):
            try:
                frames = self._receive()
            except zmq.Again:
                return
            caller = ReplyTo(frames[0], frames[1] if len(frames) == 3 else b"")
            if len(caller.request_id) != REQUEST_ID_BYTES:
                self._refuse(ReplyTo(caller.peer, bytes(REQUEST_ID_BYTES)), "frames must be [request id, msgpack]")
                continue
            if caller in self._answers:
                if (answer := self._answers[caller]) is not None:
                    self._send(caller, answer)
                continue
            try:
                message = self._decoder.decode(frames[2])
            except UNREADABLE as error:
                self._refuse(caller, str(error))
                continue
            self._answers[caller] = None
            yield caller, message
        time.sleep(_REST_SECONDS)

    def _receive(self) -> list[bytes]:
        """Return the frames of the next message, or the first ones if there are too many.

        Raises:
            zmq.Again: if no message waits.
        """
        frames = [self.socket.recv(zmq.NOBLOCK)]
        while self.socket.rcvmore:
            frame = self.socket.recv()
            if len(frames) <= 3:
                frames.append(frame)
        return frames

    def _refuse(self, caller: ReplyTo, problem: str) -> None:
        self._send(caller, encoder.encode(Error(kind="malformed", message=problem)))

    def answer(self, caller: ReplyTo, message: Answer) -> None:
        """Send the answer to a request, and cache it for repetitions."""
        encoded = encoder.encode(message)
        if len(encoded) <= _LONGEST_KEPT_ANSWER:
            self._answers[caller] = encoded
        else:  # only queries have long answers, and a query may run twice
            del self._answers[caller]
        self._send(caller, encoded)

    def tell(self, peer: bytes, message: Message) -> None:
        """Send ``message`` to a connected peer that did not ask for it."""
        self._send(ReplyTo(peer, bytes(REQUEST_ID_BYTES)), encoder.encode(message))

    def _send(self, caller: ReplyTo, payload: bytes) -> None:
        try:
            self.socket.send_multipart([caller.peer, caller.request_id, payload], zmq.NOBLOCK)
        except zmq.Again:
            pass  # the peer does not read; it can repeat its request under the same id


def looks_up(address: str) -> bool:
    """Return whether a connection to ``tcp://host:port`` asks a name server, each time it is made."""
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def set_io_thread(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[Any], address: str) -> None:
    """Choose the I/O thread of ``context`` for the next ``connect``.

    While libzmq looks up a name, its thread does nothing else: for ten seconds and more where no name server answers. So
    connections to names have a thread of their own, where there is one.
    """
    socket.affinity = 2 if looks_up(address) and context.get(zmq.IO_THREADS) > 1 else 1


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, key: security.ClusterKey, identity: bytes
) -> zmq.Socket[Any]:
    """Return a DEALER socket to the server at ``address``."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.ipv6 = "[" in address
    socket.routing_id = identity
    tune_client(socket)
    security.join_curve(socket, key)
    set_io_thread(context, socket, address)
    socket.connect(address)
    return socket


def tune_client(socket: zmq.Socket[Any]) -> None:
    """Let both ends of a connection notice a cut link within seconds, and this one reconnect."""
    socket.heartbeat_ivl = 1000
    socket.heartbeat_timeout = 5000
    socket.heartbeat_ttl = 5000  # after that silence the server ends the connection
    # Unlimited, because libzmq 4.3.5 aborts the process if a heartbeat is due while a limit holds back what has arrived. A
    # client receives answers to its own requests only, so they are few.
    socket.rcvhwm = 0
    socket.handshake_ivl = 5000
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 1000
