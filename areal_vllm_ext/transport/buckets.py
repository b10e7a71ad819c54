"""Buckets: many tensors in one flat buffer, so that a transport moves few large buffers instead of many small tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec
import torch

from ..errors import InvalidWeights
from ..integrity import digest
from ..protocol import Segment, TensorMeta

# Tensors start at multiples of this in a bucket, so that any dtype can be viewed in place and digests find their rows.
_ALIGNMENT = digest.ROW_BYTES

# In host memory, small buckets are reused, because fresh pages cost four times what copying into them costs. Over NCCL, a
# small bucket takes less time than its announcement; but nothing travels while the first bucket is filled, and the last one
# is checked after everything has travelled. Slots are smaller, because they are kept between updates.
_HOST_BYTES, _SLOT_BYTES = 32 << 20, 256 << 20
_NCCL_LEAST, _NCCL_MOST, _NCCL_BUCKETS = 128 << 20, 1 << 30, 4


def default_bucket_bytes(device: torch.device, transport: str = "", total: int = 0) -> int:
    """Return the size of a bucket for tensors on ``device``, which have ``total`` bytes group (0: unknown)."""
    if device.type == "cpu":
        return _HOST_BYTES
    if transport != "broadcast":
        return _SLOT_BYTES
    return min(max(aligned(total // _NCCL_BUCKETS), _NCCL_LEAST), _NCCL_MOST) if total else _NCCL_MOST


def aligned(nbytes: int) -> int:
    """Round ``nbytes`` up to where the next tensor may start."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def tensor_bytes(meta: TensorMeta, engine_dtype: str = "") -> int:
    """Return the most bytes that a tensor takes in a bucket, in the checkpoint's dtype or in the engines'."""
    dtypes: list[torch.dtype] = [getattr(torch, meta.dtype), getattr(torch, engine_dtype or meta.dtype)]
    return aligned(math.prod(meta.shape) * max(dtype.itemsize for dtype in dtypes))


def total_bytes(metas: Iterable[TensorMeta], engine_dtype: str = "") -> int:
    """Return the most bytes that all tensors take in one bucket."""
    return sum(tensor_bytes(meta, engine_dtype) for meta in metas)


