"""Receives weights into staging while the worker generates.

``Receiver`` is a thread that lives as long as the worker: it talks to the engine's endpoint and never blocks. Each update
gets an ``Intake``, a thread of its own that does what can block (joining a communicator, receiving, reading files): when
a sender dies, that thread ends by its deadline, and neither the worker nor the next update waits for it.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from time import monotonic
from typing import Any

import torch
import zmq

from .. import checkpoint, protocol, security, wire
from ..config import Settings
from ..protocol import Abort, Attach, Begin, Bucket, Prepare, TensorMeta, WorkerDone, WorkerInfo
from ..transport import Cancelled, Source, open_source
from ..transport.buckets import unpack

logger = logging.getLogger("vllm.areal_vllm_ext")


# Trainers that take turns each keep their connection, so many at most.
_KEPT_SOURCES = 4


class Intake:
    """One update's way into staging."""

    def __init__(self, receiver: Receiver, begin: Begin) -> None:
        self.begin = begin
        self.tensors: dict[str, torch.Tensor] = {}
        self._receiver = receiver
        self._orders: queue.SimpleQueue[Bucket | Prepare | None] = queue.SimpleQueue()
        self._ends = monotonic() + begin.timeout
        self._cancelled = threading.Event()
        self._received = 0
        self._thread = threading.Thread(target=self._run, name=f"areal-intake-{begin.update[:8]}", daemon=True)
        self._thread.start()

    def put(self, order: Bucket | Prepare) -> None:
        self._orders.put(order)

    def cancel(self) -> None:
        """Give up: whatever blocks is left alone, and its result thrown away."""
        self._cancelled.set()
        self.finish()

    def finish(self) -> None:
        """End the thread, and free the staging; the connection to the sender stays for the next update."""
        self._orders.put(None)
        self.tensors = {}

    def _run(self) -> None:
        step = "begin"
        source: Source | None = None
        try:
            source = self._receiver.source(self.begin.transfer, self._ends - monotonic(), self._cancelled)
            self._report(step)
            while (order := self._next()) is not None:
                if isinstance(order, Prepare):
                    step = "prepare"
                    self._check(source, order)
                else:
                    step = f"bucket {order.index}"
                    buffer = source.receive(order, self._ends - monotonic(), self._cancelled)
                    self.tensors.update(unpack(order.segments, buffer))
                    self._received += 1
                self._report(step)
        except Cancelled:
            self._receiver.drop(source)
        except Exception as error:
            logger.warning("areal_vllm_ext: update %s failed in step %s", self.begin.update, step, exc_info=True)
            self._receiver.drop(source)
            if not self._cancelled.is_set():
                self._report(step, f"{step}: {type(error).__name__}: {error}")
        finally:
            if self._cancelled.is_set():
                self.tensors.clear()

    def _next(self) -> Bucket | Prepare | None:
        try:
            return self._orders.get(timeout=max(self._ends - monotonic(), 0.0))
        except queue.Empty:
            # Over its time: the engine has given this update up as well. Prepared weights are the engine's to discard.
            return None

    def _check(self, source: Source, order: Prepare) -> None:
        """Vote: is everything here that a load needs? Raises where it is not."""
        for name, tensor in source.load_all():
            self.tensors[name] = tensor
        if self._received != order.buckets:
            raise RuntimeError(f"{order.buckets} buckets were sent, {self._received} arrived")
        expected = self._receiver.expected()
        if expected is not None:
            dtypes = (self._receiver.dtype,)
            for name, tensor in self.tensors.items():
                meta = TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                if problem := checkpoint.misfit(meta, expected, dtypes):
                    raise ValueError(problem)
            if problem := checkpoint.missing(self.tensors, expected):
                raise ValueError(problem)
        if source.unchecked:
            for name, tensor in self.tensors.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"{name} holds NaN or infinite values")

    def _report(self, step: str, error: str = "") -> None:
        self._receiver.report(WorkerDone(update=self.begin.update, rank=self._receiver.rank, step=step, error=error))


