"""Bad frames for an endpoint or a directory, chosen by a seed: malformed, absurd, repeated, wrongly keyed.

``python bad_frames.py ADDRESS --key-file FILE --frames 1000`` sends them from a process of its own, together with connections
that never finish a handshake. No frame may be obeyed: commands carry epoch 0, which every engine that was ever commanded
refuses.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import time
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from areal_vllm_ext import protocol
from areal_vllm_ext.protocol import security
from areal_vllm_ext.protocol.peer_messages import EndOffer, OfferWeights, WeightsFetched, WorkerOffered
from areal_vllm_ext.protocol.server import connect

if TYPE_CHECKING:
    from collections.abc import Callable

FRAMES_OF_A_PEER = 500
HALF_OPEN = 20
_MALFORMED_ID = bytes(protocol.REQUEST_ID_BYTES)

_WORKER = protocol.WorkerInfo(rank=0, node="stranger", pid=1, device="cpu", device_id="cpu")
# No directory may register this engine: clients would wait for it until it is forgotten.
_ENGINE = protocol.EngineInfo(
    replica="stranger",
    dp_rank=-1,
    dp_size=10**9,
    headless=False,
    node="stranger",
    pid=1,
    incarnation="9" * 20,
    address="tcp://127.0.0.1:1",
    dtype="float32",
)
_TRANSFERS: tuple[protocol.Transfer, ...] = (
    protocol.Disk(path="/nowhere"),
    protocol.SharedMemory(segment="areal-" + "0" * 32, nbytes=1 << 40),
    protocol.Broadcast(backend="tcp", communicator="c", world_size=2, ranks={0: 1}, rendezvous="127.0.0.1:1"),
)
_SEGMENT = protocol.Segment(protocol.TensorMeta("w", "float32", (2, 3)), 0)
MESSAGES: tuple[protocol.Message, ...] = (
    protocol.Hello(),
    protocol.GetStatus(),
    protocol.DescribeWeights(),
    protocol.Pause(epoch=0, mode="keep", kv="keep", timeout=1e6),
    protocol.Resume(epoch=0),
    *(
        protocol.Begin(epoch=0, update="u", version=1, senders={0: protocol.Sender(transfer=one)}, timeout=1e6)
        for one in _TRANSFERS
    ),
    protocol.Bucket(epoch=0, update="u", index=2**60, nbytes=2**60, segments=(_SEGMENT,), digests=(2**64 - 1,)),
    protocol.Prepare(epoch=0, update="u", buckets={0: 2**60}),
    protocol.Commit(epoch=0, update="u"),
    protocol.Abort(epoch=0, update="u", reason="a stranger says so"),
    protocol.Fence(epoch=0),
    protocol.GetTrace(update="u", timeout=1e6),
    protocol.WeightsTaken(
        rank=0, weights=protocol.Weights(tensors=(_SEGMENT.tensor,), optional=("w",), ties={"w": "w"})
    ),
    protocol.WorkerTrace(update="u", rank=0, now=0.0, spans=(protocol.Span("t", "n", 0.0, 1.0),)),
    *(protocol.WorkerDone(update="u", rank=rank, step=step) for rank in (-1, 0, 7) for step in ("prepare", "begin")),
    OfferWeights(fetch="f", committed_epoch=2**62, timeout=1e6),
    EndOffer(fetch="f"),
    WorkerOffered(fetch="f", rank=0, error="a stranger says so"),
    WeightsFetched(fetch="f", rank=0, manifest="m"),
    protocol.Register(engine=_ENGINE, epoch=0),
    protocol.Discover(),
    protocol.AcquireLease(holder="stranger", seconds=0.0),
    protocol.RenewLease(epoch=0, holder="", seconds=300.0),
    protocol.LeaveQueue(holder=""),
    protocol.Forget(replica="r", dp_rank=2**16),
    protocol.ReleaseLease(epoch=0),
    protocol.Ack(),
    protocol.Error(kind="state", message="a stranger says so"),
)
# An Attach without the token that only the engine's own workers have.
ATTACH = {"type": "Attach", "worker": msgspec.to_builtins(_WORKER), "token": "a stranger's"}
ABSURD: tuple[Any, ...] = (
    *(-1, -(2**63), 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1),
    *(-1.5, float("nan"), float("inf"), 1e308),
    *("", "\0", "\U0010ffff" * 100, "x" * 100_000, "../../etc/passwd"),
    *(None, b"\xff" * 10, [], {}, [None] * 1000, [[[]]], {"type": "Hello"}, {"": ""}),
)


class Frames:
    """An endless supply of bad messages, each a list of frames."""

    def __init__(self, seed: int, max_message_bytes: int) -> None:
        self._random = random.Random(seed)
        self._max_message_bytes = max_message_bytes
        self._sent: list[list[bytes]] = []
        self._makers: list[tuple[Callable[[], list[bytes]], int]] = [
            (self._garbage, 15),
            (self._mutated, 25),
            (self._absurd, 25),
            (self._valid, 10),
            (self._attach, 5),
            (self._nested, 2),
            (self._lengths, 2),
            (self._frames, 6),
            (self._replayed, 10),
            (self._same_id, 5),
        ]
        self._rare: list[Callable[[], list[bytes]]] = [self._thousands_of_frames, self._long, self._long_list]

    def next(self) -> list[bytes]:
        if self._random.random() < 0.001:
            return self._random.choice(self._rare)()
        makers, weights = zip(*self._makers, strict=True)
        (make,) = self._random.choices(makers, weights)
        frames: list[bytes] = make()
        if len(self._sent) < 100:
            self._sent.append(frames)
        else:
            self._sent[self._random.randrange(100)] = frames
        return frames

    def too_long(self) -> list[bytes]:
        """Return a message beyond the limit, which ends the sender's connection."""
        return [self._id(), bytes(self._max_message_bytes + 1)]

    def _id(self) -> bytes:
        return self._random.randbytes(protocol.REQUEST_ID_BYTES)

    def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = msgspec.to_builtins(self._random.choice(MESSAGES))
        return message

    def _garbage(self) -> list[bytes]:
        return [self._id(), self._random.randbytes(self._random.randrange(64))]

    def _valid(self) -> list[bytes]:
        return [self._id(), msgspec.msgpack.encode(self._message())]

    def _attach(self) -> list[bytes]:
        rank = self._random.choice((0, 0, 1, -1, 5, 2**40))
        return [self._id(), msgspec.msgpack.encode(ATTACH | {"worker": ATTACH["worker"] | {"rank": rank}})]

    def _mutated(self) -> list[bytes]:
        data = bytearray(msgspec.msgpack.encode(self._message()))
        # Only the first bytes, so that the result is never another command with a valid epoch.
        place = self._random.randrange(min(len(data), 8))
        match self._random.randrange(3):
            case 0:
                del data[place:]
            case 1:
                data[place : place + self._random.randrange(3)] = self._random.randbytes(self._random.randrange(1, 4))
            case 2:
                data += self._random.randbytes(1)
        return [self._id(), bytes(data)]

    def _absurd(self) -> list[bytes]:
        message = self._message()
        inner = message
        while (parts := [value for value in inner.values() if isinstance(value, dict)]) and self._random.random() < 0.7:
            inner = self._random.choice(parts)
        names = [name for name in inner if inner is not message or name != "type"]
        value = self._random.choice(ABSURD)
        if names and self._random.random() < 0.8:
            inner[self._random.choice(names)] = value
        else:
            inner["unknown"] = value
        return [self._id(), msgspec.msgpack.encode(message)]

    def _nested(self) -> list[bytes]:
        deep = self._random.choice((b"\x91", b"\x81\xa1x")) * self._random.choice((100, 1000, 50_000)) + b"\x00"
        if self._random.random() < 0.5:
            return [self._id(), deep]
        return [self._id(), b"\x83\xa4type\xa5Fence\xa5epoch\x00\xa4deep" + deep]

    def _lengths(self) -> list[bytes]:
        return [self._id(), self._random.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")) + b"\xff" * 4]

    def _frames(self) -> list[bytes]:
        one_id, message = self._valid()
        return self._random.choice(
            (
                [b""],
                [one_id],
                [message],
                [message, one_id],
                [one_id[:-1], message],
                [one_id + b"\0", message],
                [one_id, message, message],
                [one_id] * self._random.randrange(3, 50),
                [b""] * self._random.randrange(3, 50),
            )
        )

    def _replayed(self) -> list[bytes]:
        return self._random.choice(self._sent) if self._sent else self._valid()

    def _same_id(self) -> list[bytes]:
        return [_MALFORMED_ID[1:] + bytes([self._random.randrange(4)]), self._valid()[1]]

    def _thousands_of_frames(self) -> list[bytes]:
        return [self._random.choice((b"", b"x" * 100))] * self._random.randrange(1000, 5000)

    def _long(self) -> list[bytes]:
        return [self._id(), bytes(self._random.randrange(self._max_message_bytes // 16, self._max_message_bytes))]

    def _long_list(self) -> list[bytes]:
        segments = [["w", "float32", [2, 3]], 0], [["x", "float32", [3, 2]], 256]
        bucket = {"type": "Bucket", "epoch": 0, "update": "u", "index": 0, "nbytes": 1, "segments": segments * 5000}
        return [self._id(), msgspec.msgpack.encode(bucket)]


# First bytes of connections that never finish a handshake.
_CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
_NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
_HELLO = b"\x04\xc8\x05HELLO\x01\x00"
TCP_GARBAGE = (
    b"",
    b"\0",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\xff" * 1000,
    _CURVE_GREETING[:11],
    _CURVE_GREETING,
    _CURVE_GREETING + _HELLO + bytes(192),
    _CURVE_GREETING + _HELLO + b"\xff" * 192,
    _CURVE_GREETING + b"\x06" + b"\xff" * 8,
    _CURVE_GREETING + b"\x04\x00",
    _CURVE_GREETING + b"\x00\x05hello" * 10,
    _NULL_GREETING + b"\x04\x29\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00",
    b"\xff" + bytes(7) + b"\x01\x7f\x01\x00\x05hello",  # ZMTP 2.0
    b"\x01\x00\x07\x00another",  # ZMTP 1.0
)


class Attacker:
    """Sends bad frames from many peers; some of them hold the key."""

    def __init__(
        self,
        address: str,
        key: security.ClusterKey,
        seed: int,
        max_message_bytes: int,
        frames_of_a_peer: int = FRAMES_OF_A_PEER,
    ) -> None:
        self._frames_of_a_peer, self._seed = frames_of_a_peer, seed
        self._address = address
        self._key = key
        self._random = random.Random(seed)
        self._frames = Frames(seed, max_message_bytes)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._open: list[socket.socket] = []
        public, secret = zmq.curve_keypair()
        self._strangers_key = security.ClusterKey(public, secret)

    def send(self, frames: int) -> None:
        """Send this many frames; returns when the other side has read them all."""
        while frames > 0:
            count = min(frames, self._frames_of_a_peer)
            self._be_a_peer(count)
            frames -= count
            self._knock()

    def close(self) -> None:
        for one in self._open:
            one.close()
        self._context.destroy(linger=0)

    def _be_a_peer(self, frames: int) -> None:
        own = str(self._seed).encode()  # peers of one routing id take each other's place
        identity = self._random.choice((self._random.randbytes(8), b"worker-" + own, own.rjust(255, b"x"), b"t" + own))
        peer = connect(self._context, self._address, self._key, identity)
        peer.sndtimeo = 20_000
        reads = self._random.random() < 0.8
        try:
            for _ in range(frames):
                peer.send_multipart(self._frames.next())
                while reads and peer.poll(0):
                    peer.recv_multipart()
            self._wait_until_read(peer)
            if self._random.random() < 0.2:
                peer.send_multipart(self._frames.too_long())
        finally:
            peer.close()

    def _wait_until_read(self, peer: zmq.Socket[bytes]) -> None:
        """Send a request after all frames, and repeat it until its answer comes, because answers may be dropped."""
        request_id, ends = os.urandom(protocol.REQUEST_ID_BYTES), time.monotonic() + 30
        while time.monotonic() < ends:
            peer.send_multipart([request_id, protocol.encoder.encode(protocol.Hello())])
            asked = time.monotonic()
            while (left := asked + 1 - time.monotonic()) > 0 and peer.poll(left * 1000):
                if peer.recv_multipart()[0] == request_id:
                    return
        raise TimeoutError(f"{self._address} does not answer after bad frames")

    def _knock(self) -> None:
        """Connect without the key."""
        host, _, port = self._address.removeprefix("tcp://").rpartition(":")
        for garbage in self._random.sample(TCP_GARBAGE, 4):
            with contextlib.suppress(ConnectionError):
                one = socket.create_connection((host, int(port)), timeout=5)
                self._open.append(one)
                one.sendall(garbage)
        while len(self._open) > HALF_OPEN:
            self._open.pop(self._random.randrange(len(self._open))).close()
        stranger = self._context.socket(zmq.DEALER)
        stranger.linger = 0
        match self._random.randrange(4):
            case 0:
                security.join_curve(stranger, self._strangers_key)  # of another cluster
            case 1:
                security.join_curve(stranger, self._strangers_key)
                stranger.curve_serverkey = self._key.public  # the right server's key, with an unknown client's
            case 2:
                stranger.plain_username, stranger.plain_password = b"areal", b"areal"
        stranger.connect(self._address)
        with contextlib.suppress(zmq.Again):  # after a failed handshake there is no peer to send to
            stranger.send_multipart(self._frames.next(), zmq.NOBLOCK)
        time.sleep(0.01)
        stranger.close()


def main() -> None:
    """Attack one address."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("address")
    parser.add_argument("--key-file")
    parser.add_argument("--frames", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-message-bytes", type=int, default=16 << 20)
    arguments = parser.parse_args()
    host = arguments.address.removeprefix("tcp://").rpartition(":")[0]
    attacker = Attacker(
        arguments.address, security.key_for(host, arguments.key_file), arguments.seed, arguments.max_message_bytes
    )
    try:
        attacker.send(arguments.frames)
    finally:
        attacker.close()


if __name__ == "__main__":
    main()
