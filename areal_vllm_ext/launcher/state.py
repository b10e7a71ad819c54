"""What the launcher's actors report about themselves."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol import security


@dataclass(frozen=True)
class DirectoryEndpoint:
    """The directory where the engines of one or more replicas register.

    Attributes:
        address: ``tcp://host:port``, for ``EngineGroup.connect``.
        key: the cluster's key, for the directory and for the engines.
    """

    address: str
    key: security.ClusterKey


@dataclass(frozen=True)
class NodeAddress:
    """The address of a node, and the ports that its launcher reserves for the server."""

    host: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class NodeState:
    """One node of a replica.

    Attributes:
        pid: of the node's launcher actor.
        stage: how far the start of the server is, in a few words.
        exit_code: of the server, once nothing is left of it; None before.
        cause: why the server ended: a line of its log.
        log: path of the server's log, on that node.
    """

    name: str
    address: str = "?"
    pid: int = 0
    stage: str = "waiting for its bundle"
    exit_code: int | None = None
    healthy: bool = False
    log: str = ""
    last_lines: str = ""
    cause: str = ""


@dataclass(frozen=True)
class ReplicaState:
    """A replica as its owner sees it.

    Attributes:
        phase: ``starting``, ``serving``, ``failed`` or ``ended``; in the last two nothing is left of the replica.
        stage: how far the start is, in a few words.
        error: the last error; it stays after a restart.
        devices: of colocated workers by rank: node and device, verified at the start.
    """

    phase: str = "starting"
    stage: str = ""
    error: str = ""
    url: str = ""
    directory: DirectoryEndpoint | None = None
    nodes: tuple[NodeState, ...] = ()
    restarts: int = 0
    devices: tuple[tuple[str, str], ...] = ()
