"""Other processes, to be killed. They are forked from one that has torch imported already: importing takes seconds."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.protocol import Broadcast, SharedMemory
from areal_vllm_ext.transport import gloo_process, shared_memory
from areal_vllm_ext.transport.base import WorkerSite
from areal_vllm_ext.transport.broadcast import BroadcastSource
from areal_vllm_ext.transport.shared_memory import SharedMemorySink

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

HOST = "127.0.0.1"
CPU = torch.device("cpu")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "areal_vllm_ext.transport.broadcast",
        "areal_vllm_ext.transport.gloo_process",
        "areal_vllm_ext.client.group",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch._dynamo",  # imported when a tensor is first distributed
        "transformers.core_model_loading",  # imported when names are first compared with a checkpoint
        "ranks",
        "real_receivers",
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
    return BroadcastSource(transfer, WorkerSite(rank, CPU), timeout, threading.Event())


class ForkedGloo:
    """The process of a gloo group: what ``gloo_process`` uses of a Popen."""

    def __init__(self, memory: int, log: int) -> None:
        orders, ordering = os.pipe()
        answering, answers = os.pipe()
        given = [DupFd(one) for one in (orders, answers, log, memory)]
        self._process = _context.Process(target=run_gloo, args=given, daemon=True)
        self._process.start()
        os.close(orders)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(ordering, "wb"), os.fdopen(answering, "rb")
        self.pid, self.kill, self.wait = self._process.pid, self._process.kill, self._process.join


@pytest.fixture
def forked_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the processes of gloo groups, as each would import torch; ``test_torch_group.py`` starts real ones, too."""
    monkeypatch.setattr(gloo_process, "_start", ForkedGloo)


# What they do


def run_gloo(orders: Any, answers: Any, log: Any, memory: Any) -> None:
    """Be the process in which gloo runs, with the same descriptors."""
    os.setsid()
    for descriptor, given in enumerate((orders, answers, log)):
        os.dup2(given.detach(), descriptor)
    sys.stdin = io.TextIOWrapper(os.fdopen(0, "rb", closefd=False))
    gloo_process.main(memory.detach())


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


def make_segment(connection: Connection, folder: Path) -> None:
    """A trainer that makes shared memory in ``folder``, connects to its workers at the first message, and then waits."""
    shared_memory._FOLDER = folder
    sink = SharedMemorySink(1, 1024, 4096)
    sink.buffer(0, 4096)[1].fill_(7)
    transfer: SharedMemory = sink.transfers[0]
    connection.send(transfer)
    opening: Future[None] = Future()
    connection.recv()
    opening.set_result(None)
    sink.connect(opening)
    connection.send("met")
    connection.recv()
