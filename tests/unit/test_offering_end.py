"""An offer of weights leaves no socket open, however it ends."""

from __future__ import annotations

import contextlib
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from areal_vllm_ext.protocol.peer_messages import OfferWeights, WorkerOffered
from areal_vllm_ext.worker.offering import Offering


def offering(report: Any) -> Offering:
    served = SimpleNamespace(contents=None, compared=True, digests={}, changes=0)
    context: Any = SimpleNamespace(
        rank=0,
        device=torch.device("cpu"),
        model=torch.nn.Linear(2, 2),
        made=(),
        adapters=SimpleNamespace(find=lambda _: ()),
        live_weights=SimpleNamespace(served=lambda: served, layout="one"),
        residency=SimpleNamespace(access=contextlib.nullcontext),
    )
    return Offering(context, OfferWeights(fetch="f" * 32, committed_epoch=1, timeout=5.0), "127.0.0.1", report)


def assert_closed(address: str) -> None:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, int(port)), timeout=5).close()


def test_one_that_cannot_be_reported_is_closed() -> None:
    reports: list[WorkerOffered] = []

    def report(message: WorkerOffered) -> None:
        reports.append(message)
        if message.offer is not None:
            raise RuntimeError("the receiver has ended")

    offering(report)._run()
    assert reports[-1].error == "the receiver has ended"
    assert reports[0].offer is not None
    assert_closed(reports[0].offer.address)


def test_one_that_ends_before_it_listens_waits_for_no_worker() -> None:
    reports: list[WorkerOffered] = []
    one = offering(reports.append)
    one.end()
    started = time.monotonic()
    one._run()
    assert time.monotonic() - started < 5.0, "it would wait for 10 s"
    assert reports[-1].offer is not None
    assert_closed(reports[-1].offer.address)
