"""Buckets: many tensors in one flat buffer, so that a transport moves few large pieces instead of many small ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
import torch

from ..errors import InvalidWeights
from ..integrity import digest
from ..protocol import Segment, TensorMeta

# Tensors start at multiples of this inside a bucket, so that any dtype can be viewed in place, and digests find their rows.
_ALIGNMENT = digest.ROW_BYTES

# In host memory fresh pages cost four times what copying into them does, and small pieces are used again. Between GPUs a
# piece takes NCCL less time than it takes trainer and workers to tell each other of it, if it is not large; but the first is
# filled before anything travels, and the last checked after everything has. Slots that are kept between updates are smaller.
_HOST_BYTES, _SLOT_BYTES = 32 << 20, 256 << 20
_NCCL_LEAST, _NCCL_MOST, _NCCL_BUCKETS = 128 << 20, 1 << 30, 4


def default_bucket_bytes(device: torch.device, transport: str = "", total: int = 0) -> int:
    """Size of a bucket of tensors that are on ``device``; ``total``: bytes of all of them, where that is known."""
    if device.type == "cpu":
        return _HOST_BYTES
    if transport != "broadcast":
        return _SLOT_BYTES
    return min(max(aligned(total // _NCCL_BUCKETS), _NCCL_LEAST), _NCCL_MOST) if total else _NCCL_MOST


def aligned(nbytes: int) -> int:
    """``nbytes`` up to where the next tensor may start."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def tensor_bytes(meta: TensorMeta, engine_dtype: str = "") -> int:
    """Bytes that a tensor can take in a bucket: as the checkpoint has it, or in the dtype that the engines compute in."""
    dtypes: list[torch.dtype] = [getattr(torch, meta.dtype), getattr(torch, engine_dtype or meta.dtype)]
    return aligned(math.prod(meta.shape) * max(dtype.itemsize for dtype in dtypes))


def total_bytes(metas: Iterable[TensorMeta], engine_dtype: str = "") -> int:
    """Bytes that all tensors can take in one bucket."""
    return sum(tensor_bytes(meta, engine_dtype) for meta in metas)


