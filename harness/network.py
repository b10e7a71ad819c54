"""Two nodes on one machine: two network namespaces, joined by a veth pair, each with its own address."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from areal_vllm_ext.protocol import security

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def missing() -> str:
    """Return why namespaces cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    return "" if shutil.which("ip") else "network namespaces need iproute2"


class Namespaces:
    """Nodes ``a`` and ``b``; ``inside`` moves the calling thread to one of them."""

    addresses: ClassVar = {"a": "10.77.0.1", "b": "10.77.0.2"}

    def __init__(self) -> None:
        self.names = {node: f"areal-{os.getpid()}-{node}" for node in self.addresses}
        self.links = {node: f"ar{os.getpid() % 100000}{node}" for node in self.addresses}

    def make(self) -> None:
        for name in self.names.values():
            ip("netns", "add", name)
        self.lay_wire()
        for node, name in self.names.items():
            ip("-n", name, "addr", "add", f"{self.addresses[node]}/24", "dev", self.links[node])
            ip("-n", name, "link", "set", self.links[node], "up")
            ip("-n", name, "link", "set", "lo", "up")

    def lay_wire(self) -> None:
        """Give each node a network device that is joined with the other node's."""
        ip("link", "add", self.links["a"], "type", "veth", "peer", "name", self.links["b"])
        for node, name in self.names.items():
            ip("link", "set", self.links[node], "netns", name)

    def remove(self) -> None:
        for name in self.names.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)

    @contextlib.contextmanager
    def secured(self, folder: Path) -> Iterator[str]:
        """Make both nodes and a cluster's key in ``folder``, move the caller to ``a``, and give the path of the key."""
        key_file = str(folder / "cluster.key")
        try:
            self.make()
            security.write_key(key_file)
            with self.inside("a"):
                yield key_file
        finally:
            self.remove()

    def prefix(self, node: str) -> list[str]:
        """Return the words before a command that run it on ``node``."""
        return ["ip", "netns", "exec", self.names[node]]

    def set_link(self, node: str, state: str) -> None:
        """Cut ``node`` off (``down``) or connect it again (``up``)."""
        ip("-n", self.names[node], "link", "set", self.links[node], state)

    @contextlib.contextmanager
    def inside(self, node: str) -> Iterator[None]:
        """Move the calling thread to ``node``, with the threads and processes that it starts inside this context."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(Path("/run/netns") / self.names[node], os.O_RDONLY)
        try:
            if libc.setns(there, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            yield
        finally:
            libc.setns(home, _CLONE_NEWNET)
            os.close(home)
            os.close(there)
