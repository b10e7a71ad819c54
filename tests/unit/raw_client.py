"""A peer on the wire that can send anything."""

from __future__ import annotations

import os
import time

import zmq

from areal_vllm_ext import protocol
from areal_vllm_ext.protocol import security
from areal_vllm_ext.protocol.server import connect


class RawClient:
    """A peer on the wire that can send anything."""

    def __init__(self, address: str, key: security.ClusterKey, identity: bytes | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = connect(self._context, address, key, identity or os.urandom(8))
        self.socket.sndtimeo = 5000

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self, timeout: float = 5.0) -> list[bytes] | None:
        """The next message's frames, or None where none came in time."""
        return self.socket.recv_multipart() if self.socket.poll(timeout * 1000) else None

    def answer(self, timeout: float = 5.0) -> protocol.Answer:
        frames = self.receive(timeout)
        assert frames is not None, f"no answer within {timeout} s"
        return protocol.answer_decoder.decode(frames[1])

    def ask(self, message: protocol.Message, timeout: float = 5.0) -> protocol.Answer:
        """One request and its answer; answers to earlier requests are dropped."""
        request_id = os.urandom(protocol.REQUEST_ID_BYTES)
        self.send(request_id, protocol.encoder.encode(message))
        ends = time.monotonic() + timeout
        while (left := ends - time.monotonic()) > 0:
            frames = self.receive(left)
            if frames is not None and frames[0] == request_id:
                return protocol.answer_decoder.decode(frames[1])
        raise AssertionError(f"no answer to {message} within {timeout} s")

    def close(self) -> None:
        self._context.destroy(linger=0)
