"""The trace of an update: of real endpoints and real receivers, and what becomes of it where something is missing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from real_receivers import WORKERS, awaiting_workers, connected, save, set_bucket_bytes, vllm_config

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.observability import trace
from areal_vllm_ext.observability.spans import SpanRecorder, clock_offset
from areal_vllm_ext.protocol import EngineInfo, GetTrace, Span, security
from areal_vllm_ext.worker import sender_stream
from areal_vllm_ext.worker.extension import WorkerExtension
from areal_vllm_ext.worker.receiver import Receiver
from harness.simulated_engine import NEVER, Deployment, Shape, SimulatedEngine, deployed

NANOSECOND = 1e-3  # in a trace's microseconds


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"layer.{number}": torch.randn(64, 16) for number in range(6)}


class Worker(WorkerExtension):
    """What the extension and its receiver ask of vLLM's worker."""

    def __init__(self, rank: int, checkpoint: Path, key_file: Path) -> None:
        self.rank = rank
        self.device = torch.device("cpu")
        self.loaded: dict[str, torch.Tensor] = {}
        self.vllm_config = vllm_config(checkpoint, key_file, parallel_config=SimpleNamespace(enable_eplb=True))
        self._areal_receiver: Receiver

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.loaded = {name: tensor.clone() for name, tensor in weights_iterator}

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory, weights(0))


@pytest.fixture(scope="module")
def engines(key: security.ClusterKey, key_file: Path, checkpoint: Path) -> Iterator[Deployment]:
    """Two engines of two workers, which really receive, stage and commit."""
    with awaiting_workers(key, checkpoint) as deployment:
        for engine in deployment.engines.values():
            attach(engine, [Worker(rank, checkpoint, key_file) for rank in range(WORKERS)])
        deployment.wait_attached()
        yield deployment


def attach(engine: SimulatedEngine, workers: list[Worker]) -> None:
    for one in workers:
        one.areal_attach(engine.endpoint.address, engine.endpoint.attach_token)
        one._areal_receiver.context.live_weights._proven = frozenset(weights(0))  # there is no vLLM to load them afresh

    def commit(update: str) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            assert all(unproven == "" for _, unproven in pool.map(lambda one: one.areal_commit(update), workers))

    engine.staged = commit


@pytest.fixture
def group(engines: Deployment, key_file: Path) -> Iterator[EngineGroup]:
    with connected(engines, key_file) as client:
        yield client


def update(group: EngineGroup, path: Path | None, seed: int = 1, bucket_bytes: int = 8192, **options: Any) -> None:
    """In buckets of a few tensors."""
    opened = group.update(seed, **{"timeout": 20.0, "trace": path, **options})
    set_bucket_bytes(opened, bucket_bytes)
    with opened:
        opened.send(weights(seed))


class File:
    """A trace as a viewer reads it: by process and thread, names with their start and end in microseconds."""

    def __init__(self, path: Path) -> None:
        whole = json.loads(path.read_text())
        assert set(whole) == {"traceEvents", "displayTimeUnit", "otherData"}
        self.about = whole["otherData"]
        names: dict[tuple[int, int | None], str] = {}
        self.rows: dict[tuple[str, str, int], list[tuple[float, float, str]]] = {}
        for event in whole["traceEvents"]:
            if event["name"] == "process_name":
                names[event["pid"], None] = event["args"]["name"]
            elif event["name"] == "thread_name":
                names[event["pid"], event["tid"]] = event["args"]["name"]
        for event in whole["traceEvents"]:
            if event["ph"] == "X":
                row = names[event["pid"], None], names[event["pid"], event["tid"]], event["tid"]
                self.rows.setdefault(row, []).append((event["ts"], event["ts"] + event["dur"], event["name"]))
        self.processes = [names[key] for key in names if key[1] is None]

    def spans(self, process: str, track: str) -> dict[str, tuple[float, float]]:
        """By name; ``process`` is how its name begins."""
        return {
            name: (start, end)
            for (whose, which, _), entries in self.rows.items()
            if whose.startswith(process) and which == track
            for start, end, name in entries
        }

    def assert_nested(self) -> None:
        """Of two spans in a row, one ends before the other starts, or holds it."""
        for entries in self.rows.values():
            under_way: list[float] = []
            for start, end, name in sorted(entries, key=lambda one: (one[0], -one[1])):
                while under_way and under_way[-1] <= start + NANOSECOND:
                    under_way.pop()
                assert not under_way or end <= under_way[-1] + NANOSECOND, name
                under_way.append(end)


