"""What every engine holds is what was sent, and what every other engine holds: else nothing is applied."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from real_receivers import (
    TRANSPORTS,
    Served,
    assert_untouched,
    checkpoint,
    group,
    send,
    served,
    shared_engines,
    weights,
)
from safetensors.torch import save_file

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.client.coordinator import Coordinator, Member
from areal_vllm_ext.engine_core.participant import Participant, Reply
from areal_vllm_ext.integrity import checkpoint as checkpoints
from areal_vllm_ext.integrity import digest
from areal_vllm_ext.protocol import Ack, Begin, Disk, Error, Prepare, Sender, WorkerDone
from areal_vllm_ext.protocol.server import ReplyTo
from areal_vllm_ext.transport.base import CompletedWork
from areal_vllm_ext.transport.disk import DiskSource
from areal_vllm_ext.transport.shared_memory import SharedMemorySource
from areal_vllm_ext.transport.tcp import TcpWork
from harness.simulated_engine import Deployment, Shape, deployed

if TYPE_CHECKING:
    import torch

__all__ = ["checkpoint", "group", "served", "shared_engines"]


def flipped(start: Callable[..., CompletedWork]) -> Callable[..., CompletedWork]:
    """As ``start``, with a bit of the third tensor flipped, on every second call: one worker of each engine."""
    calls = itertools.count()

    def damaged(*arguments: Any) -> CompletedWork:
        arrived = start(*arguments)
        if next(calls) % 2:
            _, bucket, buffer, *_ = arguments
            buffer[bucket.segments[2].offset + 5] ^= 4
        return arrived

    return damaged


def test_bytes_that_change_on_their_way_abort_the_update_and_are_named(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(group, weights(1), 1, transport="shared_memory")
    served.weights.clear()
    for engine in served.deployment.engines.values():
        engine.calls.clear()
    monkeypatch.setattr(SharedMemorySource, "start", flipped(SharedMemorySource.start))
    with pytest.raises(
        UpdateAborted, match=r"DP rank \d .*worker \d: bucket 0: .*layer.1 arrived with other bytes"
    ) as e:
        send(group, weights(2), 2, transport="shared_memory")
    assert "memory and network" in str(e.value)
    assert_untouched(served)
    assert {state.version for state in group.status()} == {1}


def test_zeros_that_a_broadcast_leaves_are_seen(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = TcpWork.wait

    def leaves_zeros(self: TcpWork, *arguments: Any) -> torch.Tensor:
        buffer = wait(self, *arguments)
        return buffer.zero_() if threading.current_thread().name.startswith("areal-receive") else buffer

    monkeypatch.setattr(TcpWork, "wait", leaves_zeros)
    with pytest.raises(UpdateAborted, match="embed arrived with other bytes"):
        send(group, weights(2), 2, transport="broadcast")
    assert_untouched(served)


def test_a_file_that_one_node_reads_otherwise_aborts_the_update(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file(weights(1), tmp_path / "model.safetensors")
    load_all = DiskSource.load_all
    readers: list[DiskSource] = []

    def stale(self: DiskSource) -> Any:
        readers.append(self)
        first = len(readers) == 1
        for name, tensor in load_all(self):
            yield name, tensor + 1 if name == "norm" and first else tensor

    monkeypatch.setattr(DiskSource, "load_all", stale)
    with pytest.raises(UpdateAborted, match="holds other weights than"):
        send(group, tmp_path, 2)
    assert_untouched(served)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_status_tells_the_manifest_of_what_is_served(
    served: Served, group: EngineGroup, transport: str, tmp_path: Path
) -> None:
    save_file(weights(1), tmp_path / "model.safetensors")
    expected = digest.manifest(checkpoints.contents(tmp_path).values())
    options = {} if transport == "disk" else {"transport": transport}
    send(group, tmp_path if transport == "disk" else weights(1), 1, **options)
    assert {state.weights for state in group.status()} == {expected}
    send(group, weights(2), 2)
    assert {state.weights for state in group.status()} != {expected}


def test_engines_whose_votes_differ_keep_their_weights(key: Any, key_file: Path, checkpoint: Path) -> None:
    with deployed(key, 3, shape=Shape(model=str(checkpoint))) as deployment:
        deployment.wait_attached()
        with EngineGroup.connect(deployment.directory, key_file=key_file) as client:
            client.wait_ready(3, timeout=10)
            assert {state.weights for state in client.status()} == {""}
            deployment.engines[1].manifest = "another"
            with pytest.raises(UpdateAborted, match=r"holds other weights than DP rank \d"):
                send(client, checkpoint)
            deployment.engines[1].seconds["prepare"] = 0.2  # the last to vote
            with pytest.raises(UpdateAborted, match=r"DP rank 1 .* holds other weights than DP rank [02]"):
                send(client, checkpoint)
            with pytest.raises(UpdateAborted, match=r"DP rank 1 .* holds other weights than the trainer"):
                Sent(deployment).vote(1)
    assert all(engine.commits == [] for engine in deployment.engines.values())


class Sent:
    """A coordinator that knows what it sent, before the votes."""

    def __init__(self, deployment: Deployment) -> None:
        self.names = [engine.name for engine in deployment.engines.values()]
        self.coordinator = Coordinator("u", 1, {name: Member(1) for name in self.names})
        self.coordinator.begin({name: {0: Sender(transfer=Disk(path="/"))} for name in self.names}, 10)
        for name in self.names:
            self.coordinator.answered(name, Ack(), 10)
        self.coordinator.sent({0: 1}, "sent")

    def vote(self, wrong: int) -> None:
        for place, name in enumerate(self.names):
            self.coordinator.answered(name, Ack(manifest="received" if place == wrong else "sent"), 10)
        if self.coordinator.reason:
            raise UpdateAborted(self.coordinator.reason)


def test_workers_of_one_engine_that_hold_different_weights_vote_no() -> None:
    engine, caller = Participant(0, frozenset({0, 1})), ReplyTo(b"p", b"r")
    engine.handle(
        caller, Begin(epoch=1, update="u", version=1, senders={0: Sender(transfer=Disk(path="/"))}, timeout=10), 0.0
    )
    for rank in (0, 1):
        engine.worker_done(WorkerDone(update="u", rank=rank, step="begin"))
    engine.handle(caller, Prepare(epoch=1, update="u", buckets={0: 0}), 0.0)
    engine.worker_done(WorkerDone(update="u", rank=0, step="prepare", manifest="a"))
    (reply,) = engine.worker_done(WorkerDone(update="u", rank=1, step="prepare", manifest="b"))
    assert isinstance(reply, Reply)
    assert isinstance(reply.answer, Error)
    assert "worker 1: holds other weights than another worker" in reply.answer.message
    assert engine.update_phase == "receiving"
