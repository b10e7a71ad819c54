"""Broadcast: the trainer is rank 0 of a communicator (gloo on CPU, NCCL on GPUs) and broadcasts bucket after bucket.

Every wait here can be given up, from the first handshake on: a collective cannot be interrupted, so it is started, watched
and, when its time is over or the update is, aborted (NCCL) or left to its own deadline on a list of the abandoned (gloo).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import sys
import threading
import uuid
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from ..process.file_limit import raise_file_limit
from ..protocol import Broadcast, Bucket
from . import host_memory, nccl
from .base import watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from . import buckets
    from .base import Work, WorkerSite


class Communicator(Protocol):
    """One rank of a communicator whose rank 0 broadcasts."""

    device: torch.device

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        """Send (rank 0) or receive ``buffer``, after what was started before.

        Raises:
            Cancelled: ``cancelled()`` became true. TimeoutError: it took longer than ``timeout`` seconds.
        """
        ...

    def close(self) -> None: ...


# Unfinished collectives of gloo communicators that were given up. Freeing one blocks until its own deadline, so they are
# kept until they have failed by themselves.
_abandoned: list[tuple[Any, Any, torch.Tensor]] = []
_abandoned_lock = threading.Lock()


def _free_abandoned() -> None:
    """Free what has failed by now. Freeing a group lets other threads run: it is out of the list, and of the lock, by then."""
    with _abandoned_lock:
        failed = [entry for entry in _abandoned if entry[1].is_completed()]
        kept = [entry for entry in _abandoned if not any(entry is one for one in failed)]
        _abandoned[:] = kept
    del failed


class GlooCommunicator:
    """gloo, over TCP between the addresses that each rank names."""

    def __init__(self, store: dist.Store, communicator: str, rank: int, size: int, host: str, timeout: float) -> None:
        """Meet the other ranks at ``store``; blocks for ``timeout`` seconds at most."""
        _free_abandoned()
        self.device = torch.device("cpu")
        # torch has no public way to choose the address that gloo listens on.
        options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
        options._timeout = timedelta(seconds=timeout)  # noqa: SLF001
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
        self._group: Any = dist.ProcessGroupGloo(dist.PrefixStore(communicator, store), rank, size, options)

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=max(timeout, 0.01) + 1)  # later than ours, which says more
        return GlooBroadcast(self._group, self._group.broadcast([buffer], options), buffer)

    def close(self) -> None:
        self._group = None


class GlooBroadcast:
    """One that was started."""

    def __init__(self, group: Any, work: Any, buffer: torch.Tensor) -> None:
        self._group, self._work, self._buffer = group, work, buffer

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        try:
            watch(self._work.is_completed, timeout, cancelled)
        except BaseException:
            self.cancel()
            raise
        self._work.wait()
        return self._buffer

    def cancel(self) -> None:
        if not self._work.is_completed():
            with _abandoned_lock:
                _abandoned.append((self._group, self._work, self._buffer))


class NcclCommunicator:
    """NCCL: a communicator apart from every other of the process, on a stream of its own."""

    def __init__(
        self,
        unique_id: str,
        rank: int,
        size: int,
        device: torch.device,
        timeout: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Meet the other ranks at ``unique_id``.

        Raises:
            Cancelled: ``cancelled()`` became true. TimeoutError: they did not all come within ``timeout`` seconds.
        """
        self.device = device
        with torch.cuda.device(device), _launch_environment():
            self._stream = torch.cuda.Stream(device)
            self._comm = nccl.load().join(unique_id, rank, size)
            try:
                watch(self._comm.settled, timeout, cancelled)
            except BaseException:
                self._comm.abort()
                raise

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            buffer.record_stream(self._stream)  # freed after an abort, it is not used again before its kernel has ended
            try:
                self._comm.broadcast(buffer.data_ptr(), buffer.numel(), self._stream.cuda_stream)
                # The first one connects to the peers, on a thread of NCCL's: only then is it on the stream.
                watch(self._comm.settled, timeout, cancelled)
            except BaseException:
                self._comm.abort()
                raise
            done = torch.cuda.Event()
            done.record(self._stream)
        return NcclBroadcast(self._comm, done, buffer)

    def close(self) -> None:
        self._comm.abort()


class NcclBroadcast:
    """One that was started. Where it is given up its communicator is, and with it all that was started there."""

    def __init__(self, comm: nccl.Communicator, done: torch.cuda.Event, buffer: torch.Tensor) -> None:
        self._comm, self._done, self._buffer = comm, done, buffer

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        try:
            watch(lambda: self._comm.settled() and self._done.query(), timeout, cancelled)
        except BaseException:
            self._comm.abort()
            raise
        return self._buffer

    def cancel(self) -> None:
        self._comm.abort()


def _launch_environment() -> contextlib.AbstractContextManager[None]:
    """Where vLLM has set NCCL variables for its own communicators: without them, as in a trainer's process.

    Not imported: a trainer would wait seconds for vLLM, and where this module is not there yet, nothing was set.
    """
    unpinned = getattr(sys.modules.get("vllm.utils.nccl"), "unpinned_nccl_env", contextlib.nullcontext)
    environment: contextlib.AbstractContextManager[None] = unpinned()
    return environment


def _close_joined(joining: Future[Communicator]) -> None:
    """A meeting that was given up may still come about."""
    if joining.exception() is None:
        joining.result().close()