def lies_in(inner: tuple[float, float], outer: tuple[float, float]) -> bool:
    return outer[0] - NANOSECOND <= inner[0] and inner[1] <= outer[1] + NANOSECOND


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
def test_every_engine_and_every_worker_is_in_the_trace(
    engines: Deployment, group: EngineGroup, transport: str, tmp_path: Path
) -> None:
    update(group, tmp_path / "trace.json", transport=transport)
    found = File(tmp_path / "trace.json")
    found.assert_nested()
    assert found.processes[1:] == [engine.name for engine in engines.engines.values()]
    assert found.processes[0].startswith("trainer")
    assert found.about["committed"] is True

    phases = found.spans("trainer", "update")
    assert list(phases) == ["lease", "begin", "send", "prepare", "pause", "commit", "resume"]
    starts = [start for start, _ in phases.values()]
    assert starts == sorted(starts)
    sent = found.spans("trainer", "sending")
    for what in ("fill", "digest"):
        assert [name for name in sent if name.startswith(what)] == [f"{what} {number}" for number in range(3)]
    assert lies_in(sent["digest 0"], phases["send"])
    started = [name for name in sent if name.startswith("start")]
    assert started == ([f"start {number}" for number in range(3)] if transport == "broadcast" else [])
    announced = found.spans("trainer", "announced")
    assert set(announced) == {f"announce {number}" for number in range(3)}

    for engine in found.processes[1:]:
        requests = found.spans(engine, "requests")
        assert set(requests) == {"begin", "bucket 0", "bucket 1", "bucket 2", "prepare", "pause", "commit", "resume"}
        for name, phase in (("begin", "begin"), ("prepare", "prepare"), ("pause", "pause"), ("commit", "commit")):
            assert lies_in(requests[name], phases[phase]), "trainer and engine share this host's clock"
        assert {"receiving", "prepared", "committing"} == set(found.spans(engine, "update"))
        assert "paused" in found.spans(engine, "generation")
        for rank in range(WORKERS):
            intake = found.spans(engine, f"worker {rank}, from sender 0")
            buckets = {f"{what} {number}" for number in range(3) for what in ("receive", "bucket")}
            assert set(intake) == {"open", "prepare", "stage", "digest", "take"} | buckets
            assert lies_in(intake["digest"], intake["bucket 2"]), "the last one of this name"
            assert lies_in(intake["bucket 1"], phases["send"])
            commit = found.spans(engine, f"worker {rank}")
            assert set(commit) == {"build shadow", "load", "prove"}
            assert lies_in(commit["build shadow"], requests["prepare"])
            assert lies_in(commit["load"], requests["commit"])


def test_nothing_is_recorded_unless_it_is_asked_for(engines: Deployment, group: EngineGroup, tmp_path: Path) -> None:
    update(group, tmp_path / "trace.json")
    update(group, None, seed=2)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    for engine in engines.engines.values():
        assert engine.endpoint.tracing.spans.snapshot() == ()


