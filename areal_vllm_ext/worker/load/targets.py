"""Live storages that a load writes: what was recorded of each, and the checks that make a recording a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .strides import slice_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .strides import Copy, StridedSlice

# Added to the write count of an element that a loader set to a constant (padding). More copies than this per element
# would be counted as a constant.
_CONSTANT = 128
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NotPlanned(Exception):
    """The load cannot be replayed as copies; the message says why."""


class RecordedStorage:
    """What a load wrote to one storage.

    Attributes:
        names: the live tensors of this storage; empty for a temporary one.
        dtype: of all that was written; None before the first write.
        copies: slices of incoming tensors that were written, each once.
        constants: slices that were filled with a constant.
        handed_on: how many of the copies were passed on to another storage.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self.dtype: torch.dtype | None = None
        self.copies: list[Copy] = []
        self.constants: list[StridedSlice] = []
        self.handed_on = 0
        self._known: set[Copy] = set()

    def add(self, copies: Iterable[Copy]) -> None:
        """Record copies. One that repeats an earlier one exactly counts once, because it writes the same bytes again.

        vLLM's reload does that to each parameter named ``bias``: it keeps this one off the meta device, so the run of the
        loader that only counts elements writes them too. Another copy between the two still counts as a second write.
        """
        for copy in copies:
            if copy not in self._known:
                self._known.add(copy)
                self.copies.append(copy)


class LiveTarget:
    """One storage of live tensors, and the copies that a plan makes to it."""

    def __init__(self, flat: torch.Tensor, storage: RecordedStorage) -> None:
        """
        Args:
            flat: all of the storage, as one tensor.
            storage: what was recorded of it.
        """
        self.flat = flat
        self.names = storage.names
        self.copies = tuple(copy.simplified() for copy in storage.copies)
        self._constants = storage.constants

    def check(self, live: Mapping[str, torch.Tensor], staged: Mapping[str, torch.Tensor]) -> None:
        """Check the copies against what the recorded load left in memory.

        Every element of a loaded tensor must be written exactly once or be constant, and each copy must give the bytes
        that are there.

        Raises:
            NotPlanned: naming the tensor for which this is not so.
        """
        if self._overlaps():
            raise NotPlanned(f"{self.names[0]} is written through overlapping slices")
        # Device memory is scarce beside an engine: this takes a byte for each element, and another byte while counting.
        written = torch.zeros(self.flat.shape, dtype=torch.uint8, device=self.flat.device)
        for constant in self._constants:
            constant.view(written).fill_(_CONSTANT)
        for copy in self.copies:
            copy.target_slice.view(written).add_(1)
        for name, tensor in live.items():
            counts = slice_of(tensor).view(written)
            least, most = (int(one) for one in counts.aminmax()) if counts.numel() else (1, 1)
            if (least, most) in ((0, 0), (1, 1)):
                continue
            if least == 0:
                raise NotPlanned(f"{name} is written in part only")
            if most > _CONSTANT + 1 or bool(((counts > 1) & (counts < _CONSTANT)).any()):
                raise NotPlanned(f"{name} is written more than once")
        del written
        bits = _BITS[self.flat.itemsize]
        for copy in self.copies:
            there = copy.target_slice.view(self.flat)
            sent = copy.source_slice.view(staged[copy.source]).to(self.flat.device, self.flat.dtype)
            if not torch.equal(there.view(bits), sent.view(bits)):
                raise NotPlanned(f"{self.names[0]} is changed after it was loaded")

    def _overlaps(self) -> bool:
        """Whether a slice has an element of this storage twice: a copy could then write either value there."""
        return any(
            step == 0 and size > 1
            for copy in self.copies
            for size, step in zip(copy.target_slice.shape, copy.target_slice.stride, strict=True)
        )
