"""A vLLM deployment of one or more nodes, each a ``vllm serve`` process tree; no process outlives it.

    with Deployment(model_dir, [Node(), Node()], log_dir=logs) as deployment:  # a head and a headless node
        deployment.wait(timeout=300)
        ... deployment.url, deployment.directory ...

Every node runs under a supervisor of its own (``process/supervised.py``). The supervisor ends the node's process tree
when this process asks for it, and when this process has ended, even by SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ArealError
from ..process.leftovers import SCRATCH_PREFIX
from ..process.serving import data_parallel_arguments, responds_ok
from ..process.supervised import Supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

WORKER_EXTENSION = "areal_vllm_ext.worker.WorkerExtension"

# Plain sockets, because importing urllib takes 0.25 s of the cores that the engines need for their start.
ASK_HEALTH = """
import socket, sys
with socket.create_connection(sys.argv[1:], 5) as s:
    s.sendall(b"GET /health HTTP/1.0\\r\\n\\r\\n")
    sys.exit(b" 200 " not in s.recv(64))
"""


class DeploymentError(ArealError):
    """The deployment did not come up, or a node has ended; the message ends with the last lines of the logs."""


@dataclass(frozen=True)
class Node:
    """One node of a deployment: a machine, a network namespace, or a process on this machine.

    Attributes:
        address: of this node; the other nodes reach it there.
        prefix: stands before the command, for example ``["ip", "netns", "exec", "areal-a"]``.
        env: environment variables of this node only.
        vllm_args: arguments of ``vllm serve`` on this node only.
        engines: number of engines (DP ranks) on this node.
    """

    address: str = "127.0.0.1"
    prefix: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    vllm_args: Sequence[str] = ()
    engines: int = 1


@dataclass
class NodeProcess:
    """The ``vllm serve`` of one node.

    Attributes:
        name: ``head``, ``headless``; with more than one headless node ``headless-1`` and so on.
    """

    name: str
    node: Node
    command: list[str]
    process: Supervised

    @property
    def pid(self) -> int:
        """Process id of ``vllm serve``; its engines are children, which the supervisor ends with it."""
        return self.process.pid

    @property
    def log(self) -> Path:
        """File with the output."""
        return self.process.log

    @property
    def running(self) -> bool:
        """Whether any process of the node is left."""
        return self.process.poll() is None

    def send_signal(self, number: int) -> None:
        """Send a signal to ``vllm serve`` itself."""
        os.kill(self.pid, number)


def own_cores(index: int, nodes: int) -> list[str]:
    """Return a command prefix that gives each of several nodes on this machine cores of its own.

    vLLM's engine and worker wait for each other in busy loops. Without the prefix, on two cores, the two processes of one
    node occupy both cores and the other node stalls for up to seconds. Measured: a pause took 9 ms in the median and
    2,451 ms at most; with the prefix 8 and 11 ms, and requests took two thirds of the time.
    """
    cores = sorted(os.sched_getaffinity(0))
    if gpu_count() or nodes == 1 or not shutil.which("taskset"):
        return []
    own = cores[index::nodes] or [cores[index % len(cores)]]
    return ["taskset", "--cpu-list", ",".join(map(str, own))]


class Deployment:
    """Start the nodes on entering (or ``start()``), and end them on leaving (or ``close()``).

    The first node is the head and serves HTTP, the others are headless. One node with one engine is a plain server.
    """

    def __init__(
        self,
        model_dir: Path | str,
        nodes: Sequence[Node] = (Node(), Node()),
        *,
        log_dir: Path | str,
        vllm_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        worker_extension: str | None = WORKER_EXTENSION,
    ) -> None:
        """Describe the deployment; nothing starts yet.

        Args:
            model_dir: a Hugging Face checkpoint.
            nodes: the head first.
            log_dir: folder for a log file of each node.
            vllm_args: further arguments of ``vllm serve``, on all nodes.
            env: further environment variables, on all nodes.
            worker_extension: None starts vLLM without this package.
        """
        self.model_dir = Path(model_dir)
        self.nodes = tuple(nodes)
        self.engines = sum(node.engines for node in self.nodes)
        self.log_dir = Path(log_dir)
        self.processes: list[NodeProcess] = []
        self._vllm_args = tuple(vllm_args)
        self._env = dict(env or {})
        self._worker_extension = worker_extension
        self._http_port, self._rpc_port, self._directory_port = free_ports(3)

    @property
    def url(self) -> str:
        """Address of the OpenAI API, on the head."""
        return f"http://{self.nodes[0].address}:{self._http_port}"

    @property
    def directory(self) -> str:
        """Address of the directory, for ``EngineGroup.connect``."""
        return f"tcp://{self.nodes[0].address}:{self._directory_port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start all nodes; returns at once."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        try:
            for index in range(len(self.nodes)):
                self.processes.append(self._start_node(index))
        except BaseException:
            self.close()
            raise

    def wait(self, timeout: float = 300.0, report: Callable[[str], None] = print, every: float = 5.0) -> None:
        """Wait until all engines serve.

        Args:
            timeout: seconds until then.
            report: is called with the stage of each node.
            every: seconds between two reports.

        Raises:
            DeploymentError: a node ended, or time is up.
        """
        started = time.monotonic()
        next_report = started + every
        while not self.healthy():
            self.check()
            now = time.monotonic()
            if now - started > timeout:
                raise DeploymentError(f"vLLM does not serve after {timeout:.0f} s: see the logs below\n{self._logs()}")
            if now >= next_report:
                next_report = now + every
                stages = "; ".join(f"{process.name}: {process.process.stage()}" for process in self.processes)
                report(f"{now - started:4.0f} s  {stages}")
            time.sleep(0.5)

    def check(self) -> None:
        """Check that every node runs.

        Raises:
            DeploymentError: a node has ended; the message names it.
        """
        ended = [process.name for process in self.processes if not process.running]
        if ended:
            raise DeploymentError(f"vLLM has ended on {' and '.join(ended)}: see the logs below\n{self._logs()}")

    def healthy(self) -> bool:
        """Return whether the head answers that all engines serve."""
        head = self.nodes[0]
        if head.prefix:  # ask from the head's side, because its address may be unreachable from here
            command = [*head.prefix, sys.executable, "-I", "-S", "-c", ASK_HEALTH, head.address, str(self._http_port)]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0
        return responds_ok(head.address, self._http_port, "/health")

    def close(self) -> None:
        """End every process of every node, with SIGTERM, then SIGKILL. Idempotent, also after an interrupt."""
        for process in self.processes:  # ask all of them first, so that they end at the same time
            process.process.close()
        for process in self.processes:
            process.process.end()

    def _start_node(self, index: int) -> NodeProcess:
        node = self.nodes[index]
        name = "head" if index == 0 else "headless" if len(self.nodes) == 2 else f"headless-{index}"
        log = self.log_dir / f"{name}.log"
        command = [
            *node.prefix,
            *own_cores(index, len(self.nodes)),
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
        ]
        command += self._arguments(index)
        # For vLLM's sockets, which it does not remove when it is killed.
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
        environment = {**self._environment(index), "VLLM_RPC_BASE_PATH": str(scratch)}
        try:
            process = Supervised(command, log=log, env=environment, scratch=scratch)
        except OSError as error:
            raise DeploymentError(f"{command[0]} could not be started: {error}") from None
        return NodeProcess(name, node, command, process)

    def _arguments(self, index: int) -> list[str]:
        node, head = self.nodes[index], self.nodes[0]
        arguments = [str(self.model_dir), "--enforce-eager", "--max-model-len", "2048", "--dtype", "float32"]
        if index == 0:
            arguments += ["--host", head.address, "--port", str(self._http_port)]
        engines = [node.engines for node in self.nodes]
        arguments += data_parallel_arguments(engines, index, head.address, self._rpc_port)
        if self.engines > 1 and index == 0:
            arguments += ["--api-server-count", "1"]  # vLLM would start one for each engine, which costs memory here
        if self._worker_extension:
            arguments += ["--worker-extension-cls", self._worker_extension]
        # A fixed size skips memory profiling, in which engines that start on one GPU disturb each other.
        arguments += ["--kv-cache-memory-bytes", str(1 << 28)]
        if gpu_count():
            arguments += ["--gpu-memory-utilization", "0.3"]
        return [*arguments, *self._vllm_args, *node.vllm_args]

    def _environment(self, index: int) -> dict[str, str]:
        node = self.nodes[index]
        environment = {
            # Defaults; variables of this process take precedence.
            # Without this, each engine would bind itself to cores, and all of them would choose the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
            # Settings of this deployment; they take precedence over this process's.
            "VLLM_HOST_IP": node.address,
            "AREAL_VLLM_DIRECTORY": self.directory,
        }
        if node.address.startswith("127.") and sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        if gpus := gpu_count():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(str(i) for i in range(gpus))
            devices = visible.split(",")
            first = self._engines_before(index)
            own = [devices[rank % len(devices)] for rank in range(first, first + node.engines)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return {**environment, **self._env, **node.env}

    def _engines_before(self, index: int) -> int:
        return sum(node.engines for node in self.nodes[:index])

    def _logs(self) -> str:
        return "\n".join(
            f"--- the end of {process.log} ---\n{process.process.last_lines()}" for process in self.processes
        )


def gpu_count() -> int:
    """Return the number of CUDA devices for engines."""
    import torch  # imported here because it takes seconds, and tests import this module without starting engines

    return torch.cuda.device_count()


def free_ports(count: int) -> list[int]:
    """Return free TCP ports, outside the range from which the kernel takes ports for outgoing connections."""
    ports: set[int] = set()
    while len(ports) < count:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports.add(port)
    return list(ports)