class Receiver:
    """The worker's link to its engine."""

    def __init__(self, worker: Any, endpoint: str, token: str) -> None:
        """Connect and attach; the thread runs until the process ends.

        Args:
            worker: vLLM's worker.
            endpoint: the engine's control address.
            token: shows the engine that this is a worker of its own.
        """
        config = worker.vllm_config
        additional = config.additional_config if isinstance(config.additional_config, dict) else {}
        settings = Settings.load(additional)
        host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        self.rank: int = worker.rank
        self.device: torch.device = torch.device(worker.device)
        self.dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.own_host = settings.host or security.own_address_toward(host)
        self._model = (config.model_config.model, config.model_config.revision)
        self._expected: dict[str, TensorMeta] | None = None
        self._sources: list[tuple[protocol.Transfer, Source]] = []
        self._sources_lock = threading.Lock()
        self._intake: Intake | None = None
        self._reports: queue.SimpleQueue[WorkerDone] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = wire.connect(
            self._context,
            endpoint,
            security.key_for(host, settings.key_file),
            # Not to be guessed: a peer of the same name would take this one's connection over.
            os.urandom(16),
        )
        self._token = token
        self._info = WorkerInfo(
            rank=self.rank,
            node=f"{socket.gethostname()}/{self.own_host}",
            pid=os.getpid(),
            device=str(self.device),
            device_id=device_id(self.device),
        )
        threading.Thread(target=self._run, name="areal-receiver", daemon=True).start()

    # Called from the worker's own thread

    def staged(self, update: str) -> list[tuple[str, torch.Tensor]]:
        """The staged tensors of ``update``.

        Raises:
            RuntimeError: where this worker did not stage it.
        """
        intake = self._intake
        if intake is None or intake.begin.update != update:
            raise RuntimeError(f"worker {self.rank} has no staged weights of update {update}")
        return list(intake.tensors.items())

    def discard(self, update: str) -> None:
        """Free the staging of ``update``."""
        intake = self._intake
        if intake is not None and intake.begin.update == update:
            self._intake = None
            intake.finish()

    # Called from intakes

    def source(self, transfer: protocol.Transfer, timeout: float, cancelled: threading.Event) -> Source:
        """The worker's end of ``transfer``; kept from one update to the next where the transport allows it."""
        with self._sources_lock:
            for known, source in self._sources:
                if known == transfer:
                    return source
        source = open_source(transfer, self, timeout, cancelled)
        if cancelled.is_set():
            source.close()
            raise Cancelled
        if source.reusable:
            with self._sources_lock:
                self._sources.append((transfer, source))
                outdated, self._sources = self._sources[:-_KEPT_SOURCES], self._sources[-_KEPT_SOURCES:]
            for _, old in outdated:
                old.close()
        return source

    def drop(self, source: Source | None) -> None:
        """Close a source that failed: the next update opens a new one."""
        with self._sources_lock:
            self._sources = [entry for entry in self._sources if entry[1] is not source]
        if source is not None:
            source.close()

    def expected(self) -> dict[str, TensorMeta] | None:
        """The checkpoint that this engine was started from, or None where it cannot be told."""
        if self._expected is None:
            try:
                self._expected = {tensor.name: tensor for tensor in checkpoint.describe(*self._model)}
            except checkpoint.NotACheckpoint as error:
                logger.warning("areal_vllm_ext: names and shapes of incoming weights cannot be checked: %s", error)
                return None
        return self._expected

    def report(self, message: WorkerDone) -> None:
        self._reports.put(message)
        self._wake_write.send(b"\0")

    # The thread

    def _run(self) -> None:
        self._send(Attach(worker=self._info, token=self._token))
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_read.fileno(), zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
                while not self._reports.empty():
                    self._send(self._reports.get())
            if self._socket in ready:
                try:
                    message = protocol.worker_decoder.decode(self._socket.recv_multipart()[-1])
                except protocol.UNREADABLE:
                    logger.exception("areal_vllm_ext: the engine's endpoint sent what this worker cannot read")
                else:
                    self._handle(message)

    def _send(self, message: Attach | WorkerDone) -> None:
        self._socket.send_multipart([os.urandom(protocol.REQUEST_ID_BYTES), protocol.encoder.encode(message)])

    def _handle(self, message: protocol.WorkerOrder | protocol.Answer) -> None:
        intake = self._intake
        match message:
            case Begin():
                if intake:
                    intake.cancel()
                self._intake = Intake(self, message)
            case Bucket() | Prepare():
                if intake and intake.begin.update == message.update:
                    intake.put(message)
            case Abort():
                if intake and intake.begin.update == message.update:
                    self._intake = None
                    intake.cancel()
            case protocol.Error():
                logger.error("areal_vllm_ext: the engine refuses worker %d: %s", self.rank, message.message)


def device_id(device: torch.device) -> str:
    """A name of the device that trainer and worker agree on: the GPU's UUID, or ``cpu``."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
