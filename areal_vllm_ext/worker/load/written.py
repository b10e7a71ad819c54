"""The live memory that a load plan writes, with the digests that it must have after the commit.

So live weights can be compared with what was received, tensor by tensor, whatever slice of a tensor a rank needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...integrity import digest
from .strides import in_memory_order, is_dense

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch


class WrittenRun(NamedTuple):
    """A view of live memory, and the digest that it must have."""

    view: torch.Tensor
    digest: int


# By incoming tensor, the live memory that it is copied to. Empty for a tensor that another rank needs.
Written = dict[str, tuple[WrittenRun, ...]]


def written_by(
    names: Iterable[str],
    whole: Mapping[str, Iterable[torch.Tensor]],
    slices: Iterable[tuple[str, torch.Tensor, torch.Tensor]],
    digests: Mapping[str, int],
) -> Written:
    """Return what the commit of some incoming tensors writes.

    Args:
        names: of these tensors.
        whole: by name, the live memory that becomes equal to the tensor.
        slices: name, live memory, and the slice that is copied or cast to it.
        digests: of these tensors, compared with their bytes before.
    """
    compared = [(name, *_as_they_lie(view, source)) for name, view, source in slices]
    # A tensor that is copied as it is keeps its digest. A slice, or a cast, has one of its own.
    written = {name: [WrittenRun(run, digests[name]) for run in whole.get(name, ())] for name in names}
    values = digest.digests_of(source.to(view.dtype) for _, view, source in compared)
    for (name, view, _), value in zip(compared, values, strict=True):
        written[name].append(WrittenRun(view, value))
    return {name: tuple(runs) for name, runs in written.items()}


def _as_they_lie(view: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both in the order of their memory where it is the same. A digest in another order takes a copy first."""
    if view.stride() == source.stride() and view.dtype == source.dtype and is_dense(view):
        return in_memory_order(view), in_memory_order(source)
    return view, source


def wrong_in(written: Mapping[str, Iterable[WrittenRun]]) -> list[str]:
    """Return the names of incoming tensors whose live memory has other bytes now. Reads all of it."""
    runs = [(name, run) for name, together in written.items() for run in together]
    values = digest.digests_of(run.view for _, run in runs)
    return list(dict.fromkeys(name for (name, run), value in zip(runs, values, strict=True) if run.digest != value))
