"""The Triton kernel of digests, run by Triton's interpreter on the CPU, against torch's operators."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

SCRIPT = """
import torch
from areal_vllm_ext.integrity import digest, digest_torch, digest_triton

torch.manual_seed(0)
device = torch.device("cpu")
digest_triton._ROWS = 32  # of 256 bytes; a program of 512 rows takes the interpreter 16 times as long
sizes = [0, 1, 2, 3, 4, 5, 255, 256, 257, 1023, 4096, 7936, 8192, 8193, 8191, 16384 + 8, 20_001]
tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
tensors += [torch.randn(65, 33).t(), torch.randn(1000, dtype=torch.bfloat16)[1:], torch.full((777,), -1, dtype=torch.int32)]
by_kernel, by_operators = digest._on_gpu(tensors, device)[0], digest_torch.digests_of(tensors)
assert by_kernel == by_operators, [size for size, one, two in zip(sizes, by_kernel, by_operators) if one != two]
assert len(set(by_kernel)) == len(tensors)
for place in (0, 5, 8190):
    tensors[14][place] ^= 16
    assert digest._on_gpu(tensors[14:15], device)[0] != by_kernel[14:15]
    tensors[14][place] ^= 16
"""

# In each dtype: the largest values are finite; NaN and the infinities are seen wherever they are, in a row that is cut too.
VALUES = """
import torch
from areal_vllm_ext.integrity import digest, digest_torch, digest_triton
from areal_vllm_ext.integrity.digest_triton import LANES

device = torch.device("cpu")
digest_triton._ROWS = 32
looked_at = [dtype for dtype in LANES if dtype.is_floating_point]
assert len(looked_at) == 5
for dtype in looked_at:
    largest = torch.finfo(dtype).max
    good = torch.full((700,), largest).to(dtype)
    good[::2] = -good[::2].float().to(dtype) if dtype.itemsize > 1 else torch.tensor(-largest).to(dtype)
    good[5:9] = 0
    bad = []
    for value in (float("nan"), float("inf"), float("-inf")):
        if value != value or dtype != torch.float8_e4m3fn:
            for place in (0, 1, 2, 3, 255, 256, 697, 699):
                bad.append(good.clone())
                bad[-1][place] = value
    everything = [good, *bad, torch.zeros(0, dtype=dtype), torch.full((9,), -1, dtype=torch.int64)]
    values, finite = digest._on_gpu(everything, device, check_finite=True)
    assert finite == [True, *[False] * len(bad), True, True], (dtype, finite)
    assert values == digest_torch.digests_of(everything), dtype
"""


def test_kernel_and_operators_agree() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", SCRIPT + VALUES]  # in one process, because each imports torch and Triton
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
