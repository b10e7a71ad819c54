"""Strangers at the trainer's listener, and limits that deadlines must not depend on."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import eventually, in_thread

from areal_vllm_ext.transport import tcp_connect
from areal_vllm_ext.transport.base import Cancelled
from areal_vllm_ext.transport.tcp_connect import Listener, connect

HOST, TOKEN = "127.0.0.1", "the token"
WORKERS = {1: "worker 0 of engine a", 2: "worker 0 of engine b"}


def never() -> bool:
    return False


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener(HOST)
    yield made
    made.close()


def accepting(listener: Listener, timeout: float = 10.0) -> tuple[threading.Thread, list[dict[int, socket.socket]]]:
    return in_thread(lambda: listener.accept_all(TOKEN, WORKERS, timeout, never))


def stranger(listener: Listener) -> socket.socket:
    host, _, port = listener.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def all_connect(listener: Listener) -> None:
    """Both workers come, and each reaches the trainer under its own rank."""
    thread, accepted = accepting(listener)
    workers = {rank: connect(listener.address, TOKEN, rank, 5.0, never) for rank in (2, 1)}
    thread.join(5)
    (trainer,) = accepted
    for rank, worker in workers.items():
        worker.sendall(bytes([rank]))
        assert trainer[rank].recv(9) == bytes([rank])
        worker.close()
        trainer[rank].close()


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_each_worker_is_known_by_its_rank_and_the_listener_is_closed_then(family: str) -> None:
    listener = Listener(HOST if family == "IPv4" else "::1")
    all_connect(listener)
    with pytest.raises(RuntimeError, match=f"cannot be reached at {listener.address}: Connection refused"):
        connect(listener.address, TOKEN, 1, 5.0, never)


def test_a_connection_without_the_token_is_closed(listener: Listener) -> None:
    thread, accepted = accepting(listener, timeout=1.0)
    with pytest.raises((RuntimeError, TimeoutError)):
        connect(listener.address, "another token", 1, 0.3, never)
    with pytest.raises((RuntimeError, TimeoutError)):
        connect(listener.address, TOKEN, 3, 0.3, never)  # a rank of no worker
    thread.join(5)
    assert str(accepted[0]).startswith("2 of 2 workers did not connect")


def test_a_listener_without_the_token_is_not_the_trainer() -> None:
    listener = Listener(HOST)
    _, accepted = in_thread(lambda: listener.accept_all("another token", WORKERS, 1.0, never))
    with pytest.raises((RuntimeError, TimeoutError)):
        connect(listener.address, TOKEN, 1, 0.3, never)
    # A server that sends arbitrary answers.
    with socket.create_server((HOST, 0)) as fake:

        def answer() -> None:
            connection, _ = fake.accept()
            with connection:
                connection.sendall(bytes(16))
                connection.recv(100)
                connection.sendall(bytes(32))

        in_thread(answer)
        address = f"{HOST}:{fake.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=f"what answers at {address} is not the trainer of this update"):
            connect(address, TOKEN, 1, 5.0, never)
    assert accepted == []


@pytest.mark.parametrize("sent", [b"", b"x", b"x" * 52, b"x" * 5000])
def test_strangers_do_not_delay_workers_and_are_closed(listener: Listener, sent: bytes) -> None:
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger(listener)) for _ in range(300)]
        for one in strangers:
            one.sendall(sent)
        all_connect(listener)
        for one in strangers:
            one.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                while one.recv(100):
                    pass


def closed_by_the_other(connections: list[socket.socket]) -> int:
    poll = select.poll()
    for one in connections:
        poll.register(one, select.POLLRDHUP)
    return len(poll.poll(0))


def test_the_oldest_of_too_many_silent_strangers_are_closed(listener: Listener) -> None:
    accepting(listener, timeout=3.0)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger(listener)) for _ in range(300)]
        eventually(lambda: closed_by_the_other(strangers) == 300 - 128, timeout=2.0)


def test_silent_strangers_are_closed_after_a_while(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_connect, "_UNPROVEN_SECONDS", 0.3)
    accepting(listener, timeout=3.0)
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger(listener)) for _ in range(100)]
        assert closed_by_the_other(strangers) == 0
        eventually(lambda: closed_by_the_other(strangers) == 100, timeout=2.0)


def test_a_wait_is_given_up_at_both_ends(listener: Listener) -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        listener.accept_all(TOKEN, WORKERS, 20.0, cancelled.is_set)
    with socket.create_server((HOST, 0)) as silent, pytest.raises(Cancelled):
        connect(f"{HOST}:{silent.getsockname()[1]}", TOKEN, 1, 20.0, cancelled.is_set)
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize("closes", [False, True], ids=["silent", "hangs up"])
def test_a_trainer_that_does_not_answer_costs_no_more_than_the_deadline(closes: bool) -> None:
    with socket.create_server((HOST, 0)) as other:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    other.accept()[0].close()

        if closes:
            in_thread(hang_up)
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.4 s"):
            connect(f"{HOST}:{other.getsockname()[1]}", TOKEN, 1, 0.4, never)
        assert time.monotonic() - started < 1.0
        other.shutdown(socket.SHUT_RDWR)


# In a process of its own: many more strangers than it may have descriptors.
FEW_DESCRIPTORS = """
import resource, socket, sys, threading, time
from areal_vllm_ext.transport.tcp_connect import Listener, connect

