"""Layers whose weight is packed for a kernel, so that no live tensor shows it: vLLM's linear layers and heads on a CPU.

vLLM packs them in the reload, while requests wait. Here a plan knows which parts of incoming tensors are packed for which
layer, so that it is done beside generation, by vLLM's own function, and the switch is an assignment for each layer.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from ...integrity import digest
from ...transport import host_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .plan import Copy, Recorder

# Where vLLM keeps what computes with the packed weight.
ATTRIBUTE = "cpu_linear"


class Packing:
    """What is packed for one layer."""

    def __init__(self, layer: torch.nn.Module, weight: torch.Tensor, copies: tuple[Copy, ...]) -> None:
        """
        Args:
            layer: gets what computes with it.
            weight: as it was packed; contiguous.
            copies: what it was made of, with places in it.
        """
        self.layer, self.shape, self.dtype = layer, weight.shape, weight.dtype
        self.copies = copies
        self.digest = digest.digests_of([weight])[0]

    def alone(self, tensor: torch.Tensor) -> bool:
        """Whether the weight is all of ``tensor``, which one of the copies is of."""
        copy = self.copies[0]
        return (
            len(self.copies) == 1 and (tensor.dtype, tensor.shape) == (self.dtype, self.shape) and copy.to == copy.part
        )


class Weight:
    """A weight that is put together for a layer, to be packed when all of it is there; what nobody brings is padding, zero."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self._missing = len(packing.copies)
        self._whole: torch.Tensor | None = None

    def add(self, copies: list[tuple[Copy, torch.Tensor]]) -> bool:
        """Take in incoming tensors, each with the copy that is made of it. Returns whether the weight is there."""
        packing = self.packing
        for copy, tensor in copies:
            if packing.alone(tensor):
                self._whole = tensor
            else:
                if self._whole is None:
                    nbytes = packing.shape.numel() * packing.dtype.itemsize
                    self._whole = host_memory.zeros(nbytes).view(packing.dtype).view(packing.shape)
                copy.to.of(self._whole).copy_(copy.part.of(tensor))
        self._missing -= len(copies)
        return not self._missing

    def whole(self) -> torch.Tensor:
        """All of it; it is let go of."""
        whole, self._whole = self._whole, None
        assert whole is not None
        return whole


def packed(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """What computes with ``weight``, as vLLM would make it for a layer of this shape. On any thread: nothing runs yet.

    oneDNN packs into memory of this weight's own; its matrix products, not this, use memory that all layers share.

    Raises:
        RuntimeError: it was not packed.
    """
    from vllm.model_executor.layers import utils

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    linear: Callable[..., torch.Tensor] | None = getattr(layer, ATTRIBUTE, None)
    if linear is None or layer.weight.numel():
        raise RuntimeError(f"vLLM does not pack a weight of {tuple(weight.shape)} any more: is the host out of memory?")
    return linear


@contextlib.contextmanager
def noted(recorder: Recorder) -> Iterator[None]:
    """Have ``recorder`` know what vLLM packs meanwhile. For CPUs."""
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm

    def pack_and_tell(layer: Any, remove_weight: bool) -> None:
        before, weight = getattr(layer, ATTRIBUTE, None), layer.weight
        with recorder.unwatched():
            pack(layer, remove_weight)
        if getattr(layer, ATTRIBUTE, None) is not before:
            recorder.packed(layer, weight.detach())

    utils.dispatch_cpu_unquantized_gemm = pack_and_tell
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack
