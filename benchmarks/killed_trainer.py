"""A trainer that kills itself with SIGKILL in the middle of an update; started by ``gpu_smoke``.

    python -m benchmarks.killed_trainer POINT TRANSPORT DIRECTORY CHECKPOINT

At POINT ``meet``, the trainer dies before the handshake, for which the workers wait. At ``join``, it dies shortly after it
began the handshake. At ``send``, the second bucket is announced, and never sent (broadcast) or being copied.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.client import sinks

POINTS = ("meet", "join", "send")


def die(after: float) -> None:
    time.sleep(after)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    point, transport, directory, checkpoint = sys.argv[1:]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    weights = {
        name: tensor
        for file in sorted(Path(checkpoint).glob("*.safetensors"))
        for name, tensor in load_file(file, device=device).items()
    }
    make_sink = sinks.make_sink

    def deadly_sink(*arguments: Any) -> Any:
        sink = make_sink(*arguments)
        if point == "meet":
            sink.meet = lambda _opening: die(after=2.0)
        elif point == "join":
            meet = sink.meet

            def meet_and_die(opening: Any) -> None:
                threading.Thread(target=die, args=(0.25,), daemon=True).start()
                meet(opening)
                time.sleep(60)

            sink.meet = meet_and_die
        else:
            start, started = sink.start, itertools.count(1)

            def start_or_die(*given: Any) -> Any:
                if next(started) == 2:
                    die(after=0.5)
                return start(*given)

            sink.start = start_or_die
        return sink

    sinks.make_sink = deadly_sink
    with EngineGroup.connect(directory) as group:
        group.wait_ready(timeout=60)
        print("begins", flush=True)
        with group.update("never", timeout=100, transport=transport, bucket_mib=8) as update:
            update.send(weights)
    sys.exit("it was not killed")


if __name__ == "__main__":
    main()
