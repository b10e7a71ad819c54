"""The directory behind a socket: in engine 0's process, or on its own (``areal-vllm directory``) for several replicas.

When a client's lease has run out and engines are left in its update, or paused, the server resolves that as the next
client would.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from time import monotonic
from typing import TYPE_CHECKING

import zmq

from .. import protocol
from ..protocol import security, timing
from ..protocol.server import Server
from .command import Commander
from .directory import Directory
from .link import Link

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("vllm.areal_vllm_ext")

_POLL_MILLISECONDS = 200
_RECOVERY_SECONDS = 10.0
_MAX_MESSAGE_BYTES = 1 << 20


class DirectoryServer:
    """Runs a ``Directory`` in a thread of its own, and recoveries in another."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        port: int,
        key: security.ClusterKey,
        max_message_bytes: int = _MAX_MESSAGE_BYTES,
        clock: Callable[[], float] = monotonic,
        *,
        settle_seconds: float = 0.0,
        resume_orphans: bool = True,
    ) -> None:
        """Bind now, so that an address in use is an error here and not in a thread.

        Args:
            context: its sockets are closed when it ends.
            host: own address.
            port: 0 takes a free one.
            key: the cluster's.
            max_message_bytes: longest message that is read.
            clock: for tests.
            settle_seconds: see ``Directory``.
            resume_orphans: whether engines run again when whoever paused them is gone.
        """
        self._server = Server(context, host, port, key, protocol.directory_decoder, max_message_bytes)
        self._directory = Directory(clock(), settle_seconds)
        self._clock = clock
        self._key = key
        self._resume_orphans = resume_orphans
        self._recovery: threading.Thread | None = None
        self.address = self._server.address
        self.thread = threading.Thread(target=self._run, name="areal-directory", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while True:
                self._server.socket.poll(_POLL_MILLISECONDS)
                for caller, message in self._server.requests():
                    self._server.answer(caller, self._directory.handle(message, self._clock()))
                if not (self._recovery and self._recovery.is_alive()) and self._directory.recovery_due(self._clock()):
                    self._recovery = threading.Thread(target=self._recover, name="areal-recovery", daemon=True)
                    self._recovery.start()
        except zmq.ContextTerminated:
            self._server.socket.close()

    def _recover(self) -> None:
        """Do what the next client would do first."""

        async def recover() -> None:
            link = Link(lambda _: self._key, _MAX_MESSAGE_BYTES)
            try:
                await Commander(link, self.address).recover(_RECOVERY_SECONDS, resume=self._resume_orphans)
            finally:
                await link.close()

        try:
            asyncio.run(recover())
            logger.warning("areal_vllm_ext: a client was gone; the engines that it left in an update were settled")
        except Exception as error:
            logger.warning("areal_vllm_ext: engines that a client left cannot be settled yet: %s", error)
            time.sleep(timing.HEARTBEAT_SECONDS)
