"""The ways to update engines that are compared: ours, AReaL's, vLLM's own, and the raw link as the lower bound.

Times are the trainer's for every way. ``total`` is from the first request of an update to the last answer. ``pause`` is from
the request to pause to the answer to resume; ours has it as ``UpdateResult.pause_ms``.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.deployment import free_ports

from .link import Link
from .serving import Server

Weights = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one update.

    Attributes:
        commit_ms: only ours: the longest commit of an engine.
        phases: only ours: from a phase's first request to that of the next phase. ``connect`` comes before the first
            phase, and ``begin`` ends when all bytes are sent.
    """

    total_ms: float
    pause_ms: float
    commit_ms: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


class Way(Protocol):
    name: str

    def update(self, version: int, weights: Weights) -> Timing: ...


class Ours:
    """An update by this package."""

    def __init__(self, group: EngineGroup, name: str, **options: Any) -> None:
        self.name, self._group, self._options = name, group, options
        self.trace: Path | None = None

    def update(self, version: int, weights: Weights) -> Timing:
        moments = [("connect", time.perf_counter())]

        def on_phase(phase: str) -> None:
            moments.append((phase, time.perf_counter()))

        with self._group.update(version, on_phase=on_phase, trace=self.trace, **self._options) as update:
            update.send(weights)
        moments.append(("end", time.perf_counter()))
        phases = {name: (after - before) * 1e3 for (name, before), (_, after) in itertools.pairwise(moments)}
        total = (moments[-1][1] - moments[0][1]) * 1e3
        return Timing(total, update.result.pause_ms, update.result.commit_ms, phases)

    def loaded(self) -> str:
        """Return how the workers loaded the last update: by a plan, a shadow, or a reload and why."""
        return ", ".join(sorted({state.loaded for state in self._group.status()}))


class _InThePause:
    """A way that does all work while the engines are paused."""

    name: str

    def __init__(self, server: Server) -> None:
        self._server = server

    def update(self, version: int, weights: Weights) -> Timing:
        started = time.perf_counter()
        self._server.post("/pause", mode="keep")
        self.transfer(weights)
        self._server.post("/resume")
        took = (time.perf_counter() - started) * 1e3
        return Timing(took, took)

    def transfer(self, weights: Weights) -> None:
        raise NotImplementedError


class PerTensor(_InThePause):
    """AReaL's way: a broadcast and a ``load_weights`` for each tensor.

    ``layerwise`` feeds all tensors to one of vLLM's reloads. It is the nearest right way where ``load_weights`` on a live
    model is wrong: on CPU, where parameters are packed and gone, and with some MoE kernels.
    """

    def __init__(self, server: Server, link: Link, *, layerwise: bool) -> None:
        super().__init__(server)
        self._link, self._layerwise = link, layerwise
        self.name = f"AReaL's way{', layerwise' if layerwise else ''}"

    def transfer(self, weights: Weights) -> None:
        names = [name for name, _ in weights]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in weights]
        shapes = [list(tensor.shape) for _, tensor in weights]
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(self._server.rpc, "baseline_receive", names, dtypes, shapes, self._layerwise)
            for _, tensor in weights:
                self._link.broadcast(tensor.contiguous())
            receiving.result()


class Native(_InThePause):
    """vLLM's own weight transfer, over its HTTP routes."""

    def __init__(self, server: Server, backend: str, *, packed: bool, weights: Weights) -> None:
        super().__init__(server)
        self.name = f"vLLM's {backend}{', packed' if packed else ''}"
        self._backend, self._packed = backend, packed
        # The buffer must hold the largest tensor.
        self._buffer = max(1 << 30, *(tensor.nbytes for _, tensor in weights))
        self._engine: Any = None

    def open(self, weights: Weights) -> None:
        """Connect to the workers; only one of vLLM's transfers can be open at a time."""
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        client = HTTPVLLMWeightSyncClient(self._server.url)
        common = {"packed": self._packed, "packed_buffer_size_bytes": self._buffer, "rank": 0}
        if self._backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import (
                IPCTrainerInitInfo,
                IPCTrainerWeightTransferEngine,
            )

            info = IPCTrainerInitInfo(**common)
            self._engine = IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=source_of(weights))
            return
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        place = self._server.place
        info = NCCLTrainerInitInfo(
            master_address=self._server.host,
            master_port=free_ports(1)[0],
            world_size=1 + place.engines * place.tp,
            **common,
        )
        self._engine = NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source_of(weights))

    def transfer(self, weights: Weights) -> None:
        self._engine.source = source_of(weights)
        self._engine.send_weights()

    def close(self) -> None:
        if self._engine is not None:
            self._server.post("/shutdown_weight_transfer_engine")
            self._engine.shutdown()
            self._engine = None


def source_of(weights: Weights) -> Any:
    """Return vLLM's ``WeightSource`` of these weights, as 0.32 and 0.33 read it."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    described = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]
    newer = hasattr(WeightSource, "iter_full")  # 0.33

    class Source(WeightSource):  # type: ignore[misc]
        metadata = functools.cached_property(lambda _self: described) if newer else lambda _self: described

        def iter_full(self) -> Any:
            return iter(weights)

        __iter__ = iter_full

    return Source()


def join(server: Server) -> Link | None:
    """Join a process group with all workers; None where trainer and engines share a GPU, which NCCL refuses."""
    if server.place.device == "cuda" and server.place.colocated:
        return None
    port, size = free_ports(1)[0], 1 + server.place.engines * server.place.tp
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(server.rpc, "baseline_join", server.host, port, size)
        link = Link(server.host, port, 0, size, server.place.trainer_device)
        joining.result()
    return link


def raw_broadcast(server: Server, link: Link, nbytes: int, rounds: int) -> list[float]:
    """Return the milliseconds of one broadcast of ``nbytes`` to all workers."""
    buffer = torch.empty(nbytes, dtype=torch.uint8, device=server.place.trainer_device)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(server.rpc, "baseline_raw", nbytes, rounds)

        def one() -> None:
            link.broadcast(buffer)
            link.meet()

        times = []
        for _ in range(rounds):
            link.meet()
            times.append(_timed(one))
        receiving.result()
    return times


def raw_copy(weights: Weights, target: torch.device, rounds: int) -> list[float]:
    """Return the milliseconds of copying all tensors once to ``target``: the same device, another, or host memory."""
    sources = [tensor for _, tensor in weights]
    targets = [torch.empty_like(tensor, device=target) for tensor in sources]

    def one() -> None:
        torch._foreach_copy_(targets, sources, non_blocking=True)
        for device in {target, sources[0].device}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    times = [_timed(one) for _ in range(rounds + 1)][1:]
    targets.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return times


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3
