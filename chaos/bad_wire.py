"""A bad wire between two namespaces, which loses, delays and throttles frames.

Each node has a TAP device, and a process carries frames between the two. The kernel's netem does the same, but many
kernels are built without netem.
"""

from __future__ import annotations

import collections
import fcntl
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

if __package__:
    from harness.network import Namespaces
else:  # run as a script, the carrier needs the standard library only
    Namespaces = object

_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x2, 0x1000
_LONGEST_FRAME = 1 << 16
_QUEUED_FRAMES = 1000


class BadNamespaces(Namespaces):
    """Two nodes with a bad wire between them."""

    def lay_wire(self) -> None:
        ends = []
        for node, device in self.links.items():
            with self.inside(node):
                ends.append(os.open("/dev/net/tun", os.O_RDWR))
                fcntl.ioctl(ends[-1], _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TAP | _IFF_NO_PI))
        command = [sys.executable, "-I", "-S", str(Path(__file__)), *map(str, ends)]
        self._carrier = subprocess.Popen(command, pass_fds=ends, stdin=subprocess.PIPE, start_new_session=True)
        for end in ends:
            os.close(end)

    def set_quality(self, *, loss: float = 0.0, delay: float = 0.0, rate: float = 0.0) -> None:
        """Change the wire.

        Args:
            loss: the share of frames that are lost, 0 to 1.
            delay: seconds, each way.
            rate: bytes a second; 0 for no limit.
        """
        assert self._carrier.stdin is not None
        self._carrier.stdin.write(json.dumps({"loss": loss, "delay": delay, "rate": rate}).encode() + b"\n")
        self._carrier.stdin.flush()

    def remove(self) -> None:
        if carrier := getattr(self, "_carrier", None):
            carrier.stdin.close()
            carrier.wait()
        super().remove()


class Direction:
    """Frames in flight from one device to the other."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self.frames: collections.deque[tuple[float, bytes]] = collections.deque()
        self.free_at = 0.0

    def take(self, now: float, quality: dict[str, float]) -> None:
        try:
            frame = os.read(self.source, _LONGEST_FRAME)
        except OSError:
            return  # the device is down
        if random.random() < quality["loss"] or len(self.frames) >= _QUEUED_FRAMES:
            return
        self.free_at = max(now, self.free_at) + (len(frame) / quality["rate"] if quality["rate"] else 0.0)
        self.frames.append((self.free_at + quality["delay"], frame))

    def give(self, now: float) -> None:
        while self.frames and self.frames[0][0] <= now:
            try:
                os.write(self.target, self.frames.popleft()[1])
            except OSError:
                pass  # the device is down: the frame is lost


def carry(one: int, other: int) -> None:
    """Carry frames until stdin ends; each line on stdin is a new quality."""
    quality = {"loss": 0.0, "delay": 0.0, "rate": 0.0}
    directions = [Direction(one, other), Direction(other, one)]
    for end in (one, other):
        os.set_blocking(end, False)
    while True:
        due = min((direction.frames[0][0] for direction in directions if direction.frames), default=None)
        wait = None if due is None else max(due - time.monotonic(), 0.0)
        ready, _, _ = select.select([0, one, other], [], [], wait)
        if 0 in ready:
            line = os.read(0, 4096)
            if not line:
                return
            quality = json.loads(line.splitlines()[-1])
        now = time.monotonic()
        for direction in directions:
            if direction.source in ready:
                direction.take(now, quality)
            direction.give(now)


if __name__ == "__main__":
    carry(int(sys.argv[1]), int(sys.argv[2]))
