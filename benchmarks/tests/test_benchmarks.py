"""The benchmarks at their smallest, and what their numbers are made of."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from areal_vllm_ext.integrity import checkpoint
from benchmarks import bubble, load, overhead, plot, serving, sizes, update
from harness import report

ROOT = Path(__file__).parent.parent.parent


def run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AREAL_VLLM_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_fanout_measures_real_endpoints(tmp_path: Path) -> None:
    out = tmp_path / "fanout.json"
    printed = run("fanout", "--engines", "4", "--rounds", "2", "--out", str(out))
    result = json.loads(out.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    assert result["command"] == "python -m benchmarks.fanout --engines 4 --rounds 2"
    assert [row["engines"] for row in result["rows"]] == [1, 4]
    for row in result["rows"]:
        assert not row["aborted"]
        assert 0 < row["pause_ms"]["p50"] <= row["pause_ms"]["p99"] <= row["pause_ms"]["max"]
        assert row["transaction_ms"]["p50"] > 0


@pytest.mark.parametrize("size", ["tiny", "tiny-moe"])
def test_a_checkpoint_of_a_models_shape_is_one_and_takes_no_room(size: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    trainer = sizes.TrainerModel(size, torch.float32, torch.device("cpu"))
    torch.set_num_threads(threads)
    trainer.save(tmp_path, weights=False)
    described = {meta.name: meta.shape for meta in checkpoint.describe(str(tmp_path))}
    assert described == {name: tuple(tensor.shape) for name, tensor in trainer.weights()}
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > trainer.nbytes
    assert file.stat().st_blocks * 512 < trainer.nbytes / 10


def test_weights_follow_from_the_version_and_change_what_the_oracle_says() -> None:
    threads = torch.get_num_threads()
    trainer = sizes.TrainerModel("tiny", torch.float32, torch.device("cpu"))
    first = trainer.greedy([[10, 20, 30]], 8)
    trainer.set(1)
    assert trainer.greedy([[10, 20, 30]], 8) != first
    trainer.set(0)
    assert trainer.greedy([[10, 20, 30]], 8) == first
    torch.set_num_threads(threads)


def test_a_load_tells_gaps_that_an_update_touches_and_tokens_in_a_window() -> None:
    felt = load.Load(streams=[[(0.0, 1), (1.0, 2), (1.0001, 3), (4.0, 4)], [(2.0, 1), (2.5, 5)]])
    assert felt.gaps(0.2, 0.4) == [1.0]  # it began before and ended after
    assert felt.gaps(2.1, 2.2) == [pytest.approx(2.9999), 0.5]
    assert felt.gaps(5.0, 6.0) == []
    assert felt.tokens(0.0, 2.2) == 4
    assert felt.tokens(2.2, 5.0) == 5


def test_a_bubble_is_the_longest_gap_of_an_update_less_the_median_gap_without() -> None:
    stamps = [*(i * 0.1 for i in range(21)), 2.9, 3.0, 3.1, 3.2, 3.7, 3.8, 3.9, 4.0]
    felt = load.Load(streams=[[(moment, i + 1) for i, moment in enumerate(stamps)]])
    quiet, ours = bubble.Window("without updates"), bubble.Window("ours")
    quiet.start, quiet.end = 0.0, 1.95
    ours.start, ours.end, ours.updates = 1.95, 4.05, [(2.2, 2.6), (3.3, 3.5)]
    row = ours.row(felt, quiet, 1)
    assert row["longest_bubble_ms"] == pytest.approx(800.0)
    assert row["bubble_ms"] == pytest.approx(600.0)  # of 800 and 400
    assert row["of_quiet"] == pytest.approx((9 / 2.1) / (20 / 1.95), abs=1e-3)


def test_what_starts_servers_names_classes_that_are_there() -> None:
    module, _, name = serving.BASELINE_WORKER.rpartition(".")
    assert (ROOT / f"{module.replace('.', '/')}.py").read_text().count(f"class {name}(") == 1
    assert tuple(field.name for field in dataclasses.fields(overhead.Speed)) == overhead.FIGURES


def test_a_way_that_is_wrong_is_not_compared_with() -> None:
    rows = [
        {"way": "ours, broadcast", "right": True, "total_ms": 2.0, "pause_ms": 1.0},
        {"way": "AReaL's way", "right": False, "total_ms": 8.0, "pause_ms": 8.0},
        {"way": "AReaL's way, layerwise", "right": True, "total_ms": 10.0, "pause_ms": 10.0},
        {"way": "raw broadcast", "right": True, "total_ms": 1.0},
    ]
    assert update.compared(rows) == {
        "total, AReaL's way, layerwise / ours": 5.0,
        "pause, AReaL's way, layerwise / ours": 10.0,
    }
    assert update.compared(rows[1:]) == {}


def test_percentiles() -> None:
    values = [float(i) for i in range(1, 201)]
    assert report.percentile(values, 0.99) == 199.0
    assert report.percentile([3.0], 0.99) == 3.0


def test_the_plot_shows_what_was_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"way": "ours", "right": True, "total_ms": 20.0, "pause_ms": 2.0},
        {"way": "theirs", "right": False, "total_ms": 5.0, "pause_ms": 5.0},
    ]
    facts = {"bytes": 1000000, "tensors": 3, "machine": "2 cores"}
    (tmp_path / "update_here.json").write_text(json.dumps({**facts, "rows": rows}))
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    plot.main()
    drawn = (tmp_path / "updates.svg").read_text()
    assert "20, pause 2" in drawn
    assert "theirs" not in drawn
