"""What a vision model is asked: two pictures, and the processor that its checkpoint needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from areal_vllm_ext.demo.model import UNKNOWN, VOCABULARY, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "red0 green1 ."
IMAGE_TOKEN = len(VOCABULARY)
SIDE, PATCH = 32, 8


def processor() -> Any:
    """Return a processor of PaliGemma's kind with the demo's tokenizer."""
    from transformers import PaliGemmaProcessor, SiglipImageProcessor

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "bos_token": UNKNOWN})
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // PATCH) ** 2
    return PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)


def save_processor(folder: Path) -> None:
    processor().save_pretrained(folder)


def pictures() -> list[Any]:
    """Return two pictures of noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(2)]
