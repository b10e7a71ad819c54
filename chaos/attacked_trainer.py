"""The trainer that strangers attack: it updates engines without end, and has the other ports of ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.process.lifeline import LifelineAddress, Lifelines, connect

T = TypeVar("T")

_UPDATE_TIMEOUT_SECONDS = 30.0
_CONNECT_SECONDS = 20.0
_listening = threading.Lock()
_create_server = socket.create_server
_BYTES = bytes(range(256)) * 4096


class Trainer:
    """Updates engines without end, and has the other ports of ours. Runs in a process of its own.

    Attributes:
        facts: how often each port did its work, and what failed.
    """

    def __init__(self, directory: str, key_file: str) -> None:
        self._directory, self._key_file = directory, key_file
        self._stopping = threading.Event()
        self.facts: dict[str, Any] = {
            "updates": 0,
            "longest_update_s": 0.0,
            "rendezvous": 0,
            "fetches": 0,
            "gloo_broadcasts": 0,
            "gloo_ended": 0,
            "lifelines_lost": 0,
        }

    def run(self) -> None:
        """Work until standard input is closed; lines on standard output are the ports, then the facts."""
        ports: queue.Queue[dict[str, int]] = queue.Queue()
        threads = [threading.Thread(target=self._serve, args=(ports,)), threading.Thread(target=self._update)]
        for thread in threads:
            thread.start()
        print(json.dumps(ports.get()), flush=True)
        sys.stdin.read()
        self._stopping.set()
        for thread in threads:
            thread.join()
        print(json.dumps(self.facts), flush=True)

    def _update(self) -> None:
        with EngineGroup.connect(self._directory, key_file=self._key_file) as group:
            engines = len(group.wait_ready(2, timeout=60))
            version = 0
            while not self._stopping.is_set():
                version += 1
                started = time.monotonic()
                try:
                    with group.update(version, timeout=_UPDATE_TIMEOUT_SECONDS) as update:
                        update.send("/nowhere")
                    states = group.status(timeout=10.0)
                    assert [state.version for state in states] == [version] * engines, states
                except Exception as error:
                    self.facts.setdefault("errors", []).append(f"{type(error).__name__}: {error}")
                self.facts["updates"] += 1
                self.facts["longest_update_s"] = max(
                    self.facts["longest_update_s"], round(time.monotonic() - started, 2)
                )
                time.sleep(0.05)

    def _serve(self, ports: queue.Queue[dict[str, int]]) -> None:
        asyncio.run(self._lifeline(ports))

    async def _lifeline(self, ports: queue.Queue[dict[str, int]]) -> None:
        lost: list[str] = []
        address = await Lifelines(lost.append).listen("127.0.0.1")
        watch = await connect(LifelineAddress(address.host, address.port, address.token), "node", lambda: None)
        rendezvous, fetch = _free_port(), _free_port()
        gloo: queue.Queue[int] = queue.Queue()
        works = [
            asyncio.to_thread(work, given)
            for work, given in ((self._rendezvous, rendezvous), (self._fetch, fetch), (self._gloo, gloo))
        ]
        working = asyncio.gather(*works)
        ports.put(
            {
                "lifeline": address.port,
                "rendezvous": rendezvous,
                "fetch": fetch,
                "gloo": await asyncio.to_thread(gloo.get),
            }
        )
        await working
        self.facts["lifelines_lost"] = len(lost)
        watch.cancel()

    def _rendezvous(self, port: int) -> None:
        """Let two workers connect at the same port again and again."""
        from areal_vllm_ext.transport import tcp_connect  # imports torch, which the strangers do without

        while not self._stopping.is_set():
            token = secrets.token_hex(16)
            try:
                listener = _listener_at(tcp_connect.Listener, port)
                workers = [
                    threading.Thread(target=self._be_worker, args=(listener.address, token, rank)) for rank in (1, 2)
                ]
                for worker in workers:
                    threading.Timer(0.3, worker.start).start()  # strangers are faster
                connected = listener.accept_all(token, {1: "one", 2: "two"}, _CONNECT_SECONDS, self._stopping.is_set)
                for connection in connected.values():
                    connection.close()
                for worker in workers:
                    worker.join()
                self.facts["rendezvous"] += 1
            except Exception as error:
                if not self._stopping.is_set():
                    self.facts.setdefault("errors", []).append(f"rendezvous: {type(error).__name__}: {error}")

    def _be_worker(self, address: str, token: str, rank: int) -> None:
        from areal_vllm_ext.transport import tcp_connect

        with contextlib.suppress(Exception):  # the other end says more
            tcp_connect.connect(address, token, rank, _CONNECT_SECONDS, self._stopping.is_set).close()

    def _fetch(self, port: int) -> None:
        """Let a worker fetch a tensor of a peer, at the same port again and again."""
        from areal_vllm_ext.transport import peer

        while not self._stopping.is_set():
            token = secrets.token_hex(16)
            try:
                sink = _listener_at(peer.PeerSink, port)
                fetching = threading.Timer(0.3, self._be_fetching_worker, (sink.address, token))
                fetching.start()
                try:
                    sink.accept(token)
                    while sink.next_request() is not None:
                        sink.send(len(_BYTES), [memoryview(_BYTES)])
                finally:
                    sink.close()
                    fetching.join()
                    sink.free()
            except Exception as error:
                if not self._stopping.is_set():
                    self.facts.setdefault("errors", []).append(f"fetch: {type(error).__name__}: {error}")

    def _be_fetching_worker(self, address: str, token: str) -> None:
        from areal_vllm_ext.transport import peer

        try:
            source = peer.PeerSource(address, token, self._stopping.is_set)
            received = bytearray(len(_BYTES))
            source.fetch(0, memoryview(received), time.monotonic() + _CONNECT_SECONDS)
            source.close()
            assert received == _BYTES
            self.facts["fetches"] += 1
        except Exception as error:
            if not self._stopping.is_set():
                self.facts.setdefault("errors", []).append(f"fetching: {type(error).__name__}: {error}")

    def _gloo(self, ports: queue.Queue[int]) -> None:
        """Broadcast to a worker's gloo process again and again. Where that ends, a new one joins, as in the next update."""
        import torch

        from areal_vllm_ext.protocol import TorchGroup
        from areal_vllm_ext.transport.gloo_process import GlooGroup, Span
        from harness.torch_trainer import torch_trainer

        sent = torch.arange(1 << 16, dtype=torch.uint8)
        while not self._stopping.is_set():
            try:
                with torch_trainer(2, f"group {time.monotonic()}") as trainer:
                    transfer = TorchGroup(
                        backend="gloo",
                        group=trainer.name,
                        joining="1",
                        world_size=2,
                        ranks={0: 1},
                        rendezvous=f"{trainer.host}:{trainer.port}",
                    )
                    group = GlooGroup(transfer, 1, _CONNECT_SECONDS, self._stopping.is_set)
                    ports.put(_listening_port(group.pid))
                    try:
                        while not self._stopping.wait(0.2):
                            received = torch.empty_like(sent)
                            work = group.start(
                                received, [Span(0, sent.numel())], _CONNECT_SECONDS, self._stopping.is_set
                            )
                            broadcast = trainer.broadcast([sent])
                            work.wait(_CONNECT_SECONDS, self._stopping.is_set)
                            broadcast.result(_CONNECT_SECONDS)
                            assert torch.equal(received, sent)
                            self.facts["gloo_broadcasts"] += 1
                    finally:
                        group.close()
            except Exception as error:
                if not self._stopping.is_set():
                    self.facts["gloo_ended"] += 1
                    self.facts["last_gloo_end"] = f"{type(error).__name__}: {error}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _listening_port(pid: int) -> int:
    """Return a TCP port at which a process listens."""
    inodes = set()
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it was just closed
            inodes.add(str(one.readlink()).removeprefix("socket:[").removesuffix("]"))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                return int(fields[1].rpartition(":")[2], 16)
    raise RuntimeError(f"process {pid} listens at no port")


def _listener_at(make: Callable[[str], T], port: int) -> T:
    """Return a listener at a known port, so that strangers find it; an update's port is random."""

    def at_port(address: tuple[str, int], **options: Any) -> socket.socket:
        return _create_server((address[0], port), **options)

    with _listening:
        socket.create_server = at_port  # type: ignore[assignment]
        try:
            return make("127.0.0.1")
        finally:
            socket.create_server = _create_server
