"""Strided slices of tensors and storages, and copies between them: the vocabulary of a load plan."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    import torch


class StridedSlice(NamedTuple):
    """A strided slice of a tensor or a storage. Offset and strides count elements."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """The first element of the slice, and the one after its last."""
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset, self.offset + reach + 1

    @property
    def is_run(self) -> bool:
        """Whether the elements follow each other in memory, in order."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this slice of ``tensor``, which is contiguous."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    def moved(self, by: int) -> StridedSlice:
        """Return the same slice, ``by`` elements later."""
        return self._replace(offset=self.offset + by)


class Copy(NamedTuple):
    """A copy of a slice of the incoming tensor ``source`` to a slice of a storage."""

    target_slice: StridedSlice
    source: str
    source_slice: StridedSlice

    def simplified(self) -> Copy:
        """Return the same copy, flat where both slices are runs: torch copies runs faster than shapes."""
        target, source = self.target_slice, self.source_slice
        if not (target.is_run and source.is_run):
            return self
        run = ((target.numel,), (1,))
        return Copy(StridedSlice(target.offset, *run), self.source, StridedSlice(source.offset, *run))


def slice_of(tensor: torch.Tensor) -> StridedSlice:
    """Return the slice of its storage that ``tensor`` is."""
    return StridedSlice(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements fill its memory without gaps and overlaps, in any order of its dimensions."""
    expected = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def runs_across(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape lie in memory along different dimensions, as a matrix and its transpose do."""
    return _fastest(tensor) != _fastest(other)


def _fastest(tensor: torch.Tensor) -> int:
    """Return the dimension along which a tensor's elements are closest in memory; -1 if no dimension has two elements."""
    steps = (
        (step, place) for place, (step, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)) if size > 1
    )
    return min(steps, default=(0, -1))[1]


def dense_strides(tensor: torch.Tensor) -> list[int]:
    """Return the strides of a tensor of this shape that fills its memory, with the dimensions in the order of ``tensor``."""
    strides, step = [1] * tensor.ndim, 1
    for place in sorted(range(tensor.ndim), key=lambda one: (tensor.stride(one), tensor.shape[one])):
        strides[place] = step
        step *= tensor.shape[place]
    return strides


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a dense tensor in the order of its memory; another tensor as it is.

    Reading them in the order of the shape takes a copy first: of transposed bytes, longer than any other work on them.
    """
    if tensor.is_contiguous() or not is_dense(tensor):
        return tensor
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def storage_key(tensor: torch.Tensor) -> StorageWeakRef:
    """Return the identity of a tensor's storage. No other storage gets it while the key is held."""
    return StorageWeakRef(tensor.untyped_storage())
