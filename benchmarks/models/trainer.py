"""The trainer's side of a trial: one model with three sets of weights, and the ways to send them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from areal_vllm_ext import named_weights
from areal_vllm_ext.demo.model import make_tokenizer

from . import images
from .engine import Said, hugging_face_says

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .families import Family

# What is sent, in this order: each kind of send, and the set of weights that it brings.
SENDS = [
    ("module", "one"),
    ("state dict", "two"),
    ("iterable", "one"),
    ("disk", "two"),
    ("one layer", "three"),
    ("kept buffers", "one"),
    ("kept buffers again", "two"),
]


class Trainer:
    """A tiny random model of a family."""

    def __init__(self, family: Family) -> None:
        import transformers

        torch.manual_seed(0)
        self._family = family
        config = family.make_config()
        self.model: Any = getattr(transformers, family.auto).from_config(config, dtype=torch.float32).eval()
        self.model.to(getattr(torch, family.dtype))
        self.model.generation_config = transformers.GenerationConfig(pad_token_id=1)
        self.model.requires_grad_(False)
        self._trained = [
            *self.model.parameters(),
            *(
                one
                for name, one in self.model.named_buffers()
                if name in self.model.state_dict() and one.is_floating_point()
            ),
        ]
        self._base = [one.clone() for one in self._trained]

    def set(self, weights: str) -> None:
        """Set the weights named ``zero``, ``one``, ``two``, or ``three``, in which one layer differs from ``two``."""
        generator = torch.Generator().manual_seed({"zero": 0, "one": 1, "two": 2, "three": 2}[weights])
        for tensor, base in zip(self._trained, self._base, strict=True):
            tensor.copy_(base + torch.randn(tensor.shape, generator=generator) * 0.05)
        if weights == "three":
            matrices = [one for one in self._trained if one.dim() == 2]
            changed = matrices[len(matrices) // 2]
            changed.add_(torch.randn(changed.shape, generator=generator) * 0.1)

    def says(self) -> Said | None:
        """Return what the model itself says; None where it is no oracle for an engine."""
        for module in self.model.modules():
            # Where vLLM has no model of its own, it makes the classes of transformers' model compile, in this process too.
            vars(module).setdefault("do_not_compile", True)
        text = self._family.task in ("generate", "image")
        if not text or self._family.dtype != "float32" or self._family.quantize:
            return None
        return hugging_face_says(self._family, self.model)

    def save(self, folder: Path) -> Path:
        """Save a checkpoint from which an engine can start."""
        self.model.save_pretrained(folder)
        if self._family.task == "image":
            images.save_processor(folder)
        else:
            make_tokenizer().save_pretrained(folder)
        if self._family.drafter:
            self.model.save_pretrained(folder / "drafter")
            make_tokenizer().save_pretrained(folder / "drafter")
        if self._family.quantize:
            self._family.quantize(folder)
        return folder

    def to_send(self, kind: str, folder: Path) -> Any:
        """Return what a trainer gives for this kind of send; None if this trainer has no such thing.

        Args:
            kind: of send.
            folder: gets a checkpoint of the set of weights that is to be sent, unless it is there.
        """
        if not folder.exists():
            self.save(folder)
        if kind == "disk":
            return folder
        if self._family.quantize:
            from safetensors.torch import load_file

            tensors = load_file(folder / "model.safetensors")
            return None if kind == "module" else _strided(tensors.items()) if kind == "iterable" else tensors
        if kind == "state dict":
            return self.model.state_dict()
        if kind == "iterable":
            return _strided(named_weights(self.model))
        return self.model


def _strided(pairs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors that are not contiguous, and of another dtype where that loses nothing."""
    for name, tensor in pairs:
        wide = tensor.double() if tensor.is_floating_point() and tensor.itemsize >= 2 else tensor
        yield name, wide.t().contiguous().t() if wide.dim() == 2 else wide
