"""A name server that does not answer delays nothing but what needs the name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_vllm_ext.protocol.server import looks_up
from harness.network import ip, missing

NAME = f"areal-dns-{os.getpid()}"
# As long as this the resolver of libc waits, twice, unless another setting says so.
RESOLVER_SECONDS = 5.0

CLIENT = """
import json, sys, time
from areal_vllm_ext import EngineGroup
from areal_vllm_ext.errors import EngineUnreachable
from areal_vllm_ext.protocol import security

key, facts = security.write_key(sys.argv[1]), {}
group = EngineGroup.connect("tcp://engines.example:29700", key_file=sys.argv[1])
started = time.monotonic()
try:
    group.status(timeout=1.0)
except EngineUnreachable as error:
    facts["status"], facts["error"] = time.monotonic() - started, str(error)
started = time.monotonic()
group.close()
facts["close"] = time.monotonic() - started
print(json.dumps(facts), flush=True)
"""

# A server and a connection to a name share a context, as in an engine's endpoint; another client asks the server.
SERVER = """
import json, os, sys, time
import zmq
from areal_vllm_ext.protocol import security
from areal_vllm_ext.protocol.server import IO_THREADS, connect, set_io_thread

key, context = security.write_key(sys.argv[1]), zmq.Context(IO_THREADS)
facts = {}
directory = connect(context, "tcp://directory.example:29700", key, b"engine")
time.sleep(0.3)
server = context.socket(zmq.ROUTER)
server.affinity = 1
port = server.bind_to_random_port("tcp://127.0.0.1")
client = context.socket(zmq.DEALER)
set_io_thread(context, client, f"tcp://127.0.0.1:{port}")
client.connect(f"tcp://127.0.0.1:{port}")
started = time.monotonic()
client.send(b"hello")
assert server.poll(9000)
facts["answer"] = time.monotonic() - started
print(json.dumps(facts), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[list[str]]:
    """A command prefix for a network whose name server never answers."""
    if reason := missing():
        pytest.skip(reason)
    settings = Path("/etc/netns") / NAME
    settings.mkdir(parents=True)
    (settings / "resolv.conf").write_text("nameserver 192.0.2.1\n")
    try:
        ip("netns", "add", NAME)
        for command in (
            "link set lo up",
            "link add v0 type veth peer name v1",
            "addr add 198.51.100.2/24 dev v0",
            "link set v0 up",
            "link set v1 up",
            "neigh add 198.51.100.1 lladdr 02:00:00:00:00:01 dev v0",
            "route add default via 198.51.100.1 dev v0",
        ):
            ip("-n", NAME, *command.split())
        yield ["ip", "netns", "exec", NAME]
    finally:
        ip("netns", "del", NAME)
        (settings / "resolv.conf").unlink()
        settings.rmdir()


def run(namespace: list[str], script: str, folder: Path) -> dict[str, float | str]:
    process = subprocess.Popen(
        [*namespace, sys.executable, "-c", script, str(folder / "key")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        facts: dict[str, float | str] = json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
    return facts


def test_a_group_keeps_its_timeout_says_why_and_is_closed_at_once(namespace: list[str], tmp_path: Path) -> None:
    facts = run(namespace, CLIENT, tmp_path)
    assert "its name is being looked up: does the name server answer?" in str(facts["error"])
    assert float(facts["status"]) < 2.0
    assert float(facts["close"]) < RESOLVER_SECONDS / 2


def test_other_connections_of_a_context_do_not_wait(namespace: list[str], tmp_path: Path) -> None:
    assert float(run(namespace, SERVER, tmp_path)["answer"]) < RESOLVER_SECONDS / 2


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("tcp://10.0.0.1:1", False),
        ("tcp://[::1]:1", False),
        ("tcp://localhost:1", True),
        ("tcp://head.svc:29700", True),
    ],
)
def test_names_are_told_from_addresses(address: str, name: bool) -> None:
    assert looks_up(address) == name
