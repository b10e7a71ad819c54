"""Number the engines of a host without any settings: each takes the lowest number that no living one has."""

from __future__ import annotations

import errno
import socket

_MAX_SLOTS = 4096


class HostSlot:
    """A number that is this object's own on this host, until ``close`` or the end of the process, however it ends.

    The number is held by an abstract Unix socket, which the kernel frees with its process. So engines that run at the same
    time have different numbers, and an engine that restarts usually takes the same number again. Abstract sockets belong to
    a network namespace, as the host's addresses do.

    Attributes:
        number: counts from 0.
    """

    def __init__(self, purpose: str) -> None:
        """Take the lowest free number among the slots of the same purpose.

        Raises:
            OSError: no number is free, or the kernel has no abstract sockets.
        """
        self._socket = socket.socket(socket.AF_UNIX)
        for number in range(_MAX_SLOTS):
            try:
                self._socket.bind(f"\0areal-vllm-ext/{purpose}/{number}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    self._socket.close()
                    raise
            else:
                self.number = number
                return
        self._socket.close()
        raise OSError(f"all {_MAX_SLOTS} slots of this host are taken")

    def close(self) -> None:
        """Free the number. Idempotent."""
        self._socket.close()
