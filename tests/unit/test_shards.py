"""A worker that needs a part of each tensor stages these parts only: real clients, receivers, plans and commits, over stand-ins
for vLLM's workers of which each has half of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_commits import Engines, Worker
from real_receivers import SHAPES, WORKERS, checkpoint, connected, send, set_bucket_bytes, weights  # noqa: F401 - a fixture

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.protocol import Staging, security
from areal_vllm_ext.worker import staging
from areal_vllm_ext.worker.load.copying import Copies
from areal_vllm_ext.worker.load.strides import runs_across

HALVED = ("embed", "norm")
TURNED = "layer.1"


class Half(torch.nn.Module):
    """One of two ranks: half of the rows of what can be halved, all of the rest, one tensor of it transposed."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        for name, shape in SHAPES.items():
            own = (shape[0] // WORKERS, *shape[1:]) if name in HALVED else shape[::-1] if name == TURNED else shape
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.zeros(own), requires_grad=False))

    def own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(WORKERS)[self.rank] if name in HALVED else tensor.T if name == TURNED else tensor

    def part(self, name: str) -> torch.Tensor:
        return self.get_parameter(name.replace(".", "_")).data


class Rank(Worker):
    def __init__(self, rank: int, folder: Path, key_file: Path) -> None:
        super().__init__(rank, folder, key_file)
        self.model = Half(rank)

    def reload_weights(self, weights_iterator: Any) -> None:
        super().reload_weights((name, self.model.own(name, tensor)) for name, tensor in weights_iterator)

    @property
    def receiver(self) -> Any:
        return self._areal_receiver


class Shards(Engines):
    worker = Rank

    @property
    def ranks(self) -> list[Rank]:
        return [one for one in self.all_workers if isinstance(one, Rank)]

    def serve(self, expected: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(one.model.part(name), one.model.own(name, tensor))
            for one in self.ranks
            for name, tensor in expected.items()
        )


@pytest.fixture(scope="module")
def shards(key: security.ClusterKey, key_file: Path, checkpoint: Path) -> Iterator[Shards]:  # noqa: F811
    with Shards.started(key, checkpoint, key_file) as started:
        yield started


@pytest.fixture
def group(shards: Shards, key_file: Path) -> Iterator[EngineGroup]:
    with connected(shards.deployment, key_file) as client:
        send(client, weights(1))
        assert shards.serve(weights(1))
        yield client


def staged_at_commit(
    shards: Shards, group: EngineGroup, version: int, *, bucket_bytes: int | None = None, **options: Any
) -> list[set[str]]:
    """Return which whole tensors each worker has at the commit of ``weights(version)``; 1 byte: a bucket a tensor."""
    whole: list[set[str]] = []

    def on_phase(phase: str) -> None:
        if phase == "commit":
            whole.extend(set(one.receiver.reception.staged.tensors) for one in shards.ranks)

    opened = group.update(version, timeout=20.0, on_phase=on_phase, **options)
    if bucket_bytes is not None:
        set_bucket_bytes(opened, bucket_bytes)
    with opened as running:
        running.send(weights(version))
    assert shards.serve(weights(version))
    return whole


def test_only_a_rank_s_parts_are_kept(shards: Shards, group: EngineGroup) -> None:
    assert all(one.receiver.context.loader._plan.of_a_shard for one in shards.ranks)
    assert staged_at_commit(shards, group, 2, bucket_bytes=1) == [set()] * len(shards.ranks)
    assert staged_at_commit(shards, group, 3, keep_buffers=True) == [set()] * len(shards.ranks)
    assert not any(one.receiver.context.memory.kept for one in shards.ranks)
    assert group.verify().equal


