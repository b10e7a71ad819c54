"""The worker's ends of its trainers' connections, kept from one update to the next."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import msgspec

from ..protocol import Broadcast, CudaIpc, Disk, SharedMemory, TorchGroup
from ..transport.base import Cancelled

if TYPE_CHECKING:
    from ..protocol import Transfer
    from ..transport.base import Source, WorkerSite

# Size of the LRU cache of sources, so that alternating trainers keep their connections. Never smaller than one update's
# number of senders.
_KEPT_SOURCES = 4


def open_source(transfer: Transfer, site: WorkerSite, timeout: float, cancelled: threading.Event) -> Source:
    """Open the worker's end of ``transfer``."""
    match transfer:
        case Broadcast():
            from ..transport.broadcast import BroadcastSource

            return BroadcastSource(transfer, site, timeout, cancelled)
        case SharedMemory():
            from ..transport.shared_memory import SharedMemorySource

            return SharedMemorySource(transfer, site.device)
        case CudaIpc():
            from ..transport.ipc import CudaIpcSource

            return CudaIpcSource(transfer, site)
        case Disk():
            from ..transport.disk import DiskSource

            return DiskSource(transfer, cancelled)
        case TorchGroup():
            from ..transport.torch_group import TorchGroupSource

            return TorchGroupSource(transfer, site, timeout, cancelled)


class Sources:
    """An LRU cache of reusable sources. Safe to use from any thread."""

    def __init__(self, site: WorkerSite) -> None:
        self._site = site
        self._kept: list[tuple[Transfer, Source]] = []
        self._lock = threading.Lock()

    def open(self, transfer: Transfer, timeout: float, cancelled: threading.Event, senders: int) -> Source:
        """Return the worker's end of ``transfer``: the one of an earlier update, or a new one.

        Args:
            transfer: what the sender says of its connection.
            timeout: seconds to connect.
            cancelled: set when the update is given up.
            senders: how many senders the update has.

        Raises:
            RuntimeError: the sender counts on a connection that this worker no longer has.
            Cancelled: the update was given up meanwhile.
        """
        met = False
        if isinstance(transfer, (Broadcast, TorchGroup)):
            met, transfer = transfer.established, msgspec.structs.replace(transfer, established=False)
        with self._lock:
            for place, (known, source) in enumerate(self._kept):
                if known == transfer:
                    self._kept.append(self._kept.pop(place))  # the least recently used is closed first
                    return source
        if met:
            raise RuntimeError("this worker no longer has its end of the trainer's connection")
        if isinstance(transfer, TorchGroup):
            self._leave(transfer.group)
        source = open_source(transfer, self._site, timeout, cancelled)
        if cancelled.is_set():
            source.close()
            raise Cancelled
        if source.reusable:
            with self._lock:
                self._kept.append((transfer, source))
                # A trainer joins its groups once, one by one, so these stay until they fail or are replaced.
                groups = [entry for entry in self._kept if isinstance(entry[0], TorchGroup)]
                others = [entry for entry in self._kept if not isinstance(entry[0], TorchGroup)]
                size = max(_KEPT_SOURCES, senders)
                outdated, self._kept = others[:-size], groups + others[-size:]
            for _, old in outdated:
                old.close()
        return source

    def _leave(self, group: str) -> None:
        """Leave the torch group of this name, because a trainer makes it anew."""
        with self._lock:
            same = [entry for entry in self._kept if isinstance(entry[0], TorchGroup) and entry[0].group == group]
            self._kept = [entry for entry in self._kept if entry not in same]
        for _, old in same:
            old.close()

    def drop(self, source: Source | None) -> None:
        """Close a source that failed, so that the next update opens a new one."""
        with self._lock:
            self._kept = [entry for entry in self._kept if entry[1] is not source]
        if source is not None:
            source.close()
