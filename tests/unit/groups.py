"""Commands to a group of simulated engines, and what they did."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.protocol import AcquireLease, Lease
from harness.simulated_engine import Deployment

if TYPE_CHECKING:
    from raw_client import RawClient

# At most this much longer than its timeout takes a call.
OVERRUN = 1.0


def states(group: EngineGroup) -> list[str]:
    """Return what generation does on each engine."""
    return [state.generation for state in group.status()]


def versions(deployment: Deployment) -> list[object]:
    return [engine.version for engine in deployment.engines.values()]


def update(group: EngineGroup, version: int | str, **options: object) -> None:
    """Update with a checkpoint that no simulated worker reads."""
    with group.update(version, **options) as opened:
        opened.send("/nowhere")


def seconds(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def take_lease(client: RawClient, holder: str, seconds: float) -> int:
    """Take the directory's lease for ``holder``, and return its epoch."""
    lease = client.ask(AcquireLease(holder=holder, seconds=seconds))
    assert isinstance(lease, Lease)
    return lease.epoch