listener = Listener("127.0.0.1")
print(listener.address, flush=True)
sys.stdin.readline()
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
print("limited", flush=True)
found = listener.accept_all("the token", {1: "a worker"}, 20.0, lambda: False)
print("connected", sorted(found), flush=True)
"""


def test_a_trainer_without_a_free_descriptor_still_gets_its_workers() -> None:
    command = [sys.executable, "-c", FEW_DESCRIPTORS]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer,
        contextlib.ExitStack() as stack,
    ):
        assert trainer.stdin
        assert trainer.stdout
        stack.callback(trainer.kill)
        address = trainer.stdout.readline().strip()
        port = int(address.rpartition(":")[2])
        for _ in range(200):
            stack.enter_context(socket.create_connection((HOST, port), timeout=5))
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline() == "limited\n"
        stack.enter_context(connect(address, TOKEN, 1, 10.0, never))
        assert trainer.stdout.readline() == "connected [1]\n"


@pytest.mark.parametrize(
    ("free", "what", "message"),
    [
        (
            0,
            "connect('127.0.0.1:1', 'the token', 1, 5.0, bool)",
            "this worker cannot connect to the trainer at 127.0.0.1:1",
        ),
        (0, "Listener('127.0.0.1')", "the trainer cannot listen on 127.0.0.1"),
        (1, "Listener('127.0.0.1')", "the trainer cannot listen on 127.0.0.1"),
    ],
)
def test_a_process_without_a_free_descriptor_says_so(free: int, what: str, message: str) -> None:
    script = (
        "import resource\n"
        "from areal_vllm_ext.transport.tcp_connect import Listener, connect\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({3 + free}, {3 + free}))\n"
        f"{what}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert f"RuntimeError: {message}: no file descriptor is left; raise the limit (ulimit -n)" in done.stderr


def test_an_address_that_is_not_this_machines_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"the trainer cannot listen on 192\.0\.2\.1: Cannot assign"):
        Listener("192.0.2.1")


# A name server that does not answer: each of these takes its time-out, in whatever thread asks.
SLOW_NAMES = """
#define _GNU_SOURCE
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>
int getnameinfo(const struct sockaddr *a, socklen_t l, char *h, socklen_t hl, char *s, socklen_t sl, int f)
{ sleep(10); return EAI_AGAIN; }
int getaddrinfo(const char *n, const char *s, const struct addrinfo *h, struct addrinfo **r)
{ sleep(10); return EAI_AGAIN; }
"""
UPDATE = """
import threading, time, torch
from areal_vllm_ext.protocol import Bucket
from areal_vllm_ext.transport.base import WorkerSite
from areal_vllm_ext.transport.broadcast import BroadcastSink, BroadcastSource
from concurrent.futures import Future

started = time.monotonic()
sink = BroadcastSink("tcp", {"engine": [0]}, "127.0.0.1", torch.device("cpu"), 1024, 3.0)
joined = Future()
threading.Thread(
    target=lambda: joined.set_result(
        BroadcastSource(sink.transfers[0], WorkerSite(0, torch.device("cpu")), 3.0, threading.Event())
    )
).start()
sink.connect(joined)
source = joined.result()
buffer = torch.arange(100, dtype=torch.uint8)
work = sink.start(buffer, 3.0, lambda: False)
bucket = Bucket(epoch=1, update="u", index=0, nbytes=100, segments=())
received = source.start(bucket, torch.empty(100, dtype=torch.uint8), 3.0, lambda: False).wait(3.0, lambda: False)
work.wait(3.0, lambda: False)
assert torch.equal(received, buffer)
sink.close()
source.close()
print(time.monotonic() - started)
"""


def test_no_name_is_looked_up(tmp_path: Path) -> None:
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "slow_names.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, "-xc", "-"], input=SLOW_NAMES, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", UPDATE], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 3.0