class BroadcastSource:
    """The worker's end."""

    reusable = True
    unchecked = False
    sharing = None
    nbytes = 0

    def __init__(self, transfer: Broadcast, site: WorkerSite, timeout: float, cancelled: threading.Event) -> None:
        """Join the trainer's communicator; blocks for ``timeout`` seconds at most."""
        rank = transfer.ranks[site.rank]
        self._communicator: Communicator
        if transfer.backend == "nccl":
            self._communicator = NcclCommunicator(
                transfer.rendezvous, rank, transfer.world_size, site.device, timeout, cancelled.is_set
            )
        else:
            host, _, port = transfer.rendezvous.rpartition(":")
            # TCPStore tries again for longer than it is told to, and says less of the cause.
            try:
                socket.create_connection((host, int(port)), timeout=max(timeout, 0.01)).close()
            except OSError as error:
                raise RuntimeError(f"the trainer cannot be met at {transfer.rendezvous}: {error}") from None
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout))
            self._communicator = GlooCommunicator(
                store, transfer.communicator, rank, transfer.world_size, site.own_host, timeout
            )

    @property
    def device(self) -> torch.device:
        return self._communicator.device

    def start(self, bucket: Bucket, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        return self._communicator.start(buffer, timeout, cancelled)

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        self._communicator.close()


class BroadcastSink:
    """The trainer's end: opens the meeting point, then joins as rank 0."""

    # One on the wire, one that waits for it, one that is filled.
    slots = 3
    announced_is_sent = False
    sharing = None

    def __init__(
        self, backend: str, members: list[list[int]], host: str, device: torch.device, bucket_bytes: int, timeout: float
    ) -> None:
        """Choose ranks and a meeting point.

        Args:
            backend: ``gloo`` or ``nccl``.
            members: for each engine, the ranks of its workers inside the engine.
            host: address of this machine that every worker reaches.
            device: the trainer's device (NCCL).
            bucket_bytes: size of a bucket.
            timeout: seconds for the meeting.
        """
        self.bucket_bytes = bucket_bytes
        self.filled: dict[int, buckets.Bucket] = {}
        self._host, self._device, self._timeout = host, device, timeout
        self._door: dist.TCPStore | None = None
        self._communicator: Communicator | None = None
        self._buffers: dict[int, torch.Tensor] = {}
        rendezvous = nccl.load().unique_id() if backend == "nccl" else self._open_door()
        name = uuid.uuid4().hex
        size = 1 + sum(len(ranks) for ranks in members)
        self.transfers: list[Broadcast] = []
        next_rank = 1
        for ranks in members:
            assigned = {rank: next_rank + place for place, rank in enumerate(ranks)}
            next_rank += len(ranks)
            self.transfers.append(
                Broadcast(
                    backend="nccl" if backend == "nccl" else "gloo",
                    communicator=name,
                    world_size=size,
                    ranks=assigned,
                    rendezvous=rendezvous,
                )
            )

    def _open_door(self) -> str:
        raise_file_limit()  # connections of strangers count against the trainer's limit too
        # On the one address that the workers use, not on all of this machine.
        listener = socket.create_server(
            (self._host, 0), family=socket.AF_INET6 if ":" in self._host else socket.AF_INET
        )
        port = listener.getsockname()[1]
        self._door = dist.TCPStore(
            self._host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout),
            master_listen_fd=listener.detach(),
        )
        return f"{self._host}:{port}"

    def meet(self, opening: Future[None]) -> None:
        if self._communicator is not None:
            return
        # Joining takes until the last worker has come: on a thread, so that a worker that says no is heard at once.
        joining: Future[Communicator] = Future()
        given_up = threading.Event()
        threading.Thread(target=self._join, args=(joining, given_up), name="areal-join", daemon=True).start()
        try:
            while not joining.done():
                if opening.done():
                    opening.result()
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    joining.result(timeout=0.005)
            opening.result()
            self._communicator = joining.result()
        except BaseException:
            given_up.set()
            joining.add_done_callback(_close_joined)
            raise
        self._door = None  # all have met: nobody else gets in
        self.transfers = [msgspec.structs.replace(transfer, established=True) for transfer in self.transfers]

    def _join(self, joining: Future[Communicator], given_up: threading.Event) -> None:
        """Meet the workers. gloo cannot be interrupted: where the meeting is given up, its thread ends by its time-out."""
        transfer = self.transfers[0]
        made: Communicator
        try:
            if self._door is None:
                made = NcclCommunicator(
                    transfer.rendezvous, 0, transfer.world_size, self._device, self._timeout, given_up.is_set
                )
            else:
                # The group keeps its store for life: a guest of the door, so that the door can be closed.
                guest = dist.TCPStore(
                    self._host, self._door.port, is_master=False, timeout=timedelta(seconds=self._timeout)
                )
                made = GlooCommunicator(guest, transfer.communicator, 0, transfer.world_size, self._host, self._timeout)
        except Exception as error:
            joining.set_exception(error)
            return
        joining.set_result(made)

    def buffer(self, index: int, nbytes: int) -> tuple[int, torch.Tensor]:
        assert self._communicator is not None
        slot = index % self.slots
        if slot not in self._buffers or self._buffers[slot].numel() < nbytes:
            self.filled.clear()  # their views would keep the smaller buffer
            device = self._communicator.device
            self._buffers[slot] = (
                host_memory.zeros(nbytes)
                if device.type == "cpu"
                else torch.empty(nbytes, dtype=torch.uint8, device=device)
            )
        return 0, self._buffers[slot][:nbytes]

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        assert self._communicator is not None
        return self._communicator.start(buffer, timeout, cancelled)

    def release(self) -> None:
        self.filled.clear()
        self._buffers.clear()

    def close(self) -> None:
        self.release()
        self._door = None
        if self._communicator is not None:
            with contextlib.suppress(Exception):
                self._communicator.close()
            self._communicator = None
