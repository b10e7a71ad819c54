"""``plan``: which rank of the trainer sends what to which workers. Every rank computes the same plan from the same facts."""

from __future__ import annotations

import dataclasses
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from ...errors import InvalidWeights, UpdateAborted
from ...protocol import EngineInfo, TensorMeta, Weights
from ...transport.buckets import tensor_bytes
from ...transport.device import device_id

if TYPE_CHECKING:
    from ..options import Senders


class BeginContext(msgspec.Struct):
    """What rank 0 knows of the engines, and broadcasts to all ranks.

    Attributes:
        engines: by name, with their epochs.
        weights: what the engines take.
        dtype: the dtype in which the engines compute.
        bucket_bytes: size of a bucket.
    """

    engines: dict[str, tuple[EngineInfo, int]]
    weights: Weights
    dtype: str
    bucket_bytes: int


class RankInventory(msgspec.Struct):
    """What a rank holds.

    Attributes:
        tensors: its tensors, full or in shards.
        place: where it is, see ``place_of``.
        sharded: whether some of the tensors must be gathered.
    """

    tensors: tuple[TensorMeta, ...]
    place: str
    sharded: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who sends what to whom.

    Attributes:
        serves: by rank, the engines that it sends to, and the ranks of the workers there.
        sends: by rank, the names of the tensors that it sends.
        rounds: names, in the order in which sharded tensors are gathered; the ranks agree before each round.
    """

    serves: list[dict[str, tuple[int, ...]]]
    sends: list[frozenset[str]]
    rounds: list[list[str]]


def plan(senders: Senders, known: BeginContext, inventories: Sequence[RankInventory]) -> Plan:
    """Plan who sends what to whom.

    Args:
        senders: ``partitioned`` or ``colocated``.
        known: the engines.
        inventories: by rank, what it holds.

    Raises:
        InvalidWeights: the ranks' tensors contradict each other.
        UpdateAborted: a worker has no rank on its device.
    """
    metas: dict[str, TensorMeta] = {}
    for rank, inventory in enumerate(inventories):
        for meta in inventory.tensors:
            if metas.setdefault(meta.name, meta) != meta:
                raise InvalidWeights(
                    f"{meta.name} has another shape or dtype on rank {rank} of the trainer than on an earlier rank"
                )
    rounds = _rounds(metas, known.bucket_bytes)
    if senders == "partitioned":
        everywhere = {name: worker_ranks(info) for name, (info, _) in known.engines.items()}
        return Plan([everywhere] * len(inventories), _partition(metas, inventories), rounds)
    serves = _by_device(known, inventories)
    for rank, inventory in enumerate(inventories):
        if serves[rank] and (missing := metas.keys() - {meta.name for meta in inventory.tensors}):
            raise InvalidWeights(
                f"rank {rank} of the trainer lacks {min(missing)}, which other ranks have: "
                "senders='colocated' needs all tensors on every rank; use senders='partitioned'"
            )
    return Plan(serves, [frozenset(metas)] * len(inventories), rounds)


def place_of(device: torch.device | str, node: str) -> str:
    """Return where a rank or a worker is: its GPU's UUID, or the host of a CPU.

    Args:
        device: a torch device, or a worker's ``device_id``.
        node: the node's name.
    """
    name = device_id(device) if isinstance(device, torch.device) else device
    return name if name != "cpu" else f"cpu of {node.partition('/')[0]}"


def own_place(device: torch.device) -> str:
    """Return where this rank is, if its tensors are on ``device``."""
    return place_of(device, socket.gethostname())


def worker_ranks(info: EngineInfo) -> tuple[int, ...]:
    """Return the ranks of an engine's workers."""
    return tuple(worker.rank for worker in info.workers)


def with_workers(info: EngineInfo, ranks: Sequence[int]) -> EngineInfo:
    """Return the engine with only these of its workers."""
    return msgspec.structs.replace(info, workers=tuple(one for one in info.workers if one.rank in ranks))


def _rounds(metas: Mapping[str, TensorMeta], bucket_bytes: int) -> list[list[str]]:
    """Split the names into rounds of about ``bucket_bytes``."""
    rounds: list[list[str]] = [[]]
    size = 0
    for name, meta in metas.items():
        if size >= bucket_bytes:
            rounds.append([])
            size = 0
        rounds[-1].append(name)
        size += tensor_bytes(meta)
    return rounds


def _partition(metas: Mapping[str, TensorMeta], inventories: Sequence[RankInventory]) -> list[frozenset[str]]:
    """Give each tensor to one of the ranks that hold it: the one with the fewest bytes so far."""
    holders: dict[str, list[int]] = {name: [] for name in metas}
    for rank, inventory in enumerate(inventories):
        for meta in inventory.tensors:
            holders[meta.name].append(rank)
    load: Counter[int] = Counter()
    sends: list[set[str]] = [set() for _ in inventories]
    for name, ranks in holders.items():
        rank = min(ranks, key=lambda one: load[one])
        load[rank] += tensor_bytes(metas[name])
        sends[rank].add(name)
    return [frozenset(names) for names in sends]


def _by_device(known: BeginContext, inventories: Sequence[RankInventory]) -> list[dict[str, tuple[int, ...]]]:
    """Give each worker to a rank on its device; to the one with the fewest workers, if there are several."""
    serves: list[dict[str, tuple[int, ...]]] = [{} for _ in inventories]
    load: Counter[int] = Counter()
    for name, (info, _) in known.engines.items():
        for worker in info.workers:
            place = place_of(worker.device_id, worker.node)
            ranks = [rank for rank, inventory in enumerate(inventories) if inventory.place == place]
            if not ranks:
                raise UpdateAborted(
                    f"worker {worker.rank} of {name} runs on {place}, but no rank of the trainer does: use senders='rank0'"
                )
            rank = min(ranks, key=lambda one: load[one])
            load[rank] += 1
            serves[rank][name] = (*serves[rank].get(name, ()), worker.rank)
    return serves
