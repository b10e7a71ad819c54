"""``NodeLauncher``: the actor that runs one server's process tree in its bundle, and ends with it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from .. import lifeline, security
from ..errors import LaunchError
from ..supervised import Supervised

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# All is over within 15 s of the owner's end, of which it takes 6 to notice that a machine was cut off.
GRACE_SECONDS = 5.0
_ERROR = re.compile(r"^(\(.*?\) )?(ERROR .*?\] )?(vllm serve: error|[\w.]*(Error|Exception)): ")


@dataclass(frozen=True)
class NodeFacts:
    """Where a launcher is; ``ports`` are kept free for its server."""

    address: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class NodeState:
    """How a node is.

    Attributes:
        pid: of the actor.
        doing: the stage of its start.
        exit_code: of its server, once nothing is left of it.
        healthy: whether the server answers its health check, if that was asked.
        cause: the line of the log that says why it ended, as far as can be told.
    """

    name: str
    address: str = "?"
    pid: int = 0
    doing: str = "waiting for its bundle"
    exit_code: int | None = None
    healthy: bool = False
    log: str = ""
    last_lines: str = ""
    cause: str = ""


class NodeLauncher:
    """Runs a command on its node. Seconds after the actor has ended, in whatever way, nothing of that is left."""

    def __init__(self, name: str, log_dir: str = "") -> None:
        """``log_dir``: for the server's log; default: ``areal-vllm-logs`` in the temporary folder."""
        self.name, self.address = name, ray.util.get_node_ip_address()
        folder = Path(log_dir or Path(tempfile.gettempdir()) / "areal-vllm-logs")
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{name}.log"
        self._reserved: list[socket.socket] = []
        self._process: Supervised | None = None
        self._lifeline: asyncio.Task[None] | None = None

    async def live_with(self, owner: lifeline.LifelineAddress) -> None:
        """From now on, end the server when the owner is no more, even where Ray has not noticed."""

        async def hold() -> None:
            await lifeline.hold(owner, self.name)
            if self._process:
                self._process.close()

        self._lifeline = self._lifeline or asyncio.create_task(hold())

    async def reserve(self, ports: int, path: str = "") -> NodeFacts:
        """Keep ``ports`` ports for the server. Bound, but never listening, they are nobody else's: the kernel gives them to no
        other, and the server, which binds with SO_REUSEADDR as servers do, gets in.

        Raises:
            LaunchError: the node lacks ``path``.
        """
        if path and not os.path.exists(path):  # noqa: ASYNC240, PTH110 - one look
            raise LaunchError(f"node {self.address} has no {path}: copy it there, or use a shared folder")
        while len(self._reserved) < ports:
            holder = socket.socket(socket.AF_INET6 if ":" in self.address else socket.AF_INET)
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind((self.address, 0))
            self._reserved.append(holder)
        return NodeFacts(self.address, tuple(int(holder.getsockname()[1]) for holder in self._reserved))

    async def start(
        self, command: Sequence[str], env: Mapping[str, str], key: security.ClusterKey | None = None
    ) -> None:
        """Start the server. ``key`` is in a file that only this user can read, while the server runs."""
        scratch = Path(tempfile.mkdtemp(prefix="areal-vllm-"))
        environment = {**os.environ, "VLLM_RPC_BASE_PATH": str(scratch), **env}
        if key:
            environment["AREAL_VLLM_KEY_FILE"] = str(scratch / "cluster.key")
            security.write_key(scratch / "cluster.key", key)
        try:
            self._process = Supervised(command, log=self._log, env=environment, grace=GRACE_SECONDS, scratch=scratch)
        except OSError as error:
            raise LaunchError(f"node {self.address}: {error}") from None

    async def start_vllm(self, command: Sequence[str], env: Mapping[str, str], key: security.ClusterKey) -> None:
        """``start`` for ``vllm serve``, which is told on which address of the node the others reach it."""
        own = {"VLLM_HOST_IP": self.address, "AREAL_VLLM_HOST": self.address}
        if interface := _interface_of(self.address):
            own["GLOO_SOCKET_IFNAME"] = interface
        if not os.environ.get(
            "CUDA_VISIBLE_DEVICES", "all"
        ):  # Ray's for actors without GPUs; the Ray executor's have them
            del os.environ["CUDA_VISIBLE_DEVICES"]
        await self.start(command, {**own, **env}, key)

    async def poll(self, health: str = "") -> NodeState:
        """How it is. ``health``: a path that the server, on the first port, is asked for."""
        if self._process is None:
            return NodeState(self.name, self.address, os.getpid(), "waiting for the other nodes")
        if (code := self._process.poll()) is None:
            doing, cause = self._process.doing(), ""
            healthy = bool(health) and await asyncio.to_thread(self._healthy, health)
        else:
            doing, cause, healthy = f"ended with exit code {code}", _cause(self._process.last_lines(400)), False
        lines = self._process.last_lines()
        return NodeState(self.name, self.address, os.getpid(), doing, code, healthy, str(self._log), lines, cause)

    async def stop(self) -> None:
        """End the server, and wait until nothing is left of it."""
        if self._process:
            await asyncio.to_thread(self._process.end)

    def _healthy(self, path: str) -> bool:
        connection = http.client.HTTPConnection(self.address, self._reserved[0].getsockname()[1], timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            return connection.getresponse().status == http.HTTPStatus.OK
        return False

    def __ray_shutdown__(self) -> None:
        """Ray ends this actor in order. (Where it does not, the server's supervisor notices.)"""
        if self._process:
            self._process.end()


def _interface_of(address: str) -> str:
    """The network interface that has ``address``; empty where none has."""
    import psutil

    return next((name for name, has in psutil.net_if_addrs().items() if address in {one.address for one in has}), "")


def _cause(log: str) -> str:
    """The line that most probably says why: the last that names an error, else the last."""
    lines = [line for line in log.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "")
