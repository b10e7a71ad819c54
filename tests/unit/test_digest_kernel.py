"""The Triton kernel of digests, run by Triton's interpreter on the CPU, against torch's operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from areal_vllm_ext import digest

torch.manual_seed(0)
device = torch.device("cpu")
sizes = [0, 1, 2, 3, 4, 5, 255, 256, 257, 1023, 4096, 131072, 131073, 131071, 262144 + 8, 300_001]
tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
tensors += [torch.randn(65, 33).t(), torch.randn(1000, dtype=torch.bfloat16)[1:], torch.full((777,), -1, dtype=torch.int32)]
by_kernel, by_operators = digest._on_gpu(tensors, device), digest._by_operators(tensors)
assert by_kernel == by_operators, [size for size, one, two in zip(sizes, by_kernel, by_operators) if one != two]
assert len(set(by_kernel)) == len(tensors)
for place in (0, 5, 131070):
    tensors[13][place] ^= 16
    assert digest._on_gpu(tensors[13:14], device) != by_kernel[13:14]
    tensors[13][place] ^= 16
"""


def test_kernel_and_operators_agree() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
