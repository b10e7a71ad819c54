"""A real Ray cluster of two nodes on one machine: each node is a network namespace, and its devices are CPUs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from areal_vllm_ext.demo.deployment import own_cores

from .network import Namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator

_PORT = 6379
_COUNT_NODES = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
"""


class RayCluster:
    """Nodes ``a`` (Ray's head) and ``b``. Processes are ended by id, because ``ray stop`` ends those of others too."""

    def __init__(self, namespaces: Namespaces, devices: int, resource: str) -> None:
        self.namespaces = namespaces
        self.address = f"{namespaces.addresses['a']}:{_PORT}"
        # A user of Ray may have a token, which only some of these processes would find.
        os.environ["RAY_AUTH_MODE"] = "disabled"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._devices, self._resource = devices, resource
        # The path is short because it is part of the paths of Ray's sockets, which may have at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ar-"))

    def start(self, node: str) -> None:
        """Start Ray on ``node``, and wait until it is a member."""
        where = [f"--address={self.address}"]
        if node == "a":
            where = ["--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}"]
        amount = [f"--num-{self._resource.lower()}s={self._devices}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where, *amount]
        if self._resource != "CPU":
            command.append("--num-cpus=2")
        command += [f"--node-ip-address={self.namespaces.addresses[node]}", "--object-store-memory=100000000"]
        command.append("--disable-usage-stats")
        prefix = [*self.namespaces.prefix(node), *own_cores("ab".index(node), 2)]
        log = self.folder / f"{node}.log"
        # Without this, gloo would take the address of the host name.
        env = {**os.environ, "GLOO_SOCKET_IFNAME": self.namespaces.links[node]}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        # No supervisor: it would adopt and end what a launcher leaves behind, which a real cluster does not do.
        with log.open("w") as output:
            self.processes[node] = subprocess.Popen(
                [*prefix, *command], stdout=output, stderr=output, env=env, start_new_session=True
            )

    def restart(self, node: str) -> None:
        """End what is left of Ray on ``node`` and start Ray again."""
        self._end(self.processes.pop(node))
        self.start(node)

    def wait(self) -> None:
        """Wait until both nodes are members; a new process asks each time, because no driver outlives Ray's head."""
        ends = time.monotonic() + 90
        command = [*self.namespaces.prefix("a"), sys.executable, "-c", _COUNT_NODES, self.address]
        while self._said(command) != str(len(self.processes)):
            if time.monotonic() > ends:
                logs = "\n".join((self.folder / f"{node}.log").read_text()[-2000:] for node in self.processes)
                raise TimeoutError(f"the Ray cluster has not its two nodes\n{logs}")
            for node, process in list(self.processes.items()):
                if process.poll() is not None:  # this node started before the head was up
                    self.start(node)
            time.sleep(0.5)

    @staticmethod
    def _said(command: list[str]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
        return ""

    def raylet(self, node: str) -> int:
        """Return the process id of the raylet on ``node``."""
        address = f"--node_ip_address={self.namespaces.addresses[node]}"
        for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                arguments = cmdline.read_bytes().decode().split("\0")
                if arguments[0].endswith("/raylet") and address in arguments and str(self.folder) in str(arguments):
                    return int(cmdline.parent.name)
        raise LookupError(f"no raylet on {node}")

    def end(self) -> None:
        """End all processes of this cluster."""
        if ray.is_initialized():
            ray.shutdown()
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            self._end(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        """End ``ray start --block``, which ends its children on SIGTERM."""
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def ray_cluster(
    devices: int = 1, resource: str = "CPU", *, nodes: str = "ab", connect: bool = True
) -> Iterator[RayCluster]:
    """Run both nodes, each with ``devices`` of ``resource``; inside this context the caller is a driver on node ``a``."""
    namespaces = Namespaces()
    with contextlib.ExitStack() as stack:
        stack.callback(namespaces.remove)
        namespaces.make()
        cluster = RayCluster(namespaces, devices, resource)
        stack.callback(cluster.end)
        for node in nodes:
            cluster.start(node)
        cluster.wait()
        if connect:
            stack.enter_context(namespaces.inside("a"))
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
