"""Ports, arguments and health of a ``vllm serve``, for the launcher and the demo."""

from __future__ import annotations

import contextlib
import http.client
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class ReservedPorts:
    """Free TCP ports of one of this node's addresses, reserved for a server that starts later.

    The sockets are bound but do not listen. So the kernel gives the ports to no other process, but the server can bind
    them too, because servers set SO_REUSEADDR.
    """

    def __init__(self, host: str, count: int) -> None:
        self._sockets = [self._reserve(host) for _ in range(count)]
        self.numbers = tuple(int(one.getsockname()[1]) for one in self._sockets)

    @staticmethod
    def _reserve(host: str) -> socket.socket:
        reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind((host, 0))
        return reserved


def data_parallel_arguments(engines: Sequence[int], node: int, address: str, rpc_port: int | str) -> list[str]:
    """Return the arguments of ``vllm serve`` that place ``node`` in a data-parallel group.

    Args:
        engines: number of engines on each node; the head is node 0.
        node: index of the node.
        address: of the head.
        rpc_port: of the head.
    """
    if sum(engines) == 1:
        return []
    found = ["--data-parallel-size", str(sum(engines)), "--data-parallel-size-local", str(engines[node])]
    found += ["--data-parallel-address", address, "--data-parallel-rpc-port", str(rpc_port)]
    return found + (["--headless", "--data-parallel-start-rank", str(sum(engines[:node]))] if node else [])


def responds_ok(host: str, port: int, path: str) -> bool:
    """Return whether the HTTP server answers 200 to ``GET path`` within 5 seconds."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status == http.HTTPStatus.OK
    return False


def interface_of(address: str) -> str:
    """Return the name of the network interface that has ``address``, or an empty string."""
    import psutil

    return next((name for name, has in psutil.net_if_addrs().items() if address in {one.address for one in has}), "")
