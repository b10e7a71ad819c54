"""What is to be launched, checked before anything starts, and the command line of each node."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SettingsError
from .placement import Placement

if TYPE_CHECKING:
    import os

    from .node import NodeFacts

VLLM_SERVE = (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")
WORKER_EXTENSION = "areal_vllm_ext.worker.WorkerExtension"
# What follows from the placement, so would only contradict it.
_DERIVED = (
    *("--host", "--port", "--headless", "--nnodes", "--node-rank", "--master-addr", "--master-port"),
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--worker-extension-cls", "--distributed-executor-backend"),
    *("--data-parallel-size", "--data-parallel-size-local", "--data-parallel-rank", "--data-parallel-start-rank"),
    *("--data-parallel-address", "--data-parallel-rpc-port", "--data-parallel-backend"),
    *("-tp", "-pp", "-dp", "-n", "-r"),
)


@dataclass(frozen=True)
class ReplicaSpec:
    """One vLLM deployment.

    Attributes:
        model: a name on the Hub, or a path that every node has.
        placement: where its nodes go.
        vllm_args: further arguments of ``vllm serve``, on all nodes; ``head_args``: on the head only.
        env: environment variables of all nodes; they come before what the launcher sets.
        restart: what happens when a node has died. ``never``: the others are ended. ``node``: it starts again in its bundle
            (a replica of one node: vLLM does not take a lost node back). ``replica``: all nodes start again.
        max_restarts: so often at most.
        timeout: seconds until all engines serve.
        worker_extension: None leaves vLLM alone: no ``group``.
        command: what starts vLLM (``vllm serve`` of this Python); arguments follow it.
        log_dir: on each node; default: ``areal-vllm-logs`` in its temporary folder.
        name: of the replica, which its engines carry; default: made up.
    """

    model: str
    placement: Placement
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    vllm_args: Sequence[str] = ()
    head_args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    restart: Literal["never", "node", "replica"] = "never"
    max_restarts: int = 3
    timeout: float = 600.0
    worker_extension: str | None = WORKER_EXTENSION
    command: Sequence[str] = VLLM_SERVE
    log_dir: str = ""
    name: str = ""

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> ReplicaSpec:
        """Read a file of these settings (``docs/placement.md``); ``placement`` has ``strategy``'s constructor as ``kind``.

        Raises:
            SettingsError: for a name that there is not, or a value that cannot be.
        """
        import yaml

        with open(path) as file:  # noqa: PTH123
            values = yaml.safe_load(file)
        if not isinstance(values, dict):
            raise SettingsError(f"{path} has no settings; docs/placement.md has examples")
        return cls.from_dict({**values, **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReplicaSpec:
        """As ``from_yaml``, of values."""
        given = dict(values)
        known = {one.name for one in dataclasses.fields(cls)}
        if unknown := sorted(set(given) - known):
            raise SettingsError(f"a replica has no setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        wanted = given.get("placement", {"kind": "separate"})
        if not isinstance(wanted, Placement):
            wanted = dict(wanted)
            kind = wanted.pop("kind", None)
            if kind not in ("separate", "deferred", "colocated"):
                raise SettingsError(f"placement.kind of a replica is separate, deferred or colocated, not {kind!r}")
            try:
                given["placement"] = getattr(Placement, kind)(**wanted)
            except TypeError as error:
                raise SettingsError(f"placement: {str(error).partition(') ')[2]} ({kind})") from None
        if "model" not in given:
            raise SettingsError("no model is set")
        given["env"] = {name: str(value) for name, value in (given.get("env") or {}).items()}
        for name in ("vllm_args", "head_args", "command"):
            if name in given:
                given[name] = [str(value) for value in given[name]]
        return cls(**given)

    @property
    def nodes(self) -> int:
        """How many launchers: colocated vLLM has one, whose workers are Ray's actors."""
        return 1 if self.placement.kind == "colocated" else self.placement.bundles

    @property
    def engine_devices(self) -> int:
        """Devices of one engine (DP rank)."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def nodes_per_engine(self) -> int:
        """Over how many nodes one engine goes; 1 also where several engines share a node."""
        return max(1, self.engine_devices // self.placement.devices)

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            SettingsError: in one line.
        """
        sizes = (self.data_parallel_size, self.tensor_parallel_size, self.pipeline_parallel_size)
        place, wanted = self.placement, self.data_parallel_size * self.engine_devices
        product = f"DP {sizes[0]} x TP {sizes[1]} x PP {sizes[2]} = {wanted} devices"
        if min(sizes) < 1:
            raise SettingsError(f"parallel sizes must be at least 1: {product}")
        if place.kind == "shared":
            raise SettingsError("placement 'shared' is for trainer ranks; a replica is separate, deferred or colocated")
        if place.bundles * place.devices != wanted:
            raise SettingsError(f"{product}, but the placement has {place.bundles} x {place.devices}")
        if self.nodes > 1 and place.devices % self.engine_devices and self.engine_devices % place.devices:
            raise SettingsError(f"{place.devices} devices a node and engines of {self.engine_devices} do not divide")
        if place.kind == "colocated" and self.data_parallel_size > 1:
            raise SettingsError("colocated replicas have one engine: launch one for each, with join=")
        if self.restart not in ("never", "node", "replica"):
            raise SettingsError(f"restart must be never, node or replica, not {self.restart!r}")
        if self.restart == "node" and self.nodes > 1:
            raise SettingsError(
                "restart='node' needs a replica of one node (vLLM takes no lost node back): use 'replica'"
            )
        for argument in (*self.vllm_args, *self.head_args):
            if argument.partition("=")[0].replace("_", "-") in _DERIVED:
                raise SettingsError(f"leave {argument} out: it follows from the placement and the parallel sizes")

    def command_line(self, index: int, facts: Sequence[NodeFacts]) -> list[str]:
        """What runs on node ``index``; ``facts`` of all nodes, the head's first."""
        head = facts[0]
        http_port, rpc_port, master_port = head.ports
        found = [*self.command, self.model]
        for flag, size in (("tensor", self.tensor_parallel_size), ("pipeline", self.pipeline_parallel_size)):
            found += [f"--{flag}-parallel-size", str(size)] if size > 1 else []
        if self.data_parallel_size > 1:
            found += ["--data-parallel-size", str(self.data_parallel_size), "--data-parallel-address", head.address]
            found += ["--data-parallel-rpc-port", str(rpc_port)]
        if self.nodes_per_engine > 1:  # vLLM tells ranks from the node's own
            found += ["--nnodes", str(self.nodes), "--node-rank", str(index)]
            found += ["--master-addr", head.address, "--master-port", str(master_port)]
        elif self.data_parallel_size > 1:
            local = self.data_parallel_size // self.nodes
            found += ["--data-parallel-size-local", str(local)]
            found += ["--data-parallel-start-rank", str(index * local)] if index else []
        if self.placement.kind == "colocated":
            found += ["--distributed-executor-backend", "ray"]
        found += ["--headless"] if index else ["--host", head.address, "--port", str(http_port)]
        found += ["--worker-extension-cls", self.worker_extension] if self.worker_extension else []
        return [*found, *self.vllm_args, *(() if index else self.head_args)]

    def node_of(self, dp_rank: int) -> int:
        """On which node DP rank ``dp_rank`` must be (its first, where it spans several)."""
        return dp_rank * self.nodes // self.data_parallel_size
