"""How workers connect to the trainer over TCP: one short-lived listener, and a proof of the shared token on both ends.

The token is random and reaches both ends over the encrypted control connection. A connection that does not prove it knows the
token within seconds is closed, and the listener is closed once all workers have connected. So a stranger can neither take a
worker's place nor use up descriptors. Every wait has a deadline, and no name is resolved: addresses are numeric.

    trainer                              worker
    challenge (16 random bytes)    -->
                                   <--   rank, challenge, proof of both challenges and the rank
    proof of the same              -->
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import os
import select
import selectors
import socket
import struct
import time
from typing import TYPE_CHECKING

from .base import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_CHALLENGE_BYTES = 16
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"<I{_CHALLENGE_BYTES}s{_PROOF_BYTES}s")
# At most this many connections wait for their proof; beyond that, and after this time, the oldest is closed.
_MOST_UNPROVEN, _UNPROVEN_SECONDS = 128, 5.0
_POLL_SECONDS = 0.01
# After these, the next accept or connect can succeed.
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_DESCRIPTOR = "no file descriptor is left; raise the limit (ulimit -n)"


def _proof(token: str, who: bytes, challenges: bytes, rank: int) -> bytes:
    return hmac.digest(token.encode(), who + challenges + struct.pack("<I", rank), "sha256")


def _cause(error: OSError) -> str:
    return _NO_DESCRIPTOR if error.errno in _OUT_OF_RESOURCES else str(error.strerror or error)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class _Unproven:
    """A connection that has not proven yet that it knows the token."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.since = time.monotonic()
        self.challenge = os.urandom(_CHALLENGE_BYTES)
        self.received = b""

    def read(self, token: str, workers: Mapping[int, str]) -> int | None:
        """Read what has come, and return the worker's rank once it is proven.

        Raises:
            OSError: the connection has ended.
            ValueError: it is no worker of this update.
        """
        data = self.connection.recv(_HELLO.size - len(self.received))
        if not data:
            raise ConnectionResetError
        self.received += data
        if len(self.received) < _HELLO.size:
            return None
        rank, challenge, proof = _HELLO.unpack(self.received)
        challenges = self.challenge + challenge
        if rank not in workers or not hmac.compare_digest(proof, _proof(token, b"worker", challenges, rank)):
            raise ValueError
        self.connection.sendall(_proof(token, b"trainer", challenges, rank))
        return int(rank)


