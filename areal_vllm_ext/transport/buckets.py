"""Buckets: many tensors in one flat buffer, so that a transport moves few large pieces instead of many small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..protocol import Segment, TensorMeta

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

# Tensors start at multiples of this inside a bucket, so that any dtype can be viewed in place.
_ALIGNMENT = 256


def aligned(nbytes: int) -> int:
    """``nbytes`` up to where the next tensor may start."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def bucketed(
    weights: Iterable[tuple[TensorMeta, torch.Tensor]], bucket_bytes: int
) -> Iterator[tuple[tuple[Segment, ...], int, list[torch.Tensor]]]:
    """Group tensors into buckets of at most ``bucket_bytes`` (a larger tensor gets a bucket of its own).

    Yields:
        (segments, bytes of the bucket, its tensors in the order of the segments).
    """
    segments: list[Segment] = []
    tensors: list[torch.Tensor] = []
    filled = 0
    for meta, tensor in weights:
        if segments and filled + tensor.nbytes > bucket_bytes:
            yield tuple(segments), filled, tensors
            segments, tensors, filled = [], [], 0
        segments.append(Segment(meta, filled))
        tensors.append(tensor)
        filled += aligned(tensor.nbytes)
    if segments:
        yield tuple(segments), filled, tensors


def pack(segments: Sequence[Segment], tensors: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
    """Copy ``tensors`` to their places in ``buffer`` (``uint8``, of any device)."""
    for segment, tensor in zip(segments, tensors, strict=True):
        place = buffer[segment.offset : segment.offset + tensor.nbytes]
        place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def unpack(segments: Sequence[Segment], buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, as views into ``buffer``.

    Raises:
        ValueError: where a segment does not lie inside the buffer.
    """
    for segment in segments:
        meta = segment.tensor
        dtype = getattr(torch, meta.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{meta.name} has unknown dtype {meta.dtype!r}")  # noqa: TRY004 - a value, from the wire
        count = 1
        for size in meta.shape:
            if size < 0:
                raise ValueError(f"{meta.name} has a negative size")
            count *= size
        end = segment.offset + count * dtype.itemsize
        if segment.offset < 0 or segment.offset % _ALIGNMENT or end > buffer.numel():
            raise ValueError(f"{meta.name} does not lie inside its bucket")
        yield meta.name, buffer[segment.offset : end].view(dtype).view(meta.shape)
