"""Linear layers on a CPU, whose weight vLLM packs for oneDNN, so that no live tensor shows it.

vLLM packs these weights in its reload, while requests wait. A load plan knows which slices of which incoming tensors make
each packed weight. So the worker packs beside generation, with vLLM's own function, and the commit only assigns the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...integrity import digest
from ...transport import host_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from .strides import Copy

# The attribute in which vLLM keeps the function that computes with the packed weight.
ATTRIBUTE = "cpu_linear"


class Packing:
    """How the packed weight of one layer is made."""

    def __init__(self, layer: torch.nn.Module, weight: torch.Tensor, copies: tuple[Copy, ...]) -> None:
        """
        Args:
            layer: the layer that computes with the packed weight.
            weight: the weight before it was packed; contiguous.
            copies: the slices of incoming tensors that make up ``weight``, with their places in it.
        """
        self.layer, self.shape, self.dtype = layer, weight.shape, weight.dtype
        self.copies = copies
        self.digest = digest.digests_of([weight])[0]

    def is_all_of(self, tensor: torch.Tensor) -> bool:
        """Return whether the weight is exactly ``tensor``, which is the source of one of the copies."""
        copy = self.copies[0]
        return (
            len(self.copies) == 1
            and (tensor.dtype, tensor.shape) == (self.dtype, self.shape)
            and copy.target_slice == copy.source_slice
        )


class IncomingWeight:
    """The weight of a ``Packing`` while its slices arrive. Elements that no copy writes are padding, and zero."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self._missing = len(packing.copies)
        self._whole: torch.Tensor | None = None

    def add(self, copies: list[tuple[Copy, torch.Tensor]]) -> bool:
        """Add the slices of incoming tensors.

        Args:
            copies: each copy with its source tensor.

        Returns:
            whether the weight is complete.
        """
        packing = self.packing
        for copy, tensor in copies:
            if packing.is_all_of(tensor):
                self._whole = tensor
            else:
                if self._whole is None:
                    nbytes = packing.shape.numel() * packing.dtype.itemsize
                    self._whole = host_memory.zeros(nbytes).view(packing.dtype).view(packing.shape)
                copy.target_slice.view(self._whole).copy_(copy.source_slice.view(tensor))
        self._missing -= len(copies)
        return not self._missing

    def take(self) -> torch.Tensor:
        """Return the complete weight, and drop this object's reference to it."""
        whole, self._whole = self._whole, None
        assert whole is not None
        return whole


def pack(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return the function that computes with ``weight``, as vLLM makes it for a layer of this shape.

    Safe on any thread: oneDNN packs into memory of its own. Only its matrix products use memory that layers share.

    Raises:
        RuntimeError: vLLM did not pack it.
    """
    from vllm.model_executor.layers import utils

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    linear: Callable[..., torch.Tensor] | None = getattr(layer, ATTRIBUTE, None)
    if linear is None or layer.weight.numel():
        raise RuntimeError(
            f"vLLM did not pack a weight of shape {tuple(weight.shape)}: oneDNN refused it; check that the host has free memory"
        )
    return linear
