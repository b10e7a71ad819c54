"""Record a replica's processes, listening ports, shared memory and folders, and find what is left of them later."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .network import Namespaces

_SHARED_MEMORY = "/dev/shm/"  # noqa: S108 - where Linux has it


@dataclasses.dataclass
class Footprint:
    """What one replica holds while it runs, over all namespaces."""

    replica: str
    processes: set[int]
    ports: set[int] = dataclasses.field(default_factory=set)
    shared_memory: set[Path] = dataclasses.field(default_factory=set)
    folders: set[Path] = dataclasses.field(default_factory=set)

    @classmethod
    def of(cls, replica: str) -> Footprint:
        """Record what the replica holds now."""
        found = cls(replica, processes(replica))
        for pid in found.processes:
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                found.ports |= _listening(pid)
                found.shared_memory |= _mapped(pid)
                found.folders.add(Path(_environment(pid)["VLLM_RPC_BASE_PATH"]))
        return found

    def left(self, namespaces: Namespaces) -> list[str]:
        """Return a line for each thing that is still there."""
        left = [f"process {pid}: {_command(pid)}" for pid in processes(self.replica)]
        left += [f"shared memory {path}" for path in self.shared_memory if path.exists()]
        left += [f"folder {path}" for path in self.folders if path.exists()]
        for node in namespaces.addresses:
            with namespaces.inside(node):
                listened = {port for port, _ in _listening_sockets("thread-self")}
                left += [f"port {port} on node {node}" for port in self.ports & listened]
        return left


def processes(replica: str) -> set[int]:
    """Return the processes with the replica's name in their environment: vLLM and all that it started."""
    pids = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return {pid for pid in pids if _environment(pid).get("AREAL_VLLM_REPLICA") == replica}


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):  # the process has ended
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
    return {}


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    return ""


def _mapped(pid: int) -> set[Path]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {
        Path(line[line.index(_SHARED_MEMORY) :]) for line in maps if _SHARED_MEMORY in line and "(deleted)" not in line
    }


def _listening(pid: int) -> set[int]:
    own = {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink()}
    return {port for port, inode in _listening_sockets(str(pid)) if f"socket:[{inode}]" in own}


def _listening_sockets(process: str) -> list[tuple[int, str]]:
    """Return ports and inodes of the TCP sockets that listen in the network namespace of ``process``."""
    tables = [Path(f"/proc/{process}/net/{table}").read_text().splitlines() for table in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table]
    return [(int(row[1].rpartition(":")[2], 16), row[9]) for row in rows if row[3] == "0A"]