def test_an_aborted_update_has_a_trace_of_what_there_was(
    engines: Deployment, group: EngineGroup, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"

    def trainer_fails() -> None:
        with group.update(1, timeout=20, trace=path) as opened:
            opened.send(weights(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer_fails()
    found = File(path)
    found.assert_nested()
    assert found.about["committed"] is False
    assert found.about["given_up"] == "ZeroDivisionError: "
    assert list(found.spans("trainer", "update")) == ["lease", "begin", "send", "abort"]
    for engine in engines.engines.values():
        assert set(found.spans(engine.name, "requests")) == {"begin", "bucket 0", "abort"}
        for rank in range(WORKERS):
            assert "bucket 0" in found.spans(engine.name, f"worker {rank}, from sender 0")


def test_a_worker_that_hangs_is_seen_where_it_hangs(
    group: EngineGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = threading.Event()
    monkeypatch.setattr(sender_stream, "first_corrupt", lambda *_: freed.wait(20) and None)
    try:
        with pytest.raises(UpdateAborted):
            update(group, tmp_path / "trace.json", timeout=1.0)
    finally:
        freed.set()
    found = File(tmp_path / "trace.json")
    found.assert_nested()
    for engine in found.processes[1:]:
        intake = found.spans(engine, "worker 0, from sender 0")
        assert {"bucket 0 (not over)", "digest (not over)"} <= set(intake)


def test_an_engine_or_a_worker_that_does_not_tell_is_missing_and_no_error(
    key: security.ClusterKey, key_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trace.json"
    with (
        deployed(key, 3, shape=Shape(workers=2)) as deployment,
        EngineGroup.connect(deployment.directory, key_file=key_file) as client,
    ):
        deployment.wait_attached()
        client.wait_ready(3, timeout=10)
        names = [engine.name for engine in deployment.engines.values()]
        deployment.engines[2].seconds["trace"] = NEVER
        deployment.engines[1].endpoint.tracing.ask = lambda *_: []  # type: ignore[method-assign] # it never answers
        started = time.monotonic()
        with client.update(1, timeout=20, trace=path) as opened:
            opened.send("/nothing")
        assert time.monotonic() - started < 4
        assert opened.result.lost == {}
    found = File(path)
    assert found.processes[1:] == [names[0], names[2]]
    assert f"{names[2]}: worker 1 did not answer in time" in caplog.text
    assert f"{names[1]}: tcp://" in caplog.text


def test_a_trace_that_cannot_be_written_is_no_error(
    group: EngineGroup, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    update(group, tmp_path / "nowhere" / "trace.json")
    assert "No such file or directory" in caplog.text


def test_only_the_last_update_is_told_of(engines: Deployment, group: EngineGroup, raw: Any, tmp_path: Path) -> None:
    update(group, tmp_path / "trace.json")
    answer = raw(engines.engines[0].endpoint.address).ask(GetTrace(update="another", timeout=1.0))
    assert answer.kind == "state"


# What is recorded


def test_spans_are_bounded_and_tell_of_those_that_were_left_out() -> None:
    spans = SpanRecorder(4)
    for number in range(20_000):
        spans.add("intake", f"bucket {number}", number, number + 1)
    spans.add("intake", "prepare", 20_000, 20_001)
    taken = spans.snapshot()
    assert len(taken) == 6
    assert Span("intake", "bucket: 19996 more", 4, 20_000) in taken
    assert Span("intake", "prepare", 20_000, 20_001) in taken


def test_spans_that_are_off_keep_nothing() -> None:
    spans = SpanRecorder()
    with spans.span("track", "name"):
        spans.set_state("track", "state")
    assert list(spans.each("track", "item", [1, 2])) == [1, 2]
    assert spans.snapshot() == ()


def test_a_state_lasts_until_the_next() -> None:
    spans = SpanRecorder(8)
    for state in ("pausing", "pausing", "paused", "", ""):
        spans.set_state("generation", state)
    pausing, paused = spans.snapshot()
    assert (pausing.name, paused.name) == ("pausing", "paused")
    assert pausing.end <= paused.start


def test_readings_of_one_clock_are_taken_as_they_are() -> None:
    assert clock_offset(10.0, 10.4, 10.5, 11.0) == 0.0


@pytest.mark.parametrize("ahead", [-5000.0, -0.5, 0.5, 5000.0])
@pytest.mark.parametrize(("there", "back"), [(0.01, 0.01), (0.03, 0.01), (0.0, 0.05)])
def test_another_clock_is_off_by_half_of_the_way_at_most(ahead: float, there: float, back: float) -> None:
    sent, took = 100.0, 0.2
    received = sent + there + ahead
    found = clock_offset(sent, received, received + took, sent + there + took + back)
    assert abs(found + ahead) <= (there + back) / 2 + 1e-9


def test_what_overlaps_gets_rows_of_its_own() -> None:
    entries = [(0, 10, "a"), (2, 4, "in a"), (5, 12, "over a's end"), (10, 11, "after a"), (6, 7, "in both")]
    assert [[name for _, _, name in row] for row in trace.rows(entries)] == [
        ["a", "in a", "in both", "after a"],
        ["over a's end"],
    ]


def test_very_many_workers_keep_few_spans_each() -> None:
    def engines(count: int) -> list[EngineInfo]:
        return [SimpleNamespace(workers=(None,))] * count  # type: ignore[list-item]

    assert trace.spans_for(engines(2)) == trace.MAX_SPANS_PER_KIND
    assert trace.spans_for(engines(1024)) == 50_000 // 1024
    assert trace.spans_for(engines(10_000)) == 16
