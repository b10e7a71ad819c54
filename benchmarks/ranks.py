"""What the two ranks of a trainer share: device and process group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

RANKS = 2


def device_of(rank: int) -> torch.device:
    """Return the rank's GPU and make it the current device; the CPU if there are no GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


@contextlib.contextmanager
def joined(rank: int, port: int) -> Iterator[None]:
    """Join the trainer's process group inside this context."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        yield
    finally:
        dist.destroy_process_group()
