"""The actor that runs one server's process tree in its bundle, and ends with it."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from ..errors import LaunchError
from ..process import lifeline
from ..process.leftovers import SCRATCH_PREFIX
from ..process.serving import ReservedPorts, interface_of, responds_ok
from ..process.supervised import Supervised
from ..protocol import security
from .state import NodeAddress, NodeState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Everything must be gone within 15 s of the owner's end, and noticing a machine that was cut off takes 6 s of them.
GRACE_SECONDS = 5.0


class NodeLauncher:
    """Run a command on this actor's node; seconds after the actor's end, however it ends, nothing of it is left."""

    def __init__(self, name: str, log_dir: str = "") -> None:
        """Prepare the log.

        Args:
            name: of the server, and of its log file.
            log_dir: folder of the log; default: ``areal-vllm-logs`` in the temporary folder.
        """
        self.name, self.address = name, ray.util.get_node_ip_address()
        folder = Path(log_dir or Path(tempfile.gettempdir()) / "areal-vllm-logs")
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._keep_log = folder / f"{name}.log", bool(log_dir)
        self._ports: ReservedPorts | None = None
        self._process: Supervised | None = None
        self._lifeline: asyncio.Task[None] | None = None

    async def tie_to_owner(self, owner: lifeline.LifelineAddress) -> None:
        """End the server when the owner has ended, even if Ray does not notice."""
        if self._lifeline is None:
            self._lifeline = await lifeline.connect(owner, self.name, self._close)

    async def reserve(self, ports: int, path: str = "") -> NodeAddress:
        """Reserve this many ports for the server.

        Raises:
            LaunchError: ``path`` does not exist on this node.
        """
        if path and not os.path.exists(path):  # noqa: ASYNC240, PTH110 - one quick look
            raise LaunchError(f"node {self.address}: there is no {path}; copy it there, or use a shared folder")
        self._ports = self._ports or ReservedPorts(self.address, ports)
        return NodeAddress(self.address, self._ports.numbers)

    async def start(
        self, command: Sequence[str], env: Mapping[str, str], key: security.ClusterKey | None = None
    ) -> None:
        """Start the server.

        Args:
            command: what to run, with its arguments.
            env: environment variables, in addition to this actor's.
            key: is written to a file that only this user can read, for as long as the server runs.
        """
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
        environment = {**os.environ, "VLLM_RPC_BASE_PATH": str(scratch), **env}
        if key:
            environment["AREAL_VLLM_KEY_FILE"] = str(scratch / "cluster.key")
            security.write_key(scratch / "cluster.key", key)
        try:
            self._process = Supervised(command, log=self._log, env=environment, grace=GRACE_SECONDS, scratch=scratch)
        except OSError as error:
            raise LaunchError(f"node {self.address}: the server did not start: {error}") from None

    async def start_vllm(self, command: Sequence[str], env: Mapping[str, str], key: security.ClusterKey) -> None:
        """Start ``vllm serve``, with the address at which the other nodes reach this one."""
        own = {"VLLM_HOST_IP": self.address, "AREAL_VLLM_HOST": self.address}
        if interface := interface_of(self.address):
            own["GLOO_SOCKET_IFNAME"] = interface
        # Ray sets this for actors without GPUs, but the workers of vLLM's Ray executor have some.
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            del os.environ["CUDA_VISIBLE_DEVICES"]
        await self.start(command, {**own, **env}, key)

    async def poll(self, health: str = "") -> NodeState:
        """Return the state of the node; ``health`` is a path to request from the server, on its first port."""
        if self._process is None:
            return NodeState(self.name, self.address, os.getpid(), "waiting for the other nodes")
        stage, cause, healthy = self._process.stage(), "", False
        if (code := self._process.poll()) is not None:
            stage, cause = f"ended with exit code {code}", self._process.cause()
        elif health and self._ports:
            healthy = await asyncio.to_thread(responds_ok, self.address, self._ports.numbers[0], health)
        lines = self._process.last_lines()
        return NodeState(self.name, self.address, os.getpid(), stage, code, healthy, str(self._log), lines, cause)

    async def stop(self) -> None:
        """End the server; returns once nothing is left of it, nor of its log unless ``log_dir`` was given."""
        if self._process:
            asked = self._process.poll() is None
            await asyncio.to_thread(self._process.end)
            if asked and not self._keep_log:
                self._log.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._process:
            self._process.close()

    def __ray_shutdown__(self) -> None:
        """End the server, when Ray ends this actor in order. (Otherwise the server's supervisor notices.)"""
        if self._process:
            self._process.end()