@pytest.mark.parametrize("room", [True, False])
def test_tensors_that_lie_across_are_turned_round_before_the_pause_if_there_is_room(
    shards: Shards, group: EngineGroup, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    for one in shards.ranks:
        monkeypatch.setattr(one.receiver.context.loader._plan, "of_a_shard", False)
    monkeypatch.setattr(staging, "fits", lambda *_: room)
    across: list[int] = []

    def on_phase(phase: str) -> None:
        if phase == "commit":
            pairs = [zip(*kind, strict=True) for kind in all_copies()]
            across.append(sum(runs_across(*pair) for kind in pairs for pair in kind))

    def all_copies() -> list[Any]:
        return [kind for one in shards.ranks for kind in one.receiver.reception.staged.run._copies._batches.values()]

    with group.update(2, timeout=20.0, on_phase=on_phase) as update:
        update.send(weights(2))
    assert across == [0 if room else len(shards.ranks)]
    assert shards.serve(weights(2))
    assert group.verify().equal


def test_kernels_are_loaded_before_the_pause(
    shards: Shards, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    warm = Copies.warm
    monkeypatch.setattr(Copies, "warm", lambda self: seen.append("warm") or warm(self))  # type: ignore[func-returns-value]
    with group.update(2, timeout=20.0, on_phase=seen.append) as update:
        update.send(weights(2))
    assert seen.count("warm") == len(shards.ranks)
    assert "warm" not in seen[seen.index("pause") :]


@pytest.mark.parametrize("name", [*HALVED, "layer.0"])
def test_a_slice_that_changes_right_after_the_commit_is_seen(shards: Shards, group: EngineGroup, name: str) -> None:
    """Before the live weights are first read."""
    send(group, weights(2), version=2)
    shards.ranks[1].model.part(name).view(-1)[0] += 1
    found = [one.tensor for one in group.verify().differences if "has changed since it was loaded" in one.reason]
    assert found == [name]


def test_an_unproven_loader_gets_all_tensors_as_long_as_it_can_be_proven(shards: Shards, group: EngineGroup) -> None:
    one = shards.ranks[0]
    one.receiver.context.live_weights._proven = frozenset()
    whole = staged_at_commit(shards, group, 4)
    assert whole == [set(SHAPES), *[set()] * (len(shards.ranks) - 1)]
    assert one.receiver.context.live_weights._proven, "with these"
    one.receiver.context.live_weights._proven = frozenset()
    one.vllm_config.parallel_config.enable_eplb = True  # an obstacle
    try:
        assert staged_at_commit(shards, group, 5)[0] == set()
    finally:
        one.vllm_config.parallel_config.enable_eplb = False
    assert staged_at_commit(shards, group, 6)[0] == set(SHAPES)


def test_other_tensors_are_a_no_where_parts_only_were_kept_and_the_next_update_brings_all(
    shards: Shards, group: EngineGroup
) -> None:
    plan = shards.ranks[1].receiver.context.loader._plan
    # Of another dtype than it was recorded with, and in a later bucket than what is kept by then.
    last = list(plan.sources)[-1]
    plan.sources[last] = (torch.float64, plan.sources[last][1])
    opened = group.update(7, timeout=20.0)
    set_bucket_bytes(opened, 1)
    with (
        pytest.raises(
            UpdateAborted, match="other tensors were sent than in the last update: nothing was applied; send"
        ),
        opened as running,
    ):
        running.send(weights(7))
    assert shards.serve(weights(1))
    assert staged_at_commit(shards, group, 8)[1] == set(SHAPES)
    assert staged_at_commit(shards, group, 9)[1] == set()


def test_other_tensors_from_the_first_on_are_loaded_layer_by_layer(shards: Shards, group: EngineGroup) -> None:
    for one in shards.ranks:
        sources = one.receiver.context.loader._plan.sources
        first = next(iter(sources))
        sources[first] = (torch.float64, sources[first][1])
    assert staged_at_commit(shards, group, 11, bucket_bytes=1) == [set(SHAPES)] * len(shards.ranks)


def test_room_is_asked_for_parts_and_buckets_on_the_way(
    shards: Shards, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    choose = staging.choose
    monkeypatch.setattr(staging, "choose", lambda kind, *rest: (asked.append(rest[:2]), choose(kind, *rest))[1])
    # The largest tensor is as large as this model: as if it were of a byte.
    sinks = group._group._sinks
    sinks.described = {name: (tensors, size, 1) for name, (tensors, size, _) in sinks.described.items()}
    staged_at_commit(shards, group, 10, bucket_bytes=1)
    plan = shards.ranks[0].receiver.context.loader._plan
    whole = sum(-(-tensor.nbytes // 256) * 256 for tensor in weights(10).values())
    assert asked == [(whole, plan.slices_nbytes + 3)] * len(shards.ranks)
    assert plan.slices_nbytes < whole


MIB = 1 << 20


@pytest.mark.parametrize(
    ("device", "nbytes", "of_shard", "place"),
    [
        ("cpu", 900, 100, "host"),
        ("cpu", 900, 900, ""),
        ("cuda", 900, 80, "device"),
        ("cuda", 500, 100, "host"),  # 88 are free, the reserve not counted
        ("cuda", 900, 100, ""),  # in host memory all of it stays
    ],
)
def test_what_stays_must_have_room(
    monkeypatch: pytest.MonkeyPatch, device: str, nbytes: int, of_shard: int, place: str
) -> None:
    monkeypatch.setattr(staging, "free_bytes", lambda _: 600 * MIB)
    where = torch.device(device)
    if place:
        assert staging.choose(Staging(), nbytes * MIB, of_shard * MIB, where) == place
    else:
        with pytest.raises(RuntimeError, match="are free"):
            staging.choose(Staging(), nbytes * MIB, of_shard * MIB, where)


@pytest.mark.parametrize(
    ("kind", "beside", "place"),
    [
        ("auto", 30, "device"),
        ("auto", 60, "host"),  # 88 are free, the reserve not counted
        ("auto", 100, "device"),  # no room for it anyway
        ("device", 60, "device"),
    ],
)
def test_staging_leaves_room_for_a_shadow_if_it_can(
    monkeypatch: pytest.MonkeyPatch, kind: Any, beside: int, place: str
) -> None:
    monkeypatch.setattr(staging, "free_bytes", lambda _: 600 * MIB)
    assert staging.choose(Staging(kind=kind), 50 * MIB, 50 * MIB, torch.device("cuda"), beside * MIB) == place
