"""``UpdateContext``: what all parts of one update use."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import TYPE_CHECKING

from ..transport.buckets import default_bucket_bytes

if TYPE_CHECKING:
    import asyncio

    import torch

    from ..control.link import Link
    from ..observability.spans import SpanRecorder
    from ..protocol import Version
    from .options import Options
    from .sinks import Sinks


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateContext:
    """What all parts of one update use.

    Attributes:
        version: names the new weights.
        options: as the user gave them.
        link: the connection to the engines.
        loop: the event loop of ``link``.
        sinks: the sending ends that are kept between updates.
        started: when the update began, by ``time.monotonic()``.
        ends: its deadline, by the same clock.
        spans: records what is done here, for the trace.
        closed: set when the update ends, so that what still sends for it stops.
    """

    version: Version
    options: Options
    link: Link
    loop: asyncio.AbstractEventLoop
    sinks: Sinks
    started: float
    ends: float
    spans: SpanRecorder
    closed: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.ends - time.monotonic()

    def bucket_bytes(self, device: torch.device, transport: str = "", total: int = 0) -> int:
        """Return the size of the buckets in which tensors on ``device`` travel.

        Args:
            device: where the tensors are.
            transport: how they travel, if it is known.
            total: bytes of all tensors, if known.
        """
        asked = self.options.bucket_bytes
        return default_bucket_bytes(device, transport, total) if asked is None else asked

    def given_up(self, reason: str) -> str:
        """Return the message of an update that was given up."""
        return f"update to version {self.version} was given up: {reason}"
