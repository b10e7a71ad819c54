"""Rank 0 of a torch process group, made as AReaL's trainers make it (``init_custom_process_group``), for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from areal_vllm_ext.demo.deployment import free_ports


class TorchTrainer:
    """The trainer's end. It joins on a thread, because every rank waits for all others.

    Attributes:
        joined: done when all ranks have joined.
    """

    def __init__(self, world_size: int, name: str, host: str = "127.0.0.1", timeout: float = 60.0) -> None:
        self.world_size, self.name = world_size, name
        self.host, self.port = host, free_ports(1)[0]
        self._timeout = timedelta(seconds=timeout)
        self._pool = ThreadPoolExecutor(1)
        self._group: Any = None
        self.joined: Future[None] = self._pool.submit(self._join)

    def _join(self) -> None:
        from torch.distributed.distributed_c10d import (
            Backend,
            PrefixStore,
            _new_process_group_helper,
            _world,
            rendezvous,
        )

        address = f"tcp://{self.host}:{self.port}"
        store, rank, size = next(iter(rendezvous(address, 0, self.world_size, timeout=self._timeout)))
        store.set_timeout(self._timeout)
        store = PrefixStore(self.name, store)
        self._group, _ = _new_process_group_helper(
            size,
            rank,
            [],
            Backend("gloo"),
            store,
            group_name=self.name,
            timeout=self._timeout,
            group_desc=self.name,
        )
        _world.pg_group_ranks[self._group] = {number: number for number in range(size)}

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> Future[None]:
        """Broadcast tensor after tensor, as the trainer does for a bucket."""
        return self._pool.submit(self._broadcast, list(tensors))

    def _broadcast(self, tensors: list[torch.Tensor]) -> None:
        handles = [dist.broadcast(tensor, src=0, group=self._group, async_op=True) for tensor in tensors]
        for handle in handles:
            handle.wait()

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._pool.shutdown(wait=False)


@contextlib.contextmanager
def torch_trainer(world_size: int, name: str, host: str = "127.0.0.1", timeout: float = 60.0) -> Iterator[TorchTrainer]:
    trainer = TorchTrainer(world_size, name, host, timeout)
    try:
        yield trainer
    finally:
        trainer.close()
