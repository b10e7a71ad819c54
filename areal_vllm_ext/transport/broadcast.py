"""Broadcast: the trainer is rank 0 of a communicator (gloo on CPU, NCCL on GPUs) and broadcasts bucket after bucket.

Every wait here can be given up: a collective cannot be interrupted, so it is started, watched and, when its time is over
or the update is, aborted (NCCL) or left to its own deadline on a list of the abandoned (gloo).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import threading
import time
import uuid
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from ..protocol import Broadcast, Bucket
from . import Cancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..worker.receiver import Receiver


class Communicator(Protocol):
    """One rank of a communicator whose rank 0 broadcasts."""

    device: torch.device

    def broadcast(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> None:
        """Send (rank 0) or receive ``buffer``; returns when it is done.

        Raises:
            Cancelled: ``cancelled()`` became true. TimeoutError: it took longer than ``timeout`` seconds.
        """
        ...

    def close(self) -> None: ...


def _watch(done: Callable[[], bool], timeout: float, cancelled: Callable[[], bool]) -> None:
    ends = time.monotonic() + timeout
    pause = 2e-5
    while not done():
        if cancelled():
            raise Cancelled
        if time.monotonic() > ends:
            raise TimeoutError(f"the other side was silent for {timeout:.1f} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 1e-3)


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

    def broadcast(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = timedelta(seconds=max(timeout, 0.01) + 1)  # later than ours, which says more
        work = self._group.broadcast([buffer], options)
        try:
            _watch(work.is_completed, timeout, cancelled)
        except BaseException:
            with _abandoned_lock:
                _abandoned.append((self._group, work, buffer))
            raise
        work.wait()

    def close(self) -> None:
        self._group = None


class NcclCommunicator:
    """NCCL, through vLLM's own binding: a communicator apart from every other of the process."""

    def __init__(self, unique_id: str, rank: int, size: int, device: torch.device) -> None:
        nccl = _nccl()
        self._nccl = nccl
        self.device = device
        identifier = nccl.unique_id_from_bytes(bytes.fromhex(unique_id))
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._comm: Any = nccl.ncclCommInitRank(size, identifier, rank)

    def broadcast(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> None:
        from vllm.distributed.device_communicators.pynccl_wrapper import buffer_type, cudaStream_t, ncclDataTypeEnum

        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            address = buffer_type(buffer.data_ptr())
            self._nccl.ncclBroadcast(
                address,
                address,
                buffer.numel(),
                ncclDataTypeEnum.ncclUint8,
                0,
                self._comm,
                cudaStream_t(self._stream.cuda_stream),
            )
            done = torch.cuda.Event()
            done.record(self._stream)
            try:
                _watch(done.query, timeout, cancelled)
            except BaseException:
                self._nccl.ncclCommAbort(self._comm)
                self._comm = None
                raise

    def close(self) -> None:
        # Abort, not destroy: destroy waits for the other ranks, and one may be dead.
        if self._comm is not None:
            self._nccl.ncclCommAbort(self._comm)
            self._comm = None


def _nccl() -> Any:
    try:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    except ImportError as error:
        raise RuntimeError(f"NCCL needs vLLM's binding of it in this environment too ({error}): install vllm") from None
    return NCCLLibrary()


class BroadcastSource:
    """The worker's end."""

    reusable = True
    unchecked = False
    nbytes = 0

    def __init__(self, transfer: Broadcast, receiver: Receiver, timeout: float, cancelled: threading.Event) -> None:
        """Join the trainer's communicator; blocks for ``timeout`` seconds at most."""
        rank = transfer.ranks[receiver.rank]
        self._communicator: Communicator
        if transfer.backend == "nccl":
            self._communicator = NcclCommunicator(transfer.rendezvous, rank, transfer.world_size, receiver.device)
        else:
            host, _, port = transfer.rendezvous.rpartition(":")
            # TCPStore tries again for longer than it is told to, and says less of the cause.
            try:
                socket.create_connection((host, int(port)), timeout=max(timeout, 0.01)).close()
            except OSError as error:
                raise RuntimeError(f"the trainer cannot be met at {transfer.rendezvous}: {error}") from None
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout))
            self._communicator = GlooCommunicator(
                store, transfer.communicator, rank, transfer.world_size, receiver.own_host, timeout
            )

    def receive(self, bucket: Bucket, timeout: float, cancelled: threading.Event) -> torch.Tensor:
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._communicator.device)
        self._communicator.broadcast(buffer, timeout, cancelled.is_set)
        return buffer

    def load_all(self) -> Iterable[tuple[str, torch.Tensor]]:
        return ()

    def close(self) -> None:
        self._communicator.close()


class BroadcastSink:
    """The trainer's end: opens the meeting point, then joins as rank 0."""

    slots = 2

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
        self._host, self._device, self._timeout = host, device, timeout
        self._door: dist.TCPStore | None = None
        self._communicator: Communicator | None = None
        self._buffers: dict[int, torch.Tensor] = {}
        rendezvous = bytes(_nccl().ncclGetUniqueId().internal).hex() if backend == "nccl" else self._open_door()
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
        # Joining blocks until the last worker has come: on a thread, so that a worker that says no is heard at once. The
        # thread of a meeting that failed ends by its own time-out.
        joining: Future[Communicator] = Future()
        threading.Thread(target=self._join, args=(joining,), name="areal-join", daemon=True).start()
        while not joining.done():
            if opening.done() and (error := opening.exception()) is not None:
                raise error
            with contextlib.suppress(concurrent.futures.TimeoutError):
                joining.result(timeout=0.005)
        self._communicator = joining.result()
        opening.result()
        self._door = None  # all have met: nobody else gets in

    def _join(self, joining: Future[Communicator]) -> None:
        transfer = self.transfers[0]
        try:
            if self._door is None:
                joining.set_result(NcclCommunicator(transfer.rendezvous, 0, transfer.world_size, self._device))
            else:
                # The group keeps its store for life: a guest of the door, so that the door can be closed.
                guest = dist.TCPStore(
                    self._host, self._door.port, is_master=False, timeout=timedelta(seconds=self._timeout)
                )
                joining.set_result(
                    GlooCommunicator(guest, transfer.communicator, 0, transfer.world_size, self._host, self._timeout)
                )
        except Exception as error:
            joining.set_exception(error)

    def buffer(self, index: int, nbytes: int) -> tuple[int, torch.Tensor]:
        assert self._communicator is not None
        slot = index % self.slots
        if slot not in self._buffers or self._buffers[slot].numel() < nbytes:
            self._buffers[slot] = torch.empty(nbytes, dtype=torch.uint8, device=self._communicator.device)
        return 0, self._buffers[slot][:nbytes]

    def push(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> None:
        assert self._communicator is not None
        self._communicator.broadcast(buffer, timeout, cancelled)

    def release(self) -> None:
        self._buffers.clear()

    def close(self) -> None:
        self.release()
        self._door = None
        if self._communicator is not None:
            with contextlib.suppress(Exception):
                self._communicator.close()
            self._communicator = None
