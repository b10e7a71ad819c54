"""A real Ray cluster of two nodes on one machine: a network namespace for each, with devices that are CPUs."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from areal_vllm_ext.supervised import Supervised

from .network import Namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator

_PORT = 6379


class RayCluster:
    """Nodes ``a`` (Ray's head) and ``b``. Processes are ended by their ids, never with ``ray stop``."""

    def __init__(self, namespaces: Namespaces, devices: int, resource: str) -> None:
        self.namespaces = namespaces
        self.address = f"{namespaces.addresses['a']}:{_PORT}"
        # Whoever has used Ray before may have a token, which only some of these processes would find.
        os.environ["RAY_AUTH_MODE"] = "disabled"
        self.processes: dict[str, Supervised] = {}
        self._devices, self._resource = devices, resource
        # Short: Ray's sockets are in it, and their paths may have 107 characters.
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
        prefix, log = self.namespaces.prefix(node), self.folder / f"{node}.log"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.processes[node] = Supervised([*prefix, *command], log=log, env=env, grace=3.0)

    def connect(self) -> None:
        """Make this process a driver."""
        ends = time.monotonic() + 60
        while True:
            try:
                ray.init(self.address, log_to_driver=False, logging_level="ERROR", _temp_dir=str(self.folder))
                break
            except ConnectionError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.5)
        self.wait_nodes(2)

    def wait_nodes(self, count: int) -> None:
        """Wait until ``count`` nodes are members."""
        ends = time.monotonic() + 60
        while sum(node["Alive"] for node in ray.nodes()) != count:
            if time.monotonic() > ends:
                logs = "\n".join(process.last_lines() for process in self.processes.values())
                raise TimeoutError(f"the Ray cluster has not {count} nodes\n{logs}")
            time.sleep(0.2)

    def raylet(self, node: str) -> int:
        """The process id of the raylet on ``node``."""
        address = f"--node_ip_address={self.namespaces.addresses[node]}"
        for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                arguments = cmdline.read_bytes().decode().split("\0")
                if arguments[0].endswith("/raylet") and address in arguments and str(self.folder) in str(arguments):
                    return int(cmdline.parent.name)
        raise LookupError(f"no raylet on {node}")

    def end(self) -> None:
        """End what was started here."""
        if ray.is_initialized():
            ray.shutdown()
        for process in self.processes.values():
            process.close()
        for process in self.processes.values():
            process.end()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(devices: int = 1, resource: str = "CPU", **driver: Any) -> Iterator[RayCluster]:
    """Both nodes, each with ``devices`` of ``resource``; the calling thread is a driver on node ``a`` meanwhile."""
    namespaces = Namespaces()
    with contextlib.ExitStack() as stack:
        stack.callback(namespaces.remove)
        namespaces.make()
        stack.enter_context(namespaces.inside("a"))
        cluster = RayCluster(namespaces, devices, resource)
        stack.callback(cluster.end)
        cluster.start("a")
        cluster.start("b")
        if driver.get("connect", True):
            cluster.connect()
        yield cluster
