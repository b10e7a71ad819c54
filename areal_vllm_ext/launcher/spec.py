"""What is to be launched, checked before anything starts, and the command line of each node."""

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

    from .node import NodeFacts

# What follows from the placement and the sizes, and would only contradict them.
_DERIVED = re.compile(
    r"--(host|port|headless|nnodes|node-rank|master-|(data|tensor|pipeline)-parallel-|worker-extension-cls"
    r"|distributed-executor-backend)|-[tpd]p"
)


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One vLLM deployment.

    Attributes:
        model: a name on the Hub, or a path that every node has.
        vllm_args: further arguments of ``vllm serve``, on all nodes; ``head_args``: on the head only.
        env: environment variables of all nodes.
        restart: when a node has died, the others are ended (``never``), or all start again (``replica``), ``max_restarts``
            times at most; ``node`` is the same for a replica of one node: vLLM takes no lost node back.
        timeout: seconds until all engines serve.
        worker_extension: None leaves vLLM alone: there is no ``group`` then. ``command``: what starts vLLM.
        log_dir: on each node; default: ``areal-vllm-logs`` in its temporary folder. ``name``: made up, unless it is given.
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
        """How many launchers: colocated vLLM has one, and its workers are Ray's actors."""
        return 1 if self.placement.kind == "colocated" else self.placement.bundles

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            SettingsError: in one line.
        """
        place, engine = self.placement, self.tensor_parallel_size * self.pipeline_parallel_size
        wanted = self.data_parallel_size * engine
        if place.kind == "shared":
            raise SettingsError("placement 'shared' is for trainer ranks; a replica is separate, deferred or colocated")
        if wanted < 1 or place.bundles * place.devices != wanted:
            raise SettingsError(
                f"DP {self.data_parallel_size} x TP {self.tensor_parallel_size} x PP {self.pipeline_parallel_size} are "
                f"{wanted} devices, and the placement has {place.bundles} x {place.devices}"
            )
        if self.nodes > 1 and place.devices % engine and engine % place.devices:
            raise SettingsError(f"engines of {engine} devices and nodes of {place.devices} do not divide")
        if place.kind == "colocated" and self.data_parallel_size > 1:
            raise SettingsError("a colocated replica has one engine: launch one for each, the others with join=")
        if self.restart == "node" and self.nodes > 1:
            raise SettingsError(
                "restart 'node' needs a replica of one node (vLLM takes no lost node back): use 'replica'"
            )
        for argument in (*self.vllm_args, *self.head_args):
            if _DERIVED.match(argument.replace("_", "-")):
                raise SettingsError(f"leave {argument} out: it follows from the placement and the parallel sizes")

    def command_line(self, index: int, facts: Sequence[NodeFacts]) -> list[str]:
        """What runs on node ``index``; ``facts`` of all nodes, the head's first."""
        head, engine = facts[0], self.tensor_parallel_size * self.pipeline_parallel_size
        http_port, rpc_port, master_port = map(str, head.ports)
        found = [*self.command, self.model]
        for flag, size in (("--tensor", self.tensor_parallel_size), ("--pipeline", self.pipeline_parallel_size)):
            found += [f"{flag}-parallel-size", str(size)] if size > 1 else []
        if self.nodes > 1 and engine > self.placement.devices:  # it spans nodes; vLLM tells its ranks from the node's
            found += ["--nnodes", str(self.nodes), "--node-rank", str(index), *(["--headless"] if index else [])]
            found += ["--master-addr", head.address, "--master-port", master_port]
            if self.data_parallel_size > 1:
                found += ["--data-parallel-size", str(self.data_parallel_size), "--data-parallel-rpc-port", rpc_port]
        else:
            engines = [self.data_parallel_size // self.nodes] * self.nodes
            found += data_parallel_arguments(engines, index, head.address, rpc_port)
        found += ["--distributed-executor-backend", "ray"] if self.placement.kind == "colocated" else []
        found += [] if index else ["--host", head.address, "--port", http_port]
        found += ["--worker-extension-cls", self.worker_extension] if self.worker_extension else []
        return [*found, *self.vllm_args, *(() if index else self.head_args)]