class Bucket:
    """A bucket that is being filled; it can be filled again."""

    def __init__(self, buffer: torch.Tensor) -> None:
        """``buffer``: ``uint8``, of any device."""
        self._buffer = buffer
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self.nbytes = 0
        # In order: what each tensor is, its offset, and the view that it is copied to.
        self._places: list[tuple[TensorMeta, int, torch.Tensor]] = []
        # How many have come; those that last are copied together, by dtype: to where, and from where.
        self._count = 0
        self._later: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def uses(self, buffer: torch.Tensor) -> bool:
        """Whether ``buffer`` is the memory that this fills."""
        own = self._buffer
        return (own.data_ptr(), own.numel(), own.device) == (buffer.data_ptr(), buffer.numel(), buffer.device)

    def empty(self) -> None:
        """Begin again. What comes as it came before finds its place ready: making one costs more than a small tensor's copy."""
        self._count = self.nbytes = 0
        self._later.clear()

    def fits(self, tensor: torch.Tensor) -> bool:
        return self.nbytes + tensor.nbytes <= self._buffer.numel()

    def add(self, meta: TensorMeta, tensor: torch.Tensor, *, lasts: bool = False) -> None:
        """Copy a tensor in: at once, since its memory may be used again, or with others where it ``lasts`` until ``close``."""
        number = self._count
        if number == len(self._places) or self._places[number][:2] != (meta, self.nbytes):
            del self._places[number:]  # another filling's
            if (whole := self._typed.get(tensor.dtype)) is None:
                whole = self._typed[tensor.dtype] = view_as(self._buffer, tensor.dtype)
            self._places.append((meta, self.nbytes, tensor_at(whole, self.nbytes, meta.shape)))
        place = self._places[number][2]
        if lasts:
            places, tensors = self._later.setdefault(tensor.dtype, ([], []))
            places.append(place)
            tensors.append(tensor)
        else:
            place.copy_(tensor)
        self._count += 1
        self.nbytes += aligned(tensor.nbytes)

    def close(self) -> None:
        """Nothing is added any more: have all of it copied."""
        del self._places[self._count :]
        for places, tensors in self._later.values():
            torch._foreach_copy_(places, tensors)
        self._later.clear()

    @property
    def filled(self) -> torch.Tensor:
        return self._buffer[: self.nbytes]

    def segments(self) -> tuple[Segment, ...]:
        """What lies where."""
        return tuple(Segment(meta, offset) for meta, offset, _ in self._places)

    def digests(self) -> list[int]:
        """Of each tensor as it lies in the buffer now.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
        """
        named = [(meta.name, place) for meta, _, place in self._places]
        spans = [(offset, place.nbytes) for _, offset, place in self._places]
        if (
            found := digest.digests_and_finite_in(self._buffer, spans, [place.dtype for _, place in named])
        ) is not None:
            return _of_finite(named, *found)
        return digest_and_check_finite(named)

    def keep_only(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """Close the gaps that the others leave; returns ``segments`` with their new places."""
        kept, end = [], 0
        for segment in segments:
            nbytes = nbytes_of(segment.tensor)
            if segment.offset != end:
                # Both places may overlap.
                self._buffer[end : end + nbytes].copy_(self._buffer[segment.offset : segment.offset + nbytes].clone())
            kept.append(msgspec.structs.replace(segment, offset=end))
            end += aligned(nbytes)
        self.nbytes = end
        return tuple(kept)


def digest_and_check_finite(named: Sequence[tuple[str, torch.Tensor]]) -> list[int]:
    """The digests of tensors. On a GPU one read gives them, and whether all values are finite.

    Raises:
        InvalidWeights: a tensor holds NaN or infinite values.
    """
    tensors = [tensor for _, tensor in named]
    if digest.supports_finite_check(tensors):
        return _of_finite(named, *digest.digests_and_finite(tensors))
    if bad := first_non_finite(named):
        raise InvalidWeights(f"{bad} holds NaN or infinite values")
    return digest.digests_of(tensors)


def digest_and_check_finite_async(named: Sequence[tuple[str, torch.Tensor]]) -> Callable[[], list[int]]:
    """Start ``digest_and_check_finite`` of contiguous tensors that are aligned for digests; call the result to wait."""
    tensors = [tensor for _, tensor in named]
    if not digest.supports_finite_check(tensors):
        return functools.partial(digest_and_check_finite, named)
    found = digest.digests_and_finite_async(tensors)
    return lambda: _of_finite(named, *found())


def _of_finite(named: Iterable[tuple[str, torch.Tensor]], values: list[int], finite: Iterable[bool]) -> list[int]:
    if bad := next((name for (name, _), one in zip(named, finite, strict=True) if not one), ""):
        raise InvalidWeights(f"{bad} holds NaN or infinite values")
    return values


def first_non_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of a tensor with NaN or infinite values, or an empty string. One look at the device for all of a dtype."""
    named = list(named)
    if all(tensor.device.type == "cpu" for _, tensor in named):
        return next((name for name, tensor in named if not _all_finite(tensor)), None)
    by_dtype: dict[torch.dtype, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.numel():
            # torch computes nothing with the 8-bit dtypes.
            wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            by_dtype.setdefault(tensor.dtype, []).append((name, wide))
    for together in by_dtype.values():
        # The largest value is finite where all are; isfinite would write a tensor of flags for each.
        finite = torch.isfinite(torch.stack(torch._foreach_norm([tensor for _, tensor in together], math.inf))).tolist()
        if not all(finite):
            return next(name for (name, _), one in zip(together, finite, strict=True) if not one)
    return None


def _all_finite(tensor: torch.Tensor) -> bool:
    """On a CPU, where the least and the largest value take a sixth of the time of a norm; NaN is both."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return math.isfinite(least) and math.isfinite(most)


def filled_buckets(
    weights: Iterable[tuple[TensorMeta, torch.Tensor]],
    bucket_bytes: int,
    memory: Callable[[int], torch.Tensor],
    lasting: AbstractSet[int] = frozenset(),
    kept: dict[int, Bucket] | None = None,
) -> Iterator[Bucket]:
    """Put tensors into buckets of ``bucket_bytes``; a larger tensor gets a bucket of its own.

    Args:
        weights: the tensors; each is done with when the next is asked for.
        bucket_bytes: size of a bucket.
        memory: gives a ``uint8`` buffer of so many bytes for the next bucket.
        lasting: where storages begin whose tensors are there until the end.
        kept: buckets that were filled before, by their number; they are filled again where they lie in the same memory. Gets
            those that are filled.
    """
    kept = {} if kept is None else kept
    bucket: Bucket | None = None
    number = 0
    for meta, tensor in weights:
        if bucket is not None and not bucket.fits(tensor):
            bucket.close()
            yield bucket
            bucket, number = None, number + 1
        if bucket is None:
            buffer = memory(max(aligned(bucket_bytes), aligned(tensor.nbytes)))
            bucket = kept.get(number)
            if bucket is None or not bucket.uses(buffer):
                bucket = kept[number] = Bucket(buffer)
            bucket.empty()
        bucket.add(meta, tensor, lasts=tensor.untyped_storage().data_ptr() in lasting)
    if bucket is not None:
        bucket.close()
        yield bucket


def nbytes_of(meta: TensorMeta) -> int:
    """Bytes of a tensor."""
    dtype: torch.dtype = getattr(torch, meta.dtype)
    return math.prod(meta.shape) * dtype.itemsize


def packed_layout(segments: Sequence[Segment]) -> tuple[tuple[Segment, ...], int]:
    """``segments`` one after the other, in one buffer of so many bytes."""
    moved, end = [], 0
    for segment in segments:
        moved.append(Segment(segment.tensor, end))
        end += aligned(nbytes_of(segment.tensor))
    return tuple(moved), end


def first_corrupt(segments: Sequence[Segment], told: Sequence[int], buffer: torch.Tensor) -> str | None:
    """The name of a tensor in ``buffer`` whose digest is not the one that was ``told``; empty where all are.

    ``segments`` were unpacked before, so each lies inside the buffer.
    """
    values = digest.digests(buffer, [(segment.offset, nbytes_of(segment.tensor)) for segment in segments])
    return first_different(segments, told, values)


def first_different(segments: Sequence[Segment], told: Sequence[int], values: Sequence[int]) -> str | None:
    """The name of the first tensor whose digest is not the one that was ``told``; empty where all are."""
    if values == list(told):
        return None
    return next(one.tensor.name for one, told_of, value in zip(segments, told, values, strict=True) if told_of != value)


class UnpackedBucket:
    """A bucket's tensors where they lie, made once for as long as they lie there.

    Attributes:
        segments: what lies where.
        memory: what they lie in.
        tensors: by name; contiguous.
        copies: what a load plan has made of them (``worker/load/plan.py``).
    """

    def __init__(self, segments: tuple[Segment, ...], memory: Any, tensors: dict[str, torch.Tensor]) -> None:
        self.segments, self.memory, self.tensors = segments, memory, tensors
        self.copies: Any = None


def view_as(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As much of a buffer of bytes as elements of ``dtype`` fill."""
    return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def tensor_at(whole: torch.Tensor, offset: int, shape: Sequence[int]) -> torch.Tensor:
    """The tensor of ``shape`` that lies ``offset`` bytes into a ``view_as`` buffer, as a view.

    By one operator: torch lets go of the interpreter in each, and an engine that generates takes it.
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(max(step, 1))
        step *= size
    return whole.as_strided(shape, strides[::-1], whole.storage_offset() + offset // whole.itemsize)


def unpack(segments: Sequence[Segment], buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, as views into ``buffer``.

    Raises:
        ValueError: where a segment does not lie inside the buffer.
    """
    wholes: dict[str, torch.Tensor] = {}
    for segment in segments:
        meta = segment.tensor
        if (whole := wholes.get(meta.dtype)) is None:
            dtype = getattr(torch, meta.dtype, None)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{meta.name} has unknown dtype {meta.dtype!r}")
            whole = wholes[meta.dtype] = view_as(buffer, dtype)
        if min(meta.shape, default=0) < 0:
            raise ValueError(f"{meta.name} has a negative size")
        end = segment.offset + math.prod(meta.shape) * whole.itemsize
        if segment.offset < 0 or segment.offset % _ALIGNMENT or end > buffer.numel():
            raise ValueError(f"{meta.name} does not lie inside its bucket")
        yield meta.name, tensor_at(whole, segment.offset, meta.shape)
