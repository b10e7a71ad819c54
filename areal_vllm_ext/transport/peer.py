"""Tensors from one worker to another, over TCP: the worker that fetches asks for one tensor after another, by its number.

Both ends prove that they know the fetch's name (``tcp_connect.py``). A request is a number (4 bytes, little endian). Its
answer is the size of the tensor (8 bytes) and its bytes, or ``_REFUSED`` and a reason (its size in 4 bytes, and UTF-8). Every
wait has a deadline, and shutting the connection down ends every call at once.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

from .base import Cancelled, PeerLost
from .tcp_connect import Listener, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_NUMBER, _SIZE = struct.Struct("<I"), struct.Struct("<Q")
_REFUSED = 2**64 - 1
_LONGEST_REASON = 4096
# A peer that sends nothing for so long is lost.
_SILENT_SECONDS = 15.0
_CONNECT_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20
_WHO = "the peer"


class Refused(RuntimeError):
    """The peer ended its offer, and says why."""


class PeerSink:
    """The end of the worker that offers its tensors."""

    def __init__(self, host: str) -> None:
        """Listen on ``host``, one numeric address of this machine.

        Raises:
            RuntimeError: this process cannot listen there.
        """
        self._listener = Listener(host, "this engine's worker")
        self.address = self._listener.address
        self._connection: socket.socket | None = None
        self._closed = threading.Event()

    def accept(self, token: str) -> None:
        """Wait for the worker that fetches.

        Raises:
            Cancelled: ``close`` was called.
            TimeoutError: it did not connect in time.
        """
        name = "the worker that fetches"
        self._connection = self._listener.accept_all(token, {0: name}, _CONNECT_SECONDS, self._closed.is_set)[0]
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.settimeout(_SILENT_SECONDS)

    def next_request(self) -> int | None:
        """Return the number of the tensor that is wanted next; None at the end.

        Raises:
            TimeoutError: the other worker asks for nothing.
        """
        assert self._connection is not None
        try:
            data = self._connection.recv(_NUMBER.size, socket.MSG_WAITALL)
        except TimeoutError:
            raise TimeoutError(f"the other worker asked for nothing for {_SILENT_SECONDS:.0f} s") from None
        except OSError:
            return None
        return _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else None

    def send(self, nbytes: int, slices: Iterable[memoryview]) -> None:
        """Send a tensor of ``nbytes``, in slices.

        Raises:
            PeerLost: the connection broke, or the other worker takes nothing.
        """
        assert self._connection is not None
        try:
            self._connection.sendall(_SIZE.pack(nbytes))
            for view in slices:
                self._connection.sendall(view)
        except OSError as error:
            raise PeerLost(f"the other worker is gone ({error})") from None

    def refuse(self, reason: str) -> None:
        """Say why no further tensor comes."""
        text = reason.encode()[:_LONGEST_REASON]
        with contextlib.suppress(OSError, AssertionError):
            assert self._connection is not None
            self._connection.sendall(_SIZE.pack(_REFUSED) + _NUMBER.pack(len(text)) + text)

    def close(self) -> None:
        """End the transfer. Safe on any thread, and twice."""
        self._closed.set()
        _shut_down(self._connection)

    def free(self) -> None:
        """Close the sockets, from the thread that used them."""
        self._listener.close()
        if self._connection is not None:
            self._connection.close()


class PeerSource:
    """The end of the worker that fetches."""

    def __init__(self, address: str, token: str, cancelled: Callable[[], bool]) -> None:
        """Connect to a ``PeerSink``.

        Raises:
            Cancelled: ``cancelled()`` became true.
            RuntimeError: there is no such sink.
            TimeoutError: it does not answer.
        """
        self._cancelled = cancelled
        self._connection = connect(address, token, 0, _CONNECT_SECONDS, cancelled, _WHO)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.settimeout(_SILENT_SECONDS)

    def fetch(self, number: int, view: memoryview, ends: float) -> None:
        """Receive a tensor.

        Args:
            number: of the tensor.
            view: where its bytes go; all of it is filled.
            ends: the deadline, on the monotonic clock.

        Raises:
            Cancelled: the fetch was given up.
            Refused: the peer says why it sends no more.
            PeerLost: the connection broke, or was silent.
            TimeoutError: the deadline is over.
        """
        try:
            self._connection.sendall(_NUMBER.pack(number))
            (nbytes,) = _SIZE.unpack(self._receive(_SIZE.size))
            if nbytes == _REFUSED:
                (length,) = _NUMBER.unpack(self._receive(_NUMBER.size))
                raise Refused(self._receive(min(length, _LONGEST_REASON)).decode(errors="replace"))
            if nbytes != len(view):
                raise PeerLost(f"the peer sent a tensor of {nbytes} bytes instead of {len(view)}")
            for start in range(0, nbytes, _CHUNK_BYTES):
                self._check(ends)
                self._fill(view[start : start + _CHUNK_BYTES])
        except TimeoutError as error:
            if time.monotonic() > ends:
                raise
            raise PeerLost(f"the peer was silent for {_SILENT_SECONDS:.0f} s") from error
        except OSError as error:
            if self._cancelled():
                raise Cancelled from None
            raise PeerLost(f"the connection to the peer broke ({error})") from None

    def _check(self, ends: float) -> None:
        if self._cancelled():
            raise Cancelled
        if time.monotonic() > ends:
            raise TimeoutError("its weights did not arrive in time")

    def _receive(self, count: int) -> bytes:
        data = bytearray(count)
        self._fill(memoryview(data))
        return bytes(data)

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._connection.recv_into(view)
            if not count:
                raise ConnectionResetError("it was closed")
            view = view[count:]

    def shut_down(self) -> None:
        """End the transfer at once. Safe on any thread."""
        _shut_down(self._connection)

    def close(self) -> None:
        """Close the connection, from the thread that used it."""
        self._connection.close()


def _shut_down(connection: socket.socket | None) -> None:
    if connection is not None:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
