"""An engine's endpoint: what it says of itself, and that it leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from raw_client import RawClient
from safetensors.torch import save_file
from waiting import eventually

from areal_vllm_ext import protocol
from areal_vllm_ext.protocol import (
    Ack,
    DescribeWeights,
    Error,
    Fence,
    GetStatus,
    Pause,
    Status,
    TensorMeta,
    Weights,
    security,
)
from areal_vllm_ext.protocol import server as wire
from harness.simulated_engine import Deployment, Shape, deployed

Raw = Callable[..., RawClient]


def test_status_tells_the_state_without_asking_the_engine(deployment: Deployment, raw: Raw) -> None:
    engine = deployment.engines[1]
    engine.requests = 3
    client = raw(engine.endpoint.address)
    status = client.ask(GetStatus())
    assert isinstance(status, Status)
    assert status.engine == engine.endpoint.info
    assert (status.version, status.update_phase, status.generation, status.epoch, status.requests_running) == (
        0,
        "idle",
        "running",
        0,
        3,
    )
    assert engine.calls == []


def test_a_fence_raises_the_epoch_and_tells_the_status(deployment: Deployment, raw: Raw) -> None:
    client = raw(deployment.engines[0].endpoint.address)
    status = client.ask(Fence(epoch=9))
    assert isinstance(status, Status)
    assert status.epoch == 9
    for late in (Fence(epoch=8), Pause(epoch=8, mode="keep", kv="keep", timeout=1.0)):
        refusal = client.ask(late)
        assert isinstance(refusal, Error)
        assert refusal.kind == "fenced"
    assert isinstance(client.ask(Pause(epoch=9, mode="keep", kv="keep", timeout=5.0)), Ack)


def test_the_checkpoint_is_described_from_its_headers_once(key: security.ClusterKey, raw: Raw, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with deployed(key, 1, shape=Shape(model=str(tmp_path))) as one:
        client = raw(one.engines[0].endpoint.address)
        wanted = Weights(tensors=(TensorMeta("w", "float32", (2, 3)),))
        assert client.ask(DescribeWeights()) == wanted
        (tmp_path / "model.safetensors").unlink()
        assert client.ask(DescribeWeights()) == wanted


def test_a_checkpoint_that_cannot_be_told_is_said_with_the_cause(
    key: security.ClusterKey, raw: Raw, tmp_path: Path
) -> None:
    with deployed(key, 1, shape=Shape(model=str(tmp_path))) as one:
        answer = raw(one.engines[0].endpoint.address).ask(DescribeWeights())
        assert isinstance(answer, Weights)
        assert answer.tensors == ()
        assert "holds no *.safetensors file" in answer.error


def test_a_worker_that_comes_back_is_not_a_second_worker(key: security.ClusterKey, raw: Raw) -> None:
    with deployed(key, 1, shape=Shape(workers=2)) as one:
        one.wait_attached()
        one.workers.attach(one.engines[0], 1)
        client = raw(one.engines[0].endpoint.address)
        eventually(lambda: isinstance(client.ask(GetStatus()), Status))
        status = client.ask(GetStatus())
        assert isinstance(status, Status)
        assert [worker.rank for worker in status.engine.workers] == [0, 1]


def test_an_engine_is_not_registered_before_all_its_workers_are_there(key: security.ClusterKey) -> None:
    with deployed(key, 1, shape=Shape(workers=2), simulate_workers=False) as one:
        one.workers.attach(one.engines[0], 0)
        assert not one.engines[0].endpoint.wait_attached(0.3)
        assert not one.engines[0].endpoint.wait_registered(0.01)
        one.workers.attach(one.engines[0], 1)
        assert one.engines[0].endpoint.wait_attached(5.0)


def test_an_endpoint_that_stops_leaves_no_thread_and_no_file_open(key: security.ClusterKey) -> None:
    def open_now() -> tuple[int, int]:
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    with deployed(key, 2) as two:
        two.wait_attached()
    before = open_now()
    for _ in range(3):
        with deployed(key, 2) as two:
            two.wait_attached()
    eventually(lambda: all(now <= then for now, then in zip(open_now(), before, strict=True)))


def test_stopping_twice_and_before_the_start_is_fine(key: security.ClusterKey) -> None:
    with deployed(key, 1) as one:
        one.engines[0].endpoint.stop()
        one.engines[0].endpoint.stop()


def test_a_directory_that_is_away_costs_an_engine_nothing(key: security.ClusterKey, raw: Raw, free_port: int) -> None:
    with deployed(key, 1, directory=f"tcp://127.0.0.1:{free_port}") as one:
        one.wait_attached()
        assert isinstance(raw(one.engines[0].endpoint.address).ask(GetStatus()), Status)


def test_a_flood_of_requests_is_answered_and_memory_is_bounded(deployment: Deployment, raw: Raw) -> None:
    client, other = raw(deployment.engines[0].endpoint.address), raw(deployment.engines[0].endpoint.address)
    hello = protocol.encoder.encode(protocol.Hello())
    for number in range(4300):
        client.send(number.to_bytes(16, "big"), hello)
        if number % 500 == 0:
            assert isinstance(other.ask(GetStatus()), Status)
    eventually(lambda: isinstance(client.ask(GetStatus()), Status))
    peers = 3  # these two and the worker
    assert len(deployment.engines[0].endpoint._server._answers) <= peers * wire._KEPT_ANSWERS