class Listener:
    """The trainer's end until all workers have connected."""

    def __init__(self, host: str, who: str = "the trainer") -> None:
        """Listen on ``host``, one numeric address of this machine, at any free port.

        Args:
            host: the address.
            who: listens, for messages.

        Raises:
            RuntimeError: this process cannot listen there.
        """
        with contextlib.ExitStack() as on_failure:
            try:
                self._socket = socket.create_server((host, 0), family=_family(host), backlog=1024)
                on_failure.callback(self._socket.close)
                self._selector = selectors.DefaultSelector()
            except OSError as error:
                raise RuntimeError(f"{who} cannot listen on {host}: {_cause(error)}") from None
            on_failure.pop_all()
        self._socket.setblocking(False)
        self._selector.register(self._socket, selectors.EVENT_READ)
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._unproven: dict[socket.socket, _Unproven] = {}  # the oldest first
        self._connected: dict[int, socket.socket] = {}

    def accept_all(
        self, token: str, workers: Mapping[int, str], timeout: float, cancelled: Callable[[], bool]
    ) -> dict[int, socket.socket]:
        """Return the connection of each worker, by rank, and close the listener.

        Args:
            token: what a worker must prove to know.
            workers: the names of all workers by rank.
            timeout: seconds.
            cancelled: whether to give up.

        Raises:
            Cancelled: ``cancelled()`` became true.
            TimeoutError: not all workers connected within ``timeout`` seconds.
        """
        ends = time.monotonic() + timeout
        try:
            while len(self._connected) < len(workers):
                if cancelled():
                    raise Cancelled
                if time.monotonic() > ends:
                    raise TimeoutError(_not_connected(self.address, workers, self._connected, timeout))
                for key, _ in self._selector.select(_POLL_SECONDS):
                    if key.fileobj is self._socket:
                        self._accept()
                    elif (one := self._unproven.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                        self._read(one, token, workers)
                self._drop_unproven(since=time.monotonic() - _UNPROVEN_SECONDS)
            connected, self._connected = self._connected, {}
        finally:
            self.close()
        return connected

    def close(self) -> None:
        """Close the listener and the connections that ``accept_all`` has not returned."""
        self._socket.close()
        self._selector.close()
        for connection in (*self._unproven, *self._connected.values()):
            connection.close()
        self._unproven, self._connected = {}, {}

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in _OUT_OF_RESOURCES and not self._drop_unproven(most=len(self._unproven) - 1):
                time.sleep(_POLL_SECONDS)
            return
        connection.setblocking(False)
        one = self._unproven[connection] = _Unproven(connection)
        self._selector.register(connection, selectors.EVENT_READ)
        try:
            connection.sendall(one.challenge)
        except OSError:
            self._drop(one)

    def _read(self, one: _Unproven, token: str, workers: Mapping[int, str]) -> None:
        try:
            rank = one.read(token, workers)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self._drop(one)
            return
        if rank is not None:
            self._forget(one)
            one.connection.setblocking(True)
            if rank in self._connected:  # the worker tried again
                self._connected[rank].close()
            self._connected[rank] = one.connection

    def _drop_unproven(self, *, most: int = _MOST_UNPROVEN, since: float = 0.0) -> bool:
        """Close the oldest unproven connections: all beyond ``most``, and all older than ``since``."""
        dropped = False
        while self._unproven:
            oldest = next(iter(self._unproven.values()))
            if len(self._unproven) <= max(most, 0) and oldest.since >= since:
                break
            self._drop(oldest)
            dropped = True
        return dropped

    def _drop(self, one: _Unproven) -> None:
        self._forget(one)
        one.connection.close()

    def _forget(self, one: _Unproven) -> None:
        del self._unproven[one.connection]
        self._selector.unregister(one.connection)


def _not_connected(
    address: str, workers: Mapping[int, str], connected: Mapping[int, socket.socket], timeout: float
) -> str:
    absent = [name for rank, name in workers.items() if rank not in connected]
    more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
    return (
        f"{len(absent)} of {len(workers)} workers did not connect to {address} within {max(timeout, 0.0):.1f} s "
        f"({', '.join(absent[:3])}{more}): can they reach that address?"
    )


def connect(
    address: str, token: str, rank: int, timeout: float, cancelled: Callable[[], bool], who: str = "the trainer"
) -> socket.socket:
    """Connect a worker to the ``Listener`` of ``who`` at ``address``.

    Raises:
        Cancelled: ``cancelled()`` became true.
        TimeoutError: it took longer than ``timeout`` seconds.
        RuntimeError: there is no such trainer.
    """
    host, _, port = address.rpartition(":")
    ends = time.monotonic() + timeout
    while True:
        try:
            connection = socket.socket(_family(host))
        except OSError as error:
            raise RuntimeError(f"this worker cannot connect to {who} at {address}: {_cause(error)}") from None
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(connection.close)
            connection.setblocking(False)
            waiting = _Waiting(connection, f"{who} at {address}", ends, timeout, cancelled)
            result = connection.connect_ex((host, int(port)))
            if result == errno.EINPROGRESS:
                waiting.until(select.POLLOUT)
                result = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if result:
                raise RuntimeError(f"{who} cannot be reached at {address}: {os.strerror(result)}")
            try:
                challenge, own = waiting.receive(_CHALLENGE_BYTES), os.urandom(_CHALLENGE_BYTES)
                connection.sendall(_HELLO.pack(rank, own, _proof(token, b"worker", challenge + own, rank)))
                proof = waiting.receive(_PROOF_BYTES)
            except ConnectionError:
                # The trainer makes room when strangers fill its list. If it is gone, the next try says so.
                waiting.check()
                time.sleep(_POLL_SECONDS)
                continue
            if not hmac.compare_digest(proof, _proof(token, b"trainer", challenge + own, rank)):
                raise RuntimeError(f"what answers at {address} is not {who} of this update")
            connection.setblocking(True)
            on_failure.pop_all()
            return connection


class _Waiting:
    """Waits of one connection attempt."""

    def __init__(
        self, connection: socket.socket, whom: str, ends: float, timeout: float, cancelled: Callable[[], bool]
    ) -> None:
        self._connection, self._whom = connection, whom
        self._ends, self._timeout, self._cancelled = ends, timeout, cancelled
        self._poll = select.poll()

    def until(self, event: int) -> None:
        """Wait for ``event`` (of ``select.poll``) or an error."""
        self._poll.register(self._connection, event)
        while not self._poll.poll(_POLL_SECONDS * 1000):
            self.check()

    def check(self) -> None:
        """Raise if the attempt is cancelled or its time is over."""
        if self._cancelled():
            raise Cancelled
        if time.monotonic() > self._ends:
            raise TimeoutError(f"{self._whom} did not answer within {self._timeout:.1f} s")

    def receive(self, count: int) -> bytes:
        """Receive exactly ``count`` bytes."""
        received = b""
        while len(received) < count:
            self.until(select.POLLIN)
            data = self._connection.recv(count - len(received))
            if not data:
                raise ConnectionResetError
            received += data
        return received
