"""What it takes to start a vLLM server on one or more nodes and to watch it, on Ray and without."""

from __future__ import annotations

import contextlib
import http.client
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class HeldPorts:
    """Free TCP ports of an own address, kept for a server that is yet to start.

    Bound, but never listening, they are nobody else's: the kernel gives them to no other, and the server, which binds with
    SO_REUSEADDR as servers do, gets in.
    """

    def __init__(self, host: str, count: int) -> None:
        self._holders = [self._hold(host) for _ in range(count)]
        self.numbers = tuple(int(holder.getsockname()[1]) for holder in self._holders)

    @staticmethod
    def _hold(host: str) -> socket.socket:
        holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
        return holder


def data_parallel_arguments(engines: Sequence[int], node: int, address: str, rpc_port: int | str) -> list[str]:
    """Arguments of ``vllm serve`` on ``node`` of a data-parallel group with so many ``engines`` on each; the head is node 0."""
    if sum(engines) == 1:
        return []
    found = ["--data-parallel-size", str(sum(engines)), "--data-parallel-size-local", str(engines[node])]
    found += ["--data-parallel-address", address, "--data-parallel-rpc-port", str(rpc_port)]
    return found + (["--headless", "--data-parallel-start-rank", str(sum(engines[:node]))] if node else [])


def answers(host: str, port: int, path: str) -> bool:
    """Whether the server says 200 to this request."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    return False


def interface_of(address: str) -> str:
    """The network interface that has ``address``; empty where none has."""
    import psutil

    return next((name for name, has in psutil.net_if_addrs().items() if address in {one.address for one in has}), "")
