"""Copies between tensors, prepared beside generation, so that a pause only launches them.

``torch._foreach_copy_`` copies a list of tensors with one kernel for many, if all have one dtype that it knows, and each pair
the same shape and strides without gaps. Other lists cost a kernel for each tensor. Float8 is no dtype that it knows, and of
bfloat16 a thread reads 8 bytes at a time, too few for the memory's bandwidth. So bytes are copied as integers of 4 bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .strides import is_dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    # A target, and the source whose values it gets.
    Pair = tuple[torch.Tensor, torch.Tensor]

# By size. A thread of torch's kernel reads four elements at once: 16 bytes, the most that one instruction reads.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_WIDEST = max(_INTEGERS)


class Copies:
    """Pairs of tensors to copy, grouped by the kernel that copies them."""

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        """
        Args:
            pairs: what to copy; see ``add``.
        """
        # By target dtype, source dtype, and whether one kernel copies many.
        self._batches: dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for target, source in pairs:
            self.add(target, source)

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Add a copy of ``source``, which is cast if it has another dtype, to ``target`` of the same shape."""
        if target.numel():
            target, source = _as_integers(target, source)
            together = target.stride() == source.stride() and is_dense(target)
            targets, sources = self._batches.setdefault((target.dtype, source.dtype, together), ([], []))
            targets.append(target)
            sources.append(source)

    def extend(self, other: Copies) -> None:
        """Add all copies of ``other``."""
        for kind, (targets, sources) in other._batches.items():
            all_targets, all_sources = self._batches.setdefault(kind, ([], []))
            all_targets += targets
            all_sources += sources

    def run(self) -> None:
        """Copy. The device may not have finished when this method returns."""
        for targets, sources in self._batches.values():
            torch._foreach_copy_(targets, sources, non_blocking=True)

    def warm(self) -> None:
        """Launch each kernel of ``run`` once, on few elements and into other memory.

        A process loads a kernel when it launches it for the first time, which would be in its first pause.
        """
        for (_, _, together), (targets, sources) in self._batches.items():
            target, source = targets[0], sources[0]
            if together:
                source = source.as_strided((1,), (1,))
                scratch = torch.empty(1, dtype=target.dtype, device=target.device)
            else:
                few = (slice(2),) * target.ndim
                target, source = target[few], source[few]
                scratch = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype, device=target.device)
            torch._foreach_copy_([scratch], [source], non_blocking=True)

    def sources(self) -> Iterator[torch.Tensor]:
        """Yield the memory that is read."""
        for _, sources in self._batches.values():
            yield from sources


def view_of(
    tensor: torch.Tensor,
    dtype: torch.dtype | None = None,
    shape: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return a tensor's memory, from its start, as a tensor without class and history; by default of its own kind."""
    dtype = tensor.dtype if dtype is None else dtype
    offset = int(tensor.storage_offset()) * tensor.itemsize // dtype.itemsize
    if shape is None or stride is None:
        shape, stride = tuple(tensor.shape), tensor.stride()
    return torch.empty(0, dtype=dtype, device=tensor.device).set_(tensor.untyped_storage(), offset, shape, stride)


def _as_integers(target: torch.Tensor, source: torch.Tensor) -> Pair:
    """Return the same copy between integers as wide as the pair's layout allows, flat where it can be."""
    if target.dtype != source.dtype:
        return view_of(target), view_of(source)
    shape, itemsize = list(target.shape), target.itemsize
    to, of = list(target.stride()), list(source.stride())
    if (target.is_contiguous() and source.is_contiguous()) or (to == of and is_dense(target)):
        shape, to, of = [target.numel()], [1], [1]
    elif not shape or to[-1] != 1 or of[-1] != 1:
        return view_of(target), view_of(source)
    places = (target.data_ptr(), source.data_ptr(), *(int(one.storage_offset()) * itemsize for one in (target, source)))
    width = math.gcd(_WIDEST, shape[-1] * itemsize, *(step * itemsize for step in (*to[:-1], *of[:-1])), *places)
    shape[-1] = shape[-1] * itemsize // width
    for stride in (to, of):
        stride[:-1] = [step * itemsize // width for step in stride[:-1]]
    return view_of(target, _INTEGERS[width], shape, to), view_of(source, _INTEGERS[width], shape, of)
