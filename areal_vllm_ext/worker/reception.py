"""One update's arrival in this worker: its staged state, and a stream for each sender."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ..process.switch_interval import ShortSwitchInterval
from ..protocol import Prepare
from .sender_stream import SenderStream
from .staged_update import StagedUpdate

if TYPE_CHECKING:
    from ..protocol import Begin, Bucket
    from .context import WorkerContext


class Reception:
    """Receives one update. Senders have a thread each, so that none waits for another.

    Attributes:
        staged: what has arrived.
        streams: by sender that sends to this worker.
    """

    def __init__(self, context: WorkerContext, begin: Begin) -> None:
        senders = {
            number: sender.transfer
            for number, sender in begin.senders.items()
            if not sender.workers or context.rank in sender.workers
        }
        self.staged = StagedUpdate(context, begin, senders)
        self.streams = {number: SenderStream(self.staged, number, transfer) for number, transfer in senders.items()}
        self._switch_interval = ShortSwitchInterval()
        self._switch_interval.begin()
        for stream in self.streams.values():
            stream.start()
        if not self.streams:
            self.staged.report("begin", f"begin: no sender of this update sends to worker {context.rank}")

    @property
    def update(self) -> str:
        return self.staged.begin.update

    def put(self, order: Bucket | Prepare) -> None:
        """Pass an order on. A bucket of a sender to other workers is ignored."""
        if isinstance(order, Prepare):
            # All streams are idle by now, so any of them can vote.
            for stream in itertools.islice(self.streams.values(), 1):
                stream.prepare(order)
        elif order.sender in self.streams:
            self.streams[order.sender].put(order)

    def cancel(self) -> None:
        """Give the update up. Whatever still blocks ends by itself, and its result is thrown away."""
        self.staged.cancelled.set()
        self.finish()

    def finish(self) -> None:
        """End the threads, and free the staging."""
        self._switch_interval.end()
        for stream in self.streams.values():
            stream.stop()
        self.staged.free()
