"""TCP broadcast, for tensors in host memory: the trainer sends each bucket to every worker over a connection of its own.

A bucket is its size (8 bytes, little endian) and its bytes. A thread per connection does the blocking calls. To give up, the
connection is shut down, which ends the call at once.

gloo would pass a bucket on from worker to worker, but it ends the process when a size does not match or no descriptor is left,
listens for strangers as long as it lives, and cannot be interrupted. Its rendezvous, torch's TCPStore, resolves names without
a deadline.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

import torch

from ..observability import fault_points
from .base import Cancelled, PeerLost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SIZE = struct.Struct("<Q")
# At most this many bytes go into one call, so that a time-out can say how far the bucket came.
_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.01


class TcpWork:
    """A bucket in flight to or from one or several peers."""

    def __init__(self, buffer: torch.Tensor, peers: Mapping[int, str], give_up: Callable[[], None]) -> None:
        """
        Args:
            buffer: its bytes.
            peers: names by rank.
            give_up: ends all transfers of the connection.
        """
        self.view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        self.progress = dict.fromkeys(peers, 0)
        self._buffer, self._peers, self._give_up = buffer, peers, give_up
        self._unfinished = set(peers)
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def finish(self, rank: int, error: Exception | None = None) -> None:
        """Note that ``rank`` has all bytes, or why it does not get them."""
        with self._changed:
            self._unfinished.discard(rank)
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        ends = time.monotonic() + timeout
        with self._changed:
            while self._unfinished and self._error is None:
                left = ends - time.monotonic()
                if cancelled():
                    self._give_up()
                    raise Cancelled
                if left <= 0:
                    self._give_up()
                    raise TimeoutError(self._late(timeout))
                self._changed.wait(min(left, _POLL_SECONDS))
            if self._error is not None:
                # The other transfers go on until ``cancel``: a peer whose connection ends now would report that as well.
                raise self._error
        return self._buffer

    def _late(self, timeout: float) -> str:
        late = [f"{self._peers[rank]}: {self.progress[rank]}" for rank in sorted(self._unfinished)]
        more = f" and {len(late) - 3} more" if len(late) > 3 else ""
        return f"a bucket of {len(self.view)} bytes was not through after {timeout:.1f} s ({', '.join(late[:3])}{more})"

    def cancel(self) -> None:
        with self._changed:
            unfinished = bool(self._unfinished)
        if unfinished:
            self._give_up()


class _Connection:
    """One connection, whose thread does one transfer after the other until the first that fails."""

    def __init__(self, connection: socket.socket, rank: int, name: str) -> None:
        self._connection, self._rank, self._name = connection, rank, name
        self._queue: queue.SimpleQueue[TcpWork | None] = queue.SimpleQueue()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._run, name=f"areal-tcp-{rank}", daemon=True).start()

    def put(self, work: TcpWork) -> None:
        self._queue.put(work)

    def shut_down(self) -> None:
        """End the transfers."""
        with contextlib.suppress(OSError):  # the other end was faster
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.shut_down()
        self._queue.put(None)

    def _run(self) -> None:
        error: Exception | None = None
        with self._connection:
            while (work := self._queue.get()) is not None:
                if error is None:
                    try:
                        self._transfer(work)
                    except (OSError, RuntimeError) as failed:
                        broke = f"the connection broke ({failed}): see the log of that process"
                        error = PeerLost(f"{self._name}: {broke if isinstance(failed, OSError) else failed}")
                        # Only a close resets the other end, which may wait for room to send.
                        self._connection.close()
                work.finish(self._rank, error)
                del work  # its buffer

    def _transfer(self, work: TcpWork) -> None:
        raise NotImplementedError


class _Outgoing(_Connection):
    def _transfer(self, work: TcpWork) -> None:
        self._connection.sendall(_SIZE.pack(len(work.view)))
        for start in range(0, len(work.view), _CHUNK_BYTES):
            self._connection.sendall(work.view[start : start + _CHUNK_BYTES])
            work.progress[self._rank] = min(start + _CHUNK_BYTES, len(work.view))


class _Incoming(_Connection):
    def _transfer(self, work: TcpWork) -> None:
        header = bytearray(_SIZE.size)
        self._receive(memoryview(header))
        (size,) = _SIZE.unpack(header)
        if size != len(work.view):
            raise RuntimeError(f"a bucket of {size} bytes came instead of {len(work.view)}")
        for start in range(0, size, _CHUNK_BYTES):
            self._receive(work.view[start : start + _CHUNK_BYTES])
            work.progress[self._rank] = min(start + _CHUNK_BYTES, size)

    def _receive(self, view: memoryview) -> None:
        while view:
            count = self._connection.recv_into(view, fault_points.reach("read", len(view)))
            if not count:
                raise RuntimeError("the connection was closed")
            view = view[count:]


class TcpBroadcast:
    """One end of the broadcast: the trainer's, with a connection to each worker, or a worker's."""

    device = torch.device("cpu")

    def __init__(self, connections: Mapping[int, _Connection], names: Mapping[int, str]) -> None:
        self._connections, self._names = connections, names

    @classmethod
    def to_workers(cls, sockets: Mapping[int, socket.socket], names: Mapping[int, str]) -> TcpBroadcast:
        """Return the trainer's end.

        Args:
            sockets: connections to the workers, by rank.
            names: the workers' names, by rank.
        """
        return cls({rank: _Outgoing(one, rank, names[rank]) for rank, one in sockets.items()}, names)

    @classmethod
    def from_trainer(cls, connection: socket.socket) -> TcpBroadcast:
        """Return a worker's end."""
        return cls({0: _Incoming(connection, 0, "the trainer")}, {0: "from the trainer"})

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> TcpWork:
        work = TcpWork(buffer, self._names, self._shut_down)
        for connection in self._connections.values():
            connection.put(work)
        return work

    def _shut_down(self) -> None:
        for connection in self._connections.values():
            connection.shut_down()

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
