"""Real vLLM with its own data parallelism on Ray: an engine in an actor on each of two nodes, and three updates."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from harness.network import missing

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


def test_dense_engines_in_actors(tmp_path: Path) -> None:
    """Dense ones believe in DP=1, so they know of each other only what they were told."""
    command = [sys.executable, "-m", "benchmarks.ray_data_parallel", "--dense", "--logs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=390, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["dp_ranks"] == [[0, 2], [1, 2]]
    assert facts["token_exact"] == [True] * 4
    assert len(set(facts["nodes"])) == 2
