"""``NodeLauncher``: the actor that runs one server's process tree in its bundle, and ends with it."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from ..errors import LaunchError
from ..process import lifeline
from ..process.serving import HeldPorts, answers, interface_of
from ..process.supervised import Supervised
from ..protocol import security

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# All is over within 15 s of the owner's end, of which it takes 6 to notice that a machine was cut off.
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class NodeFacts:
    """Where a launcher is; ``ports`` are kept free for its server."""

    address: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class NodeState:
    """How a node is: its actor's ``pid``, its stage; once nothing is left of its server, its ``exit_code`` and the cause."""

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
        self._log, self._keep_log = folder / f"{name}.log", bool(log_dir)
        self._ports: HeldPorts | None = None
        self._process: Supervised | None = None
        self._lifeline: asyncio.Task[None] | None = None

    async def live_with(self, owner: lifeline.LifelineAddress) -> None:
        """From now on, end the server when the owner is no more, even where Ray has not noticed."""
        if self._lifeline is None:
            self._lifeline = await lifeline.connect(owner, self.name, self._close)

    async def reserve(self, ports: int, path: str = "") -> NodeFacts:
        """Keep this many ports for the server. ``LaunchError`` where the node lacks ``path``."""
        if path and not os.path.exists(path):  # noqa: ASYNC240, PTH110 - one look
            raise LaunchError(f"node {self.address} has no {path}: copy it there, or use a shared folder")
        self._ports = self._ports or HeldPorts(self.address, ports)
        return NodeFacts(self.address, self._ports.numbers)

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
        if interface := interface_of(self.address):
            own["GLOO_SOCKET_IFNAME"] = interface
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # Ray's, for actors without GPUs; the Ray executor's have some
            del os.environ["CUDA_VISIBLE_DEVICES"]
        await self.start(command, {**own, **env}, key)

    async def poll(self, health: str = "") -> NodeState:
        """How it is. ``health``: a path that the server, on the first port, is asked for."""
        if self._process is None:
            return NodeState(self.name, self.address, os.getpid(), "waiting for the other nodes")
        doing, cause, healthy = self._process.doing(), "", False
        if (code := self._process.poll()) is not None:
            doing, cause = f"ended with exit code {code}", self._process.cause()
        elif health and self._ports:
            healthy = await asyncio.to_thread(answers, self.address, self._ports.numbers[0], health)
        lines = self._process.last_lines()
        return NodeState(self.name, self.address, os.getpid(), doing, code, healthy, str(self._log), lines, cause)

    async def stop(self) -> None:
        """End the server; returns when nothing is left of it, nor of its log, unless that was given a place."""
        if self._process:
            asked = self._process.poll() is None
            await asyncio.to_thread(self._process.end)
            if asked and not self._keep_log:
                self._log.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._process:
            self._process.close()

    def __ray_shutdown__(self) -> None:
        """Ray ends this actor in order. (Where it does not, the server's supervisor notices.)"""
        if self._process:
            self._process.end()
