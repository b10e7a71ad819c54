"""The worker's link to its engine's endpoint: a thread that lives as long as the worker and never blocks.

It passes each update's messages to a ``Reception``, whose threads do what can block.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any

import zmq

from .. import protocol
from ..config import Settings
from ..integrity import digest
from ..observability.spans import DISABLED, SpanRecorder
from ..protocol import (
    Abort,
    Attach,
    Begin,
    Bucket,
    DigestsTaken,
    DigestWeights,
    GetTrace,
    Prepare,
    Weights,
    WeightsMismatch,
    WeightsTaken,
    WorkerDone,
    WorkerInfo,
    WorkerTrace,
    security,
)
from ..protocol.messages import PeerReport
from ..protocol.peer_messages import EndFetch, EndOffer, FetchWeights, OfferWeights, WorkerOffered
from ..protocol.server import connect
from ..transport.device import device_id
from . import background
from .context import WorkerContext
from .live_weights import WeightsChanged
from .peers import Peers
from .reception import Reception

if TYPE_CHECKING:
    from concurrent.futures import Future

    from .load.intake import Intake
    from .staged_update import StagedUpdate

logger = logging.getLogger("vllm.areal_vllm_ext")

Report = WorkerDone | WeightsMismatch | DigestsTaken | WeightsTaken | WorkerTrace | PeerReport


class Receiver:
    """The worker's link to its engine.

    Attributes:
        context: what all updates of this worker share.
        reception: the update in progress, if any.
        peers: fetches and offers of live weights.
    """

    def __init__(self, worker: Any, endpoint: str, token: str) -> None:
        """Connect and attach. The thread runs until the process ends.

        Args:
            worker: vLLM's worker.
            endpoint: the engine's control address.
            token: shows the engine that this is one of its own workers.
        """
        additional = worker.vllm_config.additional_config
        settings = Settings.load(additional if isinstance(additional, dict) else {})
        host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        own_host = settings.host or security.own_address_toward(host)
        self.context = WorkerContext(worker, self._report)
        self.context.live_weights.on_damage = self._report_damage
        self.context.live_weights.is_busy = self.context.memory.in_use = lambda: self.reception is not None
        self.reception: Reception | None = None
        self.peers = Peers(self.context, own_host, self._report)
        self._max_message_bytes = settings.max_message_mib << 20
        # The last update that began, and its spans.
        self._traced = ("", DISABLED)
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        digest.compile_cpu_kernel()  # starts to compile now, not with the first update
        self._wake_read, self._wake_write = socket.socketpair()
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = connect(
            self._zmq,
            endpoint,
            security.key_for(host, settings.key_file),
            # Random, because a peer with the same identity would take over this connection.
            os.urandom(16),
        )
        self._token = token
        self._info = WorkerInfo(
            rank=self.context.rank,
            node=f"{socket.gethostname()}/{own_host}",
            pid=os.getpid(),
            device=str(self.context.device),
            device_id=device_id(self.context.device),
        )
        threading.Thread(target=self._run, name="areal-receiver", daemon=True).start()

    # Called on the worker's own thread

    def staged(self, update: str) -> StagedUpdate:
        """Return what this worker has staged of ``update``.

        Raises:
            RuntimeError: it has staged nothing of it.
        """
        reception = self.reception
        if reception is None or reception.update != update:
            raise RuntimeError(f"worker {self.context.rank} has no staged weights of update {update}")
        return reception.staged

    def spans(self, update: str) -> SpanRecorder:
        """Return where to record what is done for ``update``, also after its end."""
        return self._traced[1] if self._traced[0] == update else DISABLED

    def discard(self, update: str) -> None:
        """Free the staging of ``update``."""
        reception = self.reception
        if reception is not None and reception.update == update:
            self.reception = None
            memory, staged = self.context.memory, reception.staged
            memory.kept, memory.keeps = staged.buckets, staged.begin.staging.keep
            reception.finish()

    # Called from any thread

    def _report(self, message: Report) -> None:
        self._reports.put(message)
        self._wake_write.send(b"\0")

    def _report_taken(self, learned: Future[Intake]) -> None:
        self._report(WeightsTaken(rank=self.context.rank, weights=learned.result().weights))

    def _report_damage(self, update: str, reason: str) -> None:
        self._report(WeightsMismatch(update=update, rank=self.context.rank, reason=reason))

    # The thread

    def _run(self) -> None:
        self._send(Attach(worker=self._info, token=self._token))
        self.context.learned.add_done_callback(self._report_taken)
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
                    logger.exception("areal_vllm_ext: this worker cannot read a message of its engine's endpoint")
                else:
                    self._handle(message)

    def _send(self, message: Attach | Report) -> None:
        payload = protocol.encoder.encode(message)
        if isinstance(message, WeightsTaken) and len(payload) > self._max_message_bytes:
            problem = f"the names of all tensors are {len(payload) >> 20} MiB: raise AREAL_VLLM_MAX_MESSAGE_MIB"
            unknown = WeightsTaken(rank=message.rank, weights=Weights(tensors=(), error=problem))
            payload = protocol.encoder.encode(unknown)
        if isinstance(message, DigestsTaken) and len(payload) > self._max_message_bytes:
            # The endpoint would close this connection.
            problem = (
                f"digests of {len(payload) >> 20} MiB are more than the engine reads: raise AREAL_VLLM_MAX_MESSAGE_MIB"
            )
            payload = protocol.encoder.encode(DigestsTaken(request=message.request, rank=message.rank, error=problem))
        if isinstance(message, WorkerOffered) and len(payload) > self._max_message_bytes:
            problem = f"its description is {len(payload) >> 20} MiB long: raise AREAL_VLLM_MAX_MESSAGE_MIB"
            payload = protocol.encoder.encode(WorkerOffered(fetch=message.fetch, rank=message.rank, error=problem))
        self._socket.send_multipart([os.urandom(protocol.REQUEST_ID_BYTES), payload])

    def _handle(self, message: protocol.WorkerOrder | protocol.Answer) -> None:
        reception = self.reception
        match message:
            case Begin():
                if reception:
                    reception.cancel()
                self.reception = Reception(self.context, message)
                self._traced = (message.update, self.reception.staged.spans)
            case Bucket() | Prepare():
                if reception and reception.update == message.update:
                    reception.put(message)
            case DigestWeights():
                # Not on this thread: reading all weights takes long.
                background.run(self._digest, message)
            case OfferWeights() | EndOffer() | FetchWeights() | EndFetch():
                self.peers.order(message)
            case GetTrace():
                spans = self.spans(message.update).snapshot()
                self._send(WorkerTrace(update=message.update, rank=self.context.rank, now=monotonic(), spans=spans))
            case Abort():
                if reception and reception.update == message.update:
                    self.reception, self.context.memory.keeps = None, False
                    reception.cancel()
            case protocol.Error():
                logger.error("areal_vllm_ext: the engine refuses worker %d: %s", self.context.rank, message.message)

    def _digest(self, order: DigestWeights) -> None:
        weights, error, busy = None, "", False
        try:
            with background.on_side_stream(self.context.device):
                weights = self.context.live_weights.describe(order.contents)
        except WeightsChanged as changed:
            error, busy = str(changed), True
        except Exception as problem:
            logger.warning("areal_vllm_ext: no digests of the live weights could be taken", exc_info=True)
            error = f"{type(problem).__name__}: {problem}"
        self._report(
            DigestsTaken(request=order.request, rank=self.context.rank, weights=weights, error=error, busy=busy)
        )
