"""The serving end of the wire: a ROUTER socket behind CURVE that answers bad frames with an error, to their sender only."""

from __future__ import annotations

import collections
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from . import security
from .errors import SettingsError
from .protocol import REQUEST_ID_BYTES, Answer, Error, Message, encoder

T = TypeVar("T")

# A caller repeats a request whose answer it has not seen, under the same id: so many answers are kept for that.
_KEPT_ANSWERS = 4096
_LONGEST_KEPT_ANSWER = 16 << 10
# What encryption adds to a frame.
_CURVE_OVERHEAD = 33


class Caller(msgspec.Struct, frozen=True):
    """Whom an answer goes to: the peer's routing id and its request's id."""

    peer: bytes
    request_id: bytes


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
            SettingsError: where the address is in use or not of this machine.
        """
        self._decoder = decoder
        self._answers: collections.OrderedDict[Caller, bytes | None] = collections.OrderedDict()
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.ipv6 = ":" in host
        # A peer that comes back after a cut link takes its own routing id over from its dead connection.
        self.socket.router_handover = True
        self.socket.maxmsgsize = max_message_bytes + _CURVE_OVERHEAD
        self.socket.heartbeat_ivl = 1000
        self.socket.heartbeat_timeout = 5000
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

    def receive(self) -> tuple[Caller, T] | None:
        """The next new request, or None where none is waiting. Bad and repeated frames are dealt with here."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) != 3 or len(frames[1]) != REQUEST_ID_BYTES:
                caller = Caller(frames[0], bytes(REQUEST_ID_BYTES))
                self._send(
                    caller, encoder.encode(Error(kind="malformed", message="frames must be [request id, msgpack]"))
                )
                continue
            caller = Caller(frames[0], frames[1])
            if caller in self._answers:
                if (answer := self._answers[caller]) is not None:
                    self._send(caller, answer)
                continue
            try:
                message = self._decoder.decode(frames[2])
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self._send(caller, encoder.encode(Error(kind="malformed", message=str(error))))
                continue
            self._remember(caller, None)
            return caller, message

    def answer(self, caller: Caller, message: Answer) -> None:
        """Send the answer to a request, and keep it for a repetition."""
        encoded = encoder.encode(message)
        if len(encoded) <= _LONGEST_KEPT_ANSWER:
            self._remember(caller, encoded)
        else:  # only questions have long answers, and a question may be asked again
            self._answers.pop(caller, None)
        self._send(caller, encoded)

    def tell(self, peer: bytes, message: Message) -> None:
        """Send ``message``, which answers nothing, to a connected peer."""
        self._send(Caller(peer, bytes(REQUEST_ID_BYTES)), encoder.encode(message))

    def _remember(self, caller: Caller, answer: bytes | None) -> None:
        self._answers[caller] = answer
        self._answers.move_to_end(caller)
        while len(self._answers) > _KEPT_ANSWERS:
            self._answers.popitem(last=False)

    def _send(self, caller: Caller, payload: bytes) -> None:
        try:
            self.socket.send_multipart([caller.peer, caller.request_id, payload], zmq.NOBLOCK)
        except zmq.Again:
            pass  # the peer does not read: its loss, it asks again under the same id


def connect(
    context: zmq.Context[zmq.Socket[bytes]], address: str, key: security.ClusterKey, identity: bytes
) -> zmq.Socket[Any]:
    """A DEALER socket to the server at ``address``."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.ipv6 = "[" in address
    socket.routing_id = identity
    tune_client(socket)
    security.join_curve(socket, key)
    socket.connect(address)
    return socket


def tune_client(socket: zmq.Socket[Any]) -> None:
    """What every connecting socket has in common: a cut link is noticed in seconds, and mended by reconnecting."""
    socket.heartbeat_ivl = 1000
    socket.heartbeat_timeout = 5000
    socket.handshake_ivl = 5000
    socket.reconnect_ivl = 100
    socket.reconnect_ivl_max = 1000
