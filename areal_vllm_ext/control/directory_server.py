"""The directory behind a socket: in engine 0's process, or on its own (``areal-vllm directory``) for several replicas.

When a client's lease has run out and engines are left in its update, or paused, the server resolves that as the next
client would.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING

import zmq

from .. import protocol
from ..protocol import security, timing
from ..protocol.server import Server
from .awake_clock import AwakeClock
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
    """Runs a ``Directory`` in a thread, and each recovery in another thread."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        host: str,
        port: int,
        key: security.ClusterKey,
        max_message_bytes: int = _MAX_MESSAGE_BYTES,
        clock: Callable[[], float] | None = None,
        *,
        settle_seconds: float = 0.0,
        resume_orphans: bool = True,
    ) -> None:
        """Bind the address and start the thread. An address in use is an error here, not in the thread.

        Args:
            context: terminating it ends the server.
            host: an address of this machine.
            port: 0 takes a free port.
            key: the cluster's key.
            max_message_bytes: the longest message that is read.
            clock: the time in seconds (default: ``AwakeClock``); tests pass their own.
            settle_seconds: see ``Directory``.
            resume_orphans: whether engines resume when the client that paused them is gone.
        """
        self._server = Server(context, host, port, key, protocol.directory_decoder, max_message_bytes)
        self._clock = clock or AwakeClock()
        self._directory = Directory(self._clock(), settle_seconds)
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
        """Take the lease, and resolve what a client left behind, as the next client would."""

        async def recover() -> None:
            link = Link(lambda _: self._key, _MAX_MESSAGE_BYTES)
            try:
                await Commander(link, self.address).recover(_RECOVERY_SECONDS, resume=self._resume_orphans)
            finally:
                link.close()

        try:
            asyncio.run(recover())
            logger.warning("areal_vllm_ext: a client is gone; what it left behind at the engines was resolved")
        except Exception as error:
            logger.warning(
                "areal_vllm_ext: a client is gone, and what it left behind cannot be resolved yet: %s", error
            )
            time.sleep(timing.HEARTBEAT_SECONDS)
