"""Broadcast: the trainer is rank 0 and sends bucket after bucket to all workers, by NCCL between GPUs and by TCP otherwise.

Every wait can be given up, from the first handshake on: a transfer is started, watched and, when its time is over or the
update is cancelled, aborted (NCCL) or shut down (TCP).
"""

from __future__ import annotations

import contextlib
import sys
import uuid
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch

from ..protocol import Broadcast, Bucket
from . import host_memory, nccl, tcp_connect
from .base import Cancelled, watch
from .tcp import TcpBroadcast

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from . import buckets
    from .base import Work, WorkerSite


class Communicator(Protocol):
    """One rank of a communicator whose rank 0 broadcasts."""

    @property
    def device(self) -> torch.device: ...

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        """Start to send (rank 0) or receive ``buffer``, after the buffers that were started before.

        Raises:
            Cancelled: ``cancelled()`` became true.
            TimeoutError: it took longer than ``timeout`` seconds.
        """
        ...

    def close(self) -> None: ...


class NcclCommunicator:
    """A communicator of NCCL, separate from all others of the process, on a stream of its own."""

    def __init__(
        self,
        unique_id: str,
        rank: int,
        size: int,
        device: torch.device,
        timeout: float,
        cancelled: Callable[[], bool],
    ) -> None:
        """Join the other ranks at ``unique_id``.

        Raises:
            Cancelled: ``cancelled()`` became true.
            TimeoutError: not all ranks joined within ``timeout`` seconds.
        """
        self.device = device
        with torch.cuda.device(device), _launch_environment():
            self._stream = torch.cuda.Stream(device)
            self._comm = nccl.load().join(unique_id, rank, size)
            try:
                watch(self._comm.settled, timeout, cancelled, f"not all of {size} ranks joined NCCL's communicator")
            except BaseException:
                self._comm.abort()
                raise

    def start(self, buffer: torch.Tensor, timeout: float, cancelled: Callable[[], bool]) -> Work:
        with torch.cuda.device(self.device):
            self._stream.wait_stream(torch.cuda.current_stream())
            buffer.record_stream(self._stream)  # after an abort, torch does not reuse it before its kernel has ended
            try:
                self._comm.broadcast(buffer.data_ptr(), buffer.numel(), self._stream.cuda_stream)
                # The first broadcast connects to the peers on a thread of NCCL's. Only then it is on the stream.
                watch(
                    self._comm.settled, timeout, cancelled, f"NCCL could not start to broadcast {buffer.numel()} bytes"
                )
            except BaseException:
                self._comm.abort()
                raise
            done = torch.cuda.Event()
            done.record(self._stream)
        return NcclBroadcast(self._comm, done, buffer)

    def close(self) -> None:
        self._comm.abort()


class NcclBroadcast:
    """A broadcast in flight. To give it up is to abort its communicator, and everything that was started there."""

    def __init__(self, comm: nccl.Communicator, done: torch.cuda.Event, buffer: torch.Tensor) -> None:
        self._comm, self._done, self._buffer = comm, done, buffer

    def wait(self, timeout: float, cancelled: Callable[[], bool]) -> torch.Tensor:
        try:
            late = f"{self._buffer.numel()} bytes were not through NCCL"
            watch(lambda: self._comm.settled() and self._done.query(), timeout, cancelled, late)
        except BaseException:
            self._comm.abort()
            raise
        return self._buffer

    def cancel(self) -> None:
        self._comm.abort()


def _launch_environment() -> contextlib.AbstractContextManager[None]:
    """Return a context without the NCCL variables that vLLM sets for its own communicators, as in a trainer's process.

    vLLM is not imported for this, which takes seconds: if its module is not loaded yet, it has set nothing.
    """
    unpinned = getattr(sys.modules.get("vllm.utils.nccl"), "unpinned_nccl_env", contextlib.nullcontext)
    environment: contextlib.AbstractContextManager[None] = unpinned()
    return environment


class BroadcastSource:
    """The worker's end."""

    reusable = True
    unchecked = False
    sharing = None
    nbytes = 0

    def __init__(self, transfer: Broadcast, site: WorkerSite, timeout: float, cancelled: threading.Event) -> None:
        """Join the trainer's communicator within ``timeout`` seconds.

        Raises:
            Cancelled: the update was given up meanwhile.
            TimeoutError: it took longer.
            RuntimeError: the trainer cannot be reached.
        """
        rank = transfer.ranks[site.rank]
        self._communicator: Communicator
        if transfer.backend == "nccl":
            self._communicator = NcclCommunicator(
                transfer.rendezvous, rank, transfer.world_size, site.device, timeout, cancelled.is_set
            )
        else:
            connection = tcp_connect.connect(
                transfer.rendezvous, transfer.communicator, rank, timeout, cancelled.is_set
            )
            self._communicator = TcpBroadcast.from_trainer(connection)

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
    """The trainer's end: opens the rendezvous, then joins as rank 0."""

    # One bucket in flight, one that waits for it, one that is being filled.
    slots = 3
    announced_is_sent = False
    sharing = None

    def __init__(
        self,
        backend: str,
        members: Mapping[str, Sequence[int]],
        host: str,
        device: torch.device,
        bucket_bytes: int,
        timeout: float,
    ) -> None:
        """Assign ranks and open the rendezvous.

        Args:
            backend: ``tcp`` or ``nccl``.
            members: the ranks of each engine's workers inside the engine, by the engine's name.
            host: this machine's address that every worker reaches.
            device: the trainer's device (NCCL).
            bucket_bytes: size of a bucket.
            timeout: seconds to connect to all workers.
        """
        self.bucket_bytes = bucket_bytes
        self.filled: dict[int, buckets.Bucket] = {}
        self._device, self._timeout = device, timeout
        self._listener = None if backend == "nccl" else tcp_connect.Listener(host)
        self._communicator: Communicator | None = None
        self._buffers: dict[int, torch.Tensor] = {}
        rendezvous = self._listener.address if self._listener else nccl.load().unique_id()
        token = uuid.uuid4().hex
        self._workers = dict(
            enumerate((f"worker {rank} of {name}" for name, ranks in members.items() for rank in ranks), 1)
        )
        numbers = iter(self._workers)
        self.transfers = [
            Broadcast(
                backend="tcp" if self._listener else "nccl",
                communicator=token,
                world_size=1 + len(self._workers),
                ranks={rank: next(numbers) for rank in ranks},
                rendezvous=rendezvous,
            )
            for ranks in members.values()
        ]

    def connect(self, opening: Future[None]) -> None:
        if self._communicator is not None:
            return

        def failed() -> bool:
            return opening.done() and (opening.cancelled() or opening.exception() is not None)

        transfer = self.transfers[0]
        try:
            if self._listener is None:
                self._communicator = NcclCommunicator(
                    transfer.rendezvous, 0, transfer.world_size, self._device, self._timeout, failed
                )
            else:
                sockets = self._listener.accept_all(transfer.communicator, self._workers, self._timeout, failed)
                self._communicator = TcpBroadcast.to_workers(sockets, self._workers)
        except Cancelled:
            opening.result()  # the engine that could not connect says why
            raise
        opening.result()
        self.transfers = [msgspec.structs.replace(transfer, established=True) for transfer in self.transfers]

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
        if self._listener is not None:
            self._listener.close()
        if self._communicator is not None:
            with contextlib.suppress(Exception):
                self._communicator.close()
            self._communicator = None
