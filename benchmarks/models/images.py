"""What a vision model is asked: two pictures, and the processor that its checkpoint needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from areal_vllm_ext.demo.model import VOCABULARY, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "red0 green1 ."
IMAGE_TOKEN = len(VOCABULARY)
SIDE, PATCH, QUERY_TOKENS = 32, 8, 4


def processor() -> Any:
    """Return BLIP-2's processor with the demo's tokenizer. Unlike most, it needs no torchvision, which has no CPU build."""
    from transformers import Blip2Processor, BlipImageProcessor

    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return Blip2Processor(images, make_tokenizer(), num_query_tokens=QUERY_TOKENS)


def save_processor(folder: Path) -> None:
    processor().save_pretrained(folder)


def pictures() -> list[Any]:
    """Return two pictures of noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(2)]
