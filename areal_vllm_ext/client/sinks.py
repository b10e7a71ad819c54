"""``Sinks``: the cached sending end of a trainer's connection, and what the trainer sent last."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

from ..config import split_address
from ..protocol import security
from ..transport.base import Cancelled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ..integrity.digest import Contents
    from ..protocol import EngineInfo, TensorMeta, Weights
    from ..transport.base import Sink
    from .lora import SentAdapter


class Sinks:
    """State that one update leaves to the next.

    One update at a time may use it, from ``begin`` to ``end``. The thread of an update that was cancelled may still run, and
    must not touch the connections of the next one.

    Attributes:
        sent: digests sent by this group's last update. The next update skips tensors that have not changed.
        sent_manifest: the manifest of ``sent``.
        said_kept: whether it was logged that updates leave the engines' drafter as it is.
        adapters: those that this group's updates brought, by name, for engines that come back without them.
        described: what an engine takes, the bytes of these tensors and of the largest, by the engine's incarnation.
        peer_ipc_failed: set after CUDA IPC to another GPU failed once; later updates use NCCL.
    """

    def __init__(self) -> None:
        self.sent: Contents = {}
        self.sent_manifest = ""
        self.said_kept = False
        self.adapters: dict[str, SentAdapter] = {}
        self.described: dict[str, tuple[Weights, int, int]] = {}
        self.peer_ipc_failed = False
        self._cached: tuple[tuple[Any, ...], Sink] | None = None
        self._user: object = None
        self._lock = threading.Lock()

    def begin(self, user: object) -> None:
        """Let ``user`` open and drop sinks from now on, and no other update."""
        with self._lock:
            self._user = user

    def end(self, user: object) -> None:
        """Let ``user`` open and drop no more sinks."""
        with self._lock:
            if self._user is user:
                self._user = None

    @property
    def sink(self) -> Sink | None:
        """The cached sending end of an earlier update."""
        return self._cached[1] if self._cached else None

    def cached(self, engines: Mapping[str, EngineInfo]) -> tuple[str, torch.device] | None:
        """Return transport and device of the cached sending end, if it goes to these engines."""
        if self._cached is None:
            return None
        kind, device, _, *incarnations = self._cached[0]
        return (kind, device) if incarnations == [engine.incarnation for engine in engines.values()] else None

    def open(
        self,
        user: object,
        kind: str,
        engines: Mapping[str, EngineInfo],
        device: torch.device,
        bucket_bytes: int,
        expected: Sequence[TensorMeta],
        timeout: float,
    ) -> Sink:
        """Return the sending end to ``engines``: the cached one if nothing has changed since.

        Raises:
            Cancelled: the update of ``user`` is over.
        """
        key = (kind, device, bucket_bytes, *(engine.incarnation for engine in engines.values()))
        with self._lock:
            self._check(user)
            if self._cached is not None and self._cached[0] == key:
                return self._cached[1]
        self.drop(user)
        made = make_sink(kind, engines, device, bucket_bytes, expected, timeout)
        with self._lock:
            try:
                self._check(user)
            except Cancelled:
                made.close()
                raise
            self._cached = key, made
        return made

    def drop(self, user: object = None) -> None:
        """Close the cached sending end. After a failure, the next update makes a new one.

        Args:
            user: the update that drops it; ignored if that is over. None drops it in any case.
        """
        with self._lock:
            if user is not None and user is not self._user:
                return
            cached, self._cached = self._cached, None
        if cached is not None:
            cached[1].close()

    def __del__(self) -> None:
        # In a thread of its own: closing waits for transfers, and the garbage collector may run in an event loop's thread.
        if self._cached is not None:
            with contextlib.suppress(RuntimeError):  # no thread starts while the interpreter ends
                threading.Thread(target=self._cached[1].close, name="areal-close-sink", daemon=True).start()

    def _check(self, user: object) -> None:
        if user is not self._user:
            raise Cancelled("the update is over")


def make_sink(
    kind: str,
    engines: Mapping[str, EngineInfo],
    device: torch.device,
    bucket_bytes: int,
    expected: Sequence[TensorMeta],
    timeout: float,
) -> Sink:
    """Make a sending end of transport ``kind`` to ``engines``."""
    if kind in ("shared_memory", "ipc"):
        from ..transport import buckets
        from ..transport.ipc import CudaIpcSink
        from ..transport.shared_memory import SharedMemorySink

        dtype = next(iter(engines.values())).dtype
        largest = max((buckets.tensor_bytes(tensor, dtype) for tensor in expected), default=0)
        slot_bytes = max(buckets.aligned(bucket_bytes), largest)
        if kind == "ipc":
            return CudaIpcSink(len(engines), device, bucket_bytes, slot_bytes)
        return SharedMemorySink(len(engines), bucket_bytes, slot_bytes)
    from ..transport.broadcast import BroadcastSink

    backend = "nccl" if device.type == "cuda" else "tcp"
    members = {name: [worker.rank for worker in engine.workers] for name, engine in engines.items()}
    return BroadcastSink(backend, members, _data_host(engines), device, bucket_bytes, timeout)


def _data_host(engines: Mapping[str, EngineInfo]) -> str:
    """Return this machine's address that workers reach: the one that reaches the last engine off this host."""
    hosts = [split_address(engine.address)[0] for engine in engines.values()]
    far = [host for host in hosts if not security.is_loopback(host)]
    own = [security.own_address_toward(host) for host in far or hosts[:1]]
    return own[-1]
