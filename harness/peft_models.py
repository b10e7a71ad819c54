"""Models of transformers with a LoRA adapter of peft that changes their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_adapter(model: PreTrainedModel, seed: int, scale: float, **settings: Any) -> Any:
    """Return a ``PeftModel`` around ``model``.

    Args:
        model: becomes part of it.
        seed: of the adapter's weights.
        scale: their standard deviation.
        settings: of ``peft.LoraConfig``.
    """
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapted
