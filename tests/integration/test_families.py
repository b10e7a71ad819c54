"""Updates of ten families of models, as ``python -m benchmarks.models`` tries all of them (``make test-models``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(620)]

ROOT = Path(__file__).parents[2]
# Biases, transposed weights, tied weights, scaled embeddings, fused projections, sliding windows.
PLANNED = ["qwen2", "gpt2", "llama tied", "gemma3", "phi3", "mistral", "opt"]
# Experts, which a CPU packs; in Mixtral and GLM-4 under other names than transformers gives them.
OTHERS = ["qwen3-moe", "mixtral", "glm4-moe"]


def test_ten_families_get_right_weights_by_each_way(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    command = [sys.executable, "-m", "benchmarks.models", *PLANNED, *OTHERS, "--out", str(out)]
    done = subprocess.run(
        [*command, "--sends", "module,state dict,one layer"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads(out.read_text())["families"]
    assert [rows[name]["sends"]["state dict"]["way"] for name in PLANNED] == ["plan"] * len(PLANNED)
