"""gloo in a process of its own, which this worker can end at any time.

gloo ends its process where a tensor has another size than was announced, and a transfer that waits for its trainer cannot be
given up. Here that costs this process only: the trainer's broadcast fails at once, and the engine serves on. Bytes come back
in shared memory without a name; orders and answers are lines of JSON on pipes.

    python -m areal_vllm_ext.transport.gloo_process MEMORY    orders on standard input, answers on standard output
"""

from __future__ import annotations

import collections
import contextlib
import json
import mmap
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .base import PeerLost, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..protocol import TorchGroup

# What the process wrote before it ended, at most, for the message.
_LAST_WORDS_BYTES = 600


class Span(NamedTuple):
    """Where a tensor's bytes lie in a bucket."""

    offset: int
    nbytes: int


class GlooGroup:
    """A rank of a gloo group. Buckets come in the order of ``start``."""

    device = torch.device("cpu")

    def __init__(self, transfer: TorchGroup, rank: int, timeout: float, cancelled: Callable[[], bool]) -> None:
        """Join the group.

        Raises:
            Cancelled: ``cancelled()`` became true.
            TimeoutError: not all ranks joined within ``timeout`` seconds.
            PeerLost: the group cannot be joined.
        """
        self._group = transfer.group
        self._memory = os.memfd_create("areal-gloo")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = _start(self._memory, self._log.fileno())
        self._answers = b""
        assert self._process.stdout is not None
        self._readable = select.poll()  # select.select takes no descriptor above 1023
        self._readable.register(self._process.stdout, select.POLLIN)
        self._waiting: collections.deque[tuple[GlooWork, dict[str, Any]]] = collections.deque()
        order = {
            "rendezvous": transfer.rendezvous,
            "group": transfer.group,
            "rank": rank,
            "world_size": transfer.world_size,
            "timeout": timeout,
        }
        try:
            self._ask(order)
            self.await_answer(timeout, cancelled, f"not all of {transfer.world_size} ranks joined {transfer.group}")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the process in which gloo runs."""
        return self._process.pid

    def start(
        self, buffer: torch.Tensor, spans: Sequence[Span], timeout: float, cancelled: Callable[[], bool]
    ) -> GlooWork:
        work = GlooWork(self, buffer)
        self._waiting.append((work, {"nbytes": buffer.numel(), "spans": spans}))
        if len(self._waiting) == 1:
            self._ask(self._waiting[0][1])
        return work

    def take(self, buffer: torch.Tensor) -> None:
        """Copy the bytes that have arrived to ``buffer``, and order the next bucket."""
        if buffer.numel():
            with mmap.mmap(self._memory, buffer.numel()) as memory:
                received = torch.frombuffer(memory, dtype=torch.uint8)
                buffer.copy_(received)
                del received  # a mapping that is in use cannot be closed
            os.ftruncate(self._memory, 0)
        self._waiting.popleft()
        if self._waiting:
            self._ask(self._waiting[0][1])

    def await_answer(self, timeout: float, cancelled: Callable[[], bool], late: str) -> None:
        """Wait until the process has done what it was asked last."""
        watch(self._answered, timeout, cancelled, late)

    def close(self) -> None:
        """End the process, which ends every transfer at once."""
        if self._memory < 0:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # the process had not read its last order
                    pipe.close()
        self._log.close()
        os.close(self._memory)
        self._memory = -1

    def _ask(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerLost(self._ended()) from None

    def _answered(self) -> bool:
        stdout = self._process.stdout
        assert stdout is not None
        if b"\n" not in self._answers and self._readable.poll(0):
            read = os.read(stdout.fileno(), 1 << 16)
            if not read:
                raise PeerLost(self._ended())
            self._answers += read
        line, newline, rest = self._answers.partition(b"\n")
        if not newline:
            return False
        self._answers = rest
        if error := json.loads(line).get("error", ""):
            raise PeerLost(f"the group {self._group} of the trainer failed: {error}")
        return True

    def _ended(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LAST_WORDS_BYTES))
        last = " ".join(self._log.read().decode(errors="replace").split())
        return f"gloo ended the process that was in the trainer's group {self._group}: {last or 'it said nothing'}"


class GlooWork:
    """A bucket that the process receives."""

    def __init__(self, group: GlooGroup, buffer: torch.Tensor) -> None:
        self._group, self._buffer = group, buffer
        self._done = False

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        if not self._done:
            self._group.await_answer(timeout, cancelled, f"{self._buffer.numel()} bytes were not through gloo")
            self._group.take(self._buffer)
            self._done = True
        return self._buffer

    def cancel(self) -> None:
        if not self._done:
            self._group.close()


def _start(memory: int, log: int) -> subprocess.Popen[bytes]:
    """Start the process, with pipes for orders and answers."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        pass_fds=[memory],
        start_new_session=True,  # a Ctrl-C is this worker's to handle
    )


def split_rendezvous(address: str) -> tuple[str, int]:
    """Return host and port of ``host:port``; an IPv6 host is in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


# The process


def _read_orders(orders: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Read orders until the worker has ended, which ends this process, whatever gloo waits for."""
    for line in sys.stdin.buffer:
        orders.put(json.loads(line))
    os._exit(0)


def _join(order: dict[str, Any]) -> Any:
    """Join the group as torch's own helper does, without its register of names: a name can be used again."""
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

    timeout = timedelta(seconds=order["timeout"])
    host, port = split_rendezvous(order["rendezvous"])
    store: Any = TCPStore(host, port, order["world_size"], False, timeout=timeout)
    for prefix in (order["group"], f"{order['group']}/", "cpu/"):
        store = PrefixStore(prefix, store)
    # Afterwards transfers wait for as long as the worker does.
    return ProcessGroupGloo(store, order["rank"], order["world_size"], timeout=timedelta(days=1))


def _receive(group: Any, memory: int, order: dict[str, Any]) -> None:
    from torch.distributed import BroadcastOptions

    os.ftruncate(memory, order["nbytes"])
    with mmap.mmap(memory, order["nbytes"]) if order["nbytes"] else contextlib.nullcontext(bytearray()) as mapped:
        buffer = torch.frombuffer(mapped, dtype=torch.uint8) if order["nbytes"] else torch.empty(0, dtype=torch.uint8)
        works = [
            group.broadcast([buffer[offset : offset + nbytes]], BroadcastOptions()) for offset, nbytes in order["spans"]
        ]
        for work in works:
            work.wait()
        del buffer, works


def main(memory: int) -> None:
    """Join a group, and receive into ``memory`` what is ordered."""
    torch.set_num_threads(1)
    # gloo of torch 2.10 prints to standard output; that goes to the log, so that answers are alone in their pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read_orders, args=(orders,), name="areal-orders", daemon=True).start()
    group: Any = None
    while True:
        order, answer = orders.get(), {}
        try:
            if group is None:
                group = _join(order)
            else:
                _receive(group, memory, order)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
