"""Makes quantised checkpoints out of saved ones, in the format of compressed-tensors. The rounding is the simplest there is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_GROUP = 32


def to_int8(folder: Path) -> None:
    """Eight bits for weights, by row, and for inputs, by token."""

    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / 127
        return {f"{name}.weight": (weight / scale).round().to(torch.int8), f"{name}.weight_scale": scale}

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    _convert(folder, convert, "int-quantized", {"weights": weights, "input_activations": inputs})


def to_int4(folder: Path) -> None:
    """Four bits for weights, by groups of 32 in a row."""

    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, columns = weight.shape
        groups = weight.view(rows, columns // _GROUP, _GROUP)
        scale = groups.abs().amax(dim=2, keepdim=True).clamp(min=1e-5) / 7
        values = ((groups / scale).round().clamp(-8, 7) + 8).to(torch.int64).view(rows, columns // 8, 8)
        packed = (values << torch.arange(0, 32, 4)).sum(dim=2)
        packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        return {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": scale.squeeze(2).to(torch.bfloat16),
            f"{name}.weight_shape": torch.tensor([rows, columns]),
        }

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": _GROUP,
        "dynamic": False,
    }
    _convert(folder, convert, "pack-quantized", {"weights": weights})


def _convert(
    folder: Path, convert: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], format_: str, group: dict[str, Any]
) -> None:
    file = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        if ".layers." in name and tensor.dim() == 2:
            tensors |= convert(name.removesuffix(".weight"), tensor.float())
        else:
            tensors[name] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": format_,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"]} | group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(described))
