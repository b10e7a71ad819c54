"""Settings of a replica, checked before anything starts, and the command line of each node."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Literal

import msgspec

from ..errors import SettingsError
from ..process.serving import data_parallel_arguments
from .placement import Placement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .state import NodeAddress

# Arguments that follow from the placement and the sizes; given again, they could only contradict them.
_DERIVED = re.compile(
    r"--(host|port|headless|nnodes|node-rank|master-|(data|tensor|pipeline)-parallel-|worker-extension-cls"
    r"|distributed-executor-backend)|-[tpd]p"
)

_MAX_TIMEOUT_SECONDS = 31_536_000  # a year; the event loop takes no infinite timeout


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One vLLM deployment.

    Attributes:
        model: a name on the Hugging Face Hub, or a path that every node has.
        placement: where the replica runs.
        data_parallel_size: number of engines.
        vllm_args: further arguments of ``vllm serve``, on all nodes.
        head_args: further arguments of ``vllm serve``, on the head only.
        env: environment variables of ``vllm serve``, on all nodes.
        restart: what happens when a node has died. ``never``: the other nodes end. ``replica``: all nodes restart. ``node``:
            the same, for a replica of one node, because vLLM takes no lost node back into a data-parallel group.
        max_restarts: upper bound on restarts.
        timeout: seconds until all engines serve.
        worker_extension: None leaves vLLM unchanged; ``Replica.group`` is of no use then.
        command: starts vLLM; the arguments follow.
        log_dir: folder of the logs on each node; default: ``areal-vllm-logs`` in the temporary folder.
        name: of the replica; default: a random one.
    """

    model: str
    placement: Placement = Placement()
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    vllm_args: tuple[str, ...] = ()
    head_args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    restart: Literal["never", "node", "replica"] = "never"
    max_restarts: int = 3
    timeout: float = 600.0
    worker_extension: str | None = "areal_vllm_ext.worker.WorkerExtension"
    command: tuple[str, ...] = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
    log_dir: str = ""
    name: str = ""

    @property
    def nodes(self) -> int:
        """Number of node launchers: one for a colocated replica, because vLLM starts its workers as Ray actors."""
        return 1 if self.placement.kind == "colocated" else self.placement.bundles

    def check(self) -> None:
        """Check that the settings fit together.

        Raises:
            SettingsError: they do not; the message is one line.
        """
        self._check_values()
        self.placement.check()
        place, engine = self.placement, self.tensor_parallel_size * self.pipeline_parallel_size
        wanted = self.data_parallel_size * engine
        if place.kind == "shared":
            raise SettingsError(
                "placement 'shared' is for trainer ranks; for a replica use separate, deferred or colocated"
            )
        if wanted < 1 or place.bundles * place.devices != wanted:
            raise SettingsError(
                f"placement: DP {self.data_parallel_size} x TP {self.tensor_parallel_size} x PP {self.pipeline_parallel_size} "
                f"are {wanted} devices, but it has {place.bundles} x {place.devices}; make them equal"
            )
        if self.nodes > 1 and place.devices % engine and engine % place.devices:
            raise SettingsError(
                f"placement: neither of {engine} devices per engine and {place.devices} per node divides the other; change one"
            )
        if place.kind == "colocated" and self.data_parallel_size > 1:
            raise SettingsError(
                "placement: a colocated replica has one engine; launch one replica for each engine, "
                "with join= from the second on"
            )
        if self.restart == "node" and self.nodes > 1:
            raise SettingsError(
                "restart 'node': this replica has several nodes, and vLLM takes no lost node back; use 'replica'"
            )
        for argument in (*self.vllm_args, *self.head_args):
            if _DERIVED.match(argument.replace("_", "-")):
                raise SettingsError(
                    f"vLLM argument {argument}: it follows from the placement and the parallel sizes; leave it out"
                )

    def _check_values(self) -> None:
        if not 0 < self.timeout <= _MAX_TIMEOUT_SECONDS:
            raise SettingsError(f"timeout: {self.timeout!r} is not a number of seconds above 0; write for example 600")
        if self.max_restarts < 0:
            raise SettingsError(f"max_restarts: {self.max_restarts} is negative; write 0 for none")
        if not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9._-]{,99})?", self.name):
            raise SettingsError(f"name: {self.name!r} names log files; use up to 100 letters, digits, '.', '_' and '-'")
        texts = {
            "model": [self.model],
            "command": self.command,
            "vllm_args": self.vllm_args,
            "head_args": self.head_args,
        }
        texts |= {"env": [*self.env, *self.env.values()], "log_dir": [self.log_dir]}
        for setting, values in texts.items():
            if any("\0" in value for value in values):
                raise SettingsError(f"{setting}: it has a null character, which no program can take; remove it")
        if bad := [variable for variable in self.env if not variable or "=" in variable]:
            raise SettingsError(f"env: {bad[0]!r} cannot be the name of a variable; write NAME: value")
        if not self.model or not self.command:
            raise SettingsError("model and command: neither can be empty; name a model, and leave the command out")

    def command_line(self, index: int, nodes: Sequence[NodeAddress]) -> list[str]:
        """Return the command of node ``index``; ``nodes`` has the addresses of all nodes, the head first."""
        head, engine = nodes[0], self.tensor_parallel_size * self.pipeline_parallel_size
        http_port, rpc_port, master_port = map(str, head.ports)
        found = [*self.command, self.model]
        for flag, size in (("--tensor", self.tensor_parallel_size), ("--pipeline", self.pipeline_parallel_size)):
            found += [f"{flag}-parallel-size", str(size)] if size > 1 else []
        if (
            self.nodes > 1 and engine > self.placement.devices
        ):  # one engine spans nodes: vLLM derives its ranks from --node-rank
            found += ["--nnodes", str(self.nodes), "--node-rank", str(index), *(["--headless"] if index else [])]
            found += ["--master-addr", head.host, "--master-port", master_port]
            if self.data_parallel_size > 1:
                found += ["--data-parallel-size", str(self.data_parallel_size), "--data-parallel-rpc-port", rpc_port]
        else:
            engines = [self.data_parallel_size // self.nodes] * self.nodes
            found += data_parallel_arguments(engines, index, head.host, rpc_port)
        found += ["--distributed-executor-backend", "ray"] if self.placement.kind == "colocated" else []
        found += [] if index else ["--host", head.host, "--port", http_port]
        found += ["--worker-extension-cls", self.worker_extension] if self.worker_extension else []
        return [*found, *self.vllm_args, *(() if index else self.head_args)]
