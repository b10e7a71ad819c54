"""8-bit weights on a CPU: vLLM's own kernel after a reload of its layer, and the proof that looks into it."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lazily import Lazily

from areal_vllm_ext.worker import hooks
from areal_vllm_ext.worker.load.proof import different, packed_digests

ops = Lazily("vllm._custom_ops")

ROWS, COLUMNS = 64, 128


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops

    monkeypatch.setattr(_custom_ops, "create_onednn_scaled_mm", _custom_ops.create_onednn_scaled_mm)  # to put it back
    hooks.keep_scales_of_int8_weights_on_cpu()


class Int8(torch.nn.Module):
    """A layer as vLLM leaves it: oneDNN has the weight, and the layer has its scales."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.input_size, self.params_dtype = COLUMNS, torch.bfloat16
        self.quant_method = SimpleNamespace(apply=self.apply_weights)
        self.load(seed)

    def load(self, seed: int) -> None:
        """Load as a reload does: the kernel is made of temporary tensors, which are gone afterwards."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8, generator=generator)
        scales = torch.rand(ROWS, 1, generator=generator) + 0.5
        self.weight_scale = torch.nn.Parameter(scales.clone(), requires_grad=False)
        self.handler = ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False, 32)
        self.expected = weight.float() * scales
        scales_memory = scales.data_ptr()
        del scales
        gc.collect()
        # The allocator gives memory that is free again to the next tensor of this size.
        self.others = [torch.full((ROWS, 1), 9.0) for _ in range(64)]
        self.freed = any(one.data_ptr() == scales_memory for one in self.others)

    def apply_weights(self, layer: Any, inputs: torch.Tensor, bias: Any = None) -> torch.Tensor:
        values, scales, zeros = ops.onednn_scaled_int8_quant(inputs, None, None, True)
        out = torch.empty(inputs.shape[0], ROWS, dtype=inputs.dtype)
        ops.onednn_scaled_mm(layer.handler, values, out, scales, zeros, None, bias)
        return out


def test_a_kernel_has_its_scales_for_as_long_as_it_lives(patched: None) -> None:
    layer = Int8(1)
    assert not layer.freed
    answer = layer.apply_weights(layer, torch.eye(COLUMNS, dtype=torch.bfloat16))
    assert torch.allclose(answer.float().t(), layer.expected, rtol=0.01)


def test_the_proof_asks_layers_whose_kernel_has_the_weight(patched: None) -> None:
    live, fresh = torch.nn.Sequential(Int8(1)), torch.nn.Sequential(Int8(1))
    assert packed_digests(live).keys() == {"0 (packed)"}
    assert different(packed_digests(live), packed_digests(fresh)) == []
    with torch.no_grad():
        live[0].handler.areal_scales.mul_(2)  # what no parameter shows
    assert different(packed_digests(live), packed_digests(fresh)) == ["0 (packed)"]