class Bucket:
    """A bucket that is being filled. It can be filled again."""

    def __init__(self, buffer: torch.Tensor) -> None:
        """Fill ``buffer``: ``uint8``, on any device."""
        self._buffer = buffer
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self.nbytes = 0
        # Each tensor in order: what it is, its offset, and the view that it is copied to.
        self._views: list[tuple[TensorMeta, int, torch.Tensor]] = []
        # How many tensors were added. Persistent ones are copied group, by dtype: targets and sources.
        self._count = 0
        self._pending: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def uses(self, buffer: torch.Tensor) -> bool:
        """Return whether this bucket fills ``buffer``."""
        own = self._buffer
        return (own.data_ptr(), own.numel(), own.device) == (buffer.data_ptr(), buffer.numel(), buffer.device)

    def reset(self) -> None:
        """Start to fill again. Tensors that come as they came before reuse their views, which cost more than small copies."""
        self._count = self.nbytes = 0
        self._pending.clear()

    def fits(self, tensor: torch.Tensor) -> bool:
        return self.nbytes + tensor.nbytes <= self._buffer.numel()

    def add(self, meta: TensorMeta, tensor: torch.Tensor, *, persistent: bool = False) -> None:
        """Copy a tensor in: at once, or group with others in ``close`` if it is ``persistent`` until then."""
        number = self._count
        if number == len(self._views) or self._views[number][:2] != (meta, self.nbytes):
            del self._views[number:]  # from an earlier filling
            if (whole := self._typed.get(tensor.dtype)) is None:
                whole = self._typed[tensor.dtype] = view_as(self._buffer, tensor.dtype)
            self._views.append((meta, self.nbytes, tensor_at(whole, self.nbytes, meta.shape)))
        place = self._views[number][2]
        if persistent:
            places, tensors = self._pending.setdefault(tensor.dtype, ([], []))
            places.append(place)
            tensors.append(tensor)
        else:
            place.copy_(tensor)
        self._count += 1
        self.nbytes += aligned(tensor.nbytes)

    def close(self) -> None:
        """Finish: copy what is pending."""
        del self._views[self._count :]
        for places, tensors in self._pending.values():
            torch._foreach_copy_(places, tensors)
        self._pending.clear()

    @property
    def filled(self) -> torch.Tensor:
        return self._buffer[: self.nbytes]

    def segments(self) -> tuple[Segment, ...]:
        """Return what lies where."""
        return tuple(Segment(meta, offset) for meta, offset, _ in self._views)

    def digests(self) -> list[int]:
        """Return the digest of each tensor as it lies in the buffer now.

        Raises:
            InvalidWeights: a tensor holds NaN or infinite values.
        """
        named = [(meta.name, place) for meta, _, place in self._views]
        spans = [(offset, place.nbytes) for _, offset, place in self._views]
        if (
            found := digest.digests_and_finite_in(self._buffer, spans, [place.dtype for _, place in named])
        ) is not None:
            return _of_finite(named, *found)
        return digest_and_check_finite(named)

    def keep_only(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """Move ``segments`` group, over all other tensors. Return them with their new offsets."""
        kept, end = [], 0
        for segment in segments:
            nbytes = nbytes_of(segment.tensor)
            if segment.offset != end:
                # The two ranges may overlap.
                self._buffer[end : end + nbytes].copy_(self._buffer[segment.offset : segment.offset + nbytes].clone())
            kept.append(msgspec.structs.replace(segment, offset=end))
            end += aligned(nbytes)
        self.nbytes = end
        return tuple(kept)


def digest_and_check_finite(named: Sequence[tuple[str, torch.Tensor]]) -> list[int]:
    """Return the digests of tensors. On a GPU, one read also checks that all values are finite.

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
    """Return the name of the first tensor with NaN or infinite values. Synchronizes with a GPU once per dtype."""
    named = list(named)
    if all(tensor.device.type == "cpu" for _, tensor in named):
        return next((name for name, tensor in named if not _all_finite(tensor)), None)
    by_dtype: dict[torch.dtype, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.numel():
            # torch does no arithmetic with 8-bit dtypes.
            wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            by_dtype.setdefault(tensor.dtype, []).append((name, wide))
    for group in by_dtype.values():
        # The largest value is finite if all are. isfinite would write a tensor of flags for each tensor.
        finite = torch.isfinite(torch.stack(torch._foreach_norm([tensor for _, tensor in group], math.inf))).tolist()
        if not all(finite):
            return next(name for (name, _), one in zip(group, finite, strict=True) if not one)
    return None


def _all_finite(tensor: torch.Tensor) -> bool:
    """Return whether all values of a CPU tensor are finite. NaN propagates to both extremes; a norm takes six times longer."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = (tensor.float() if tensor.dtype.itemsize == 1 else tensor).aminmax()
    return math.isfinite(least) and math.isfinite(most)


def filled_buckets(
    weights: Iterable[tuple[TensorMeta, torch.Tensor]],
    bucket_bytes: int,
    memory: Callable[[int], torch.Tensor],
    persistent: AbstractSet[int] = frozenset(),
    reusable: dict[int, Bucket] | None = None,
) -> Iterator[Bucket]:
    """Put tensors into buckets of ``bucket_bytes``. A larger tensor gets a bucket of its own.

    Args:
        weights: the tensors. Each must stay valid until the next one is requested.
        bucket_bytes: size of a bucket.
        memory: returns a ``uint8`` buffer of the given size for the next bucket.
        persistent: addresses of the storages whose tensors stay valid until the end.
        reusable: buckets of an earlier call, by number. They are filled again if their memory is the same. New buckets are
            added.
    """
    reusable = {} if reusable is None else reusable
    bucket: Bucket | None = None
    number = 0
    for meta, tensor in weights:
        if bucket is not None and not bucket.fits(tensor):
            bucket.close()
            yield bucket
            bucket, number = None, number + 1
        if bucket is None:
            buffer = memory(max(aligned(bucket_bytes), aligned(tensor.nbytes)))
            bucket = reusable.get(number)
            if bucket is None or not bucket.uses(buffer):
                bucket = reusable[number] = Bucket(buffer)
            bucket.reset()
        bucket.add(meta, tensor, persistent=tensor.untyped_storage().data_ptr() in persistent)
    if bucket is not None:
        bucket.close()
        yield bucket


def meta_of(name: str, tensor: torch.Tensor) -> TensorMeta:
    """Return a tensor's name, dtype and shape."""
    return TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def contents_of(tensors: Mapping[str, torch.Tensor]) -> digest.Contents:
    """Return what each tensor is, and its digest, by name."""
    metas = (meta_of(name, tensor) for name, tensor in tensors.items())
    return digest.by_name(zip(metas, digest.digests_of(tensors.values()), strict=True))


def nbytes_of(meta: TensorMeta) -> int:
    """Return the size of a tensor."""
    dtype: torch.dtype = getattr(torch, meta.dtype)
    return math.prod(meta.shape) * dtype.itemsize


def packed_layout(segments: Sequence[Segment]) -> tuple[tuple[Segment, ...], int]:
    """Lay ``segments`` out one after the other in one buffer. Return them and the buffer's size."""
    moved, end = [], 0
    for segment in segments:
        moved.append(Segment(segment.tensor, end))
        end += aligned(nbytes_of(segment.tensor))
    return tuple(moved), end


def first_corrupt(segments: Sequence[Segment], announced: Sequence[int], buffer: torch.Tensor) -> str | None:
    """Return the name of the first tensor in ``buffer`` whose digest is not the ``announced`` one.

    ``segments`` were unpacked before, so each lies inside the buffer.
    """
    values = digest.digests(buffer, [(segment.offset, nbytes_of(segment.tensor)) for segment in segments])
    return first_different(segments, announced, values)


def first_different(segments: Sequence[Segment], announced: Sequence[int], values: Sequence[int]) -> str | None:
    """Return the name of the first tensor whose digest is not the ``announced`` one."""
    if values == list(announced):
        return None
    return next(
        one.tensor.name for one, expected, value in zip(segments, announced, values, strict=True) if expected != value
    )


class UnpackedBucket:
    """A bucket's tensors as views of its memory. Made once, and reused while later buckets arrive in the same memory.

    Attributes:
        segments: what lies where.
        memory: what the tensors lie in.
        tensors: contiguous tensors by name.
        copies: what a load plan made of the tensors (``worker/load/plan.py``).
    """

    def __init__(self, segments: tuple[Segment, ...], memory: Any, tensors: dict[str, torch.Tensor]) -> None:
        self.segments, self.memory, self.tensors = segments, memory, tensors
        self.copies: Any = None


def view_as(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View a buffer of bytes as elements of ``dtype``, without the bytes at the end that fill no element."""
    return buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def tensor_at(whole: torch.Tensor, offset: int, shape: Sequence[int]) -> torch.Tensor:
    """Return the tensor of ``shape`` at byte ``offset`` of a buffer made by ``view_as``, as a view.

    It uses only one operator: each operator releases the GIL, and a generating engine takes it.
    """
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(max(step, 1))
        step *= size
    return whole.as_strided(shape, strides[::-1], whole.storage_offset() + offset // whole.itemsize)


def unpack(segments: Sequence[Segment], buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a bucket by name, as views of ``buffer``.

    Raises:
        ValueError: a segment does not lie inside the buffer.
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
