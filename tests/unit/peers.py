"""Other processes, to be killed. They are forked from one that has torch imported already: importing takes seconds."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.protocol import Broadcast, Bucket, SharedMemory
from areal_vllm_ext.transport.base import WorkerSite
from areal_vllm_ext.transport.broadcast import BroadcastSink, BroadcastSource
from areal_vllm_ext.transport.shared_memory import SharedMemorySink

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

HOST = "127.0.0.1"
CPU = torch.device("cpu")

_context = multiprocessing.get_context("forkserver")
# The last one is what torch imports when a tensor is first distributed.
_context.set_forkserver_preload(
    [
        "areal_vllm_ext.transport.broadcast",
        "areal_vllm_ext.client.group",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch._dynamo",
    ]
)


def start(work: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Connection]:
    """A process that does ``work(connection, *arguments)``, and the other end of its connection."""
    ours, theirs = _context.Pipe()
    process = _context.Process(target=work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def end(process: BaseProcess, connection: Connection) -> None:
    process.kill()
    process.join()
    process.close()
    connection.close()


def join(transfer: Broadcast, rank: int, timeout: float) -> BroadcastSource:
    """The worker's end of a broadcast."""
    return BroadcastSource(transfer, WorkerSite(rank, CPU, HOST), timeout, threading.Event())


# What they do


def command(connection: Connection, directory: str, key_file: str, what: str) -> None:
    """A trainer that pauses or updates all engines, and tells each phase before it begins."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background of a shell ignore it
    with EngineGroup.connect(directory, key_file=key_file) as group:
        if what == "pause":
            connection.send("pausing")
            group.pause(timeout=60)
        with group.update("new", timeout=60, on_phase=connection.send) as update:
            update.send("/checkpoint")


def join_and_wait(connection: Connection, transfer: Broadcast, rank: int) -> None:
    """A worker that joins, says so, and does nothing any more."""
    source = join(transfer, rank, 60.0)
    connection.send("joined")
    connection.recv()
    source.close()


def rebuild_on_two_threads(connection: Connection) -> None:
    """Trainer and worker in one process, twice: the second time after a collective that was given up."""

    def meet() -> tuple[BroadcastSink, BroadcastSource]:
        sink = BroadcastSink("gloo", [[0]], HOST, CPU, 1 << 20, 5.0)
        joined: Future[BroadcastSource] = Future()
        threading.Thread(target=lambda: joined.set_result(join(sink.transfers[0], 0, 5.0))).start()
        sink.meet(joined)  # type: ignore[arg-type]
        return sink, joined.result()

    sink, source = meet()
    bucket = Bucket(epoch=1, update="u", index=0, nbytes=3 << 20, segments=())
    try:
        buffer = torch.empty(3 << 20, dtype=torch.uint8)
        source.start(bucket, buffer, 0.1, lambda: False).wait(0.1, lambda: False)
    except (TimeoutError, RuntimeError):
        sink.close()
        source.close()
    del sink, source
    time.sleep(0.3)
    meet()
    connection.send("alive")


def make_segment(connection: Connection) -> None:
    """A trainer that makes shared memory, meets its workers when it is told so, and does nothing any more."""
    sink = SharedMemorySink(1, 1024, 4096)
    sink.buffer(0, 4096)[1].fill_(7)
    transfer: SharedMemory = sink.transfers[0]
    connection.send(transfer)
    opening: Future[None] = Future()
    connection.recv()
    opening.set_result(None)
    sink.meet(opening)
    connection.send("met")
    connection.recv()
