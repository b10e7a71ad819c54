"""``digest.py``'s function as one Triton kernel. It reads each byte once; any number of tensors cost one launch."""

from __future__ import annotations

import functools

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# Rows per program: enough to keep the table of programs short, few enough that one small model fills a GPU.
_ROWS = 512
# Bytes that the kernel reads at once.
ALIGNMENT = 16
# Sets of tensors whose tables are cached: the buckets of an update and the live weights, up to some MB each.
_KEPT_TABLES = 64


def _lanes(exponent: int, bits: int) -> tuple[int, int, int]:
    """Return masks of a 32-bit word that holds several values: each value's exponent, lowest bit and highest bit.

    A value is NaN or infinite if its exponent is all ones. Then its lane of ``~word & exponent`` is zero, and subtracting
    one sets the lane's highest bit, which is outside of ``exponent``.
    """
    repeated = sum(1 << shift for shift in range(0, 32, bits))
    masks = (exponent * repeated, repeated, repeated << (bits - 1))
    first, second, third = (mask - (1 << 32) if mask >> 31 else mask for mask in masks)
    return first, second, third


# Masks of the dtypes whose values the kernel can check. float8_e4m3fn has one pattern for NaN and none for infinity.
LANES = {
    torch.float32: _lanes(0x7F800000, 32),
    torch.bfloat16: _lanes(0x7F80, 16),
    torch.float16: _lanes(0x7C00, 16),
    torch.float8_e5m2: _lanes(0x7C, 8),
    torch.float8_e4m3fn: _lanes(0x7F, 8),
    **dict.fromkeys((torch.uint8, torch.int8, torch.bool, torch.int16, torch.int32, torch.int64), (0, 0, 0)),
}


# Without annotations, because Triton would resolve their names and knows only its own.
@triton.jit
def _mix(values, first, second):  # type: ignore[no-untyped-def]
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * first
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * second
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _hash(  # type: ignore[no-untyped-def]
    tensors,
    programs,
    keys,
    constants,
    sums,
    check_finite: tl.constexpr,
    rows: tl.constexpr,
    step: tl.constexpr,
):
    """Add the mixed hashes of some rows of a tensor to its first sum.

    With ``check_finite``, add to its second sum how many words of these rows hold NaN or infinite values. ``tensors`` has for
    each tensor its address, size in bytes and ``LANES``; ``programs`` has for each program its tensor and first row.
    """
    program = tl.program_id(0)
    owner = tl.load(programs + 2 * program)
    start = tl.load(programs + 2 * program + 1)
    address = tl.load(tensors + 5 * owner)
    size = tl.load(tensors + 5 * owner + 1)
    words = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    octets = address.to(tl.pointer_type(tl.uint8))
    gamma, first, second = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    column = tl.arange(0, 64)
    key = tl.load(keys + column)[None, :]
    total = tl.zeros((step,), tl.int64)
    if check_finite:
        exponent = tl.load(tensors + 5 * owner + 2).to(tl.int32)
        lowest = tl.load(tensors + 5 * owner + 3).to(tl.int32)
        highest = tl.load(tensors + 5 * owner + 4).to(tl.int32)
        found = tl.zeros((step, 64), tl.int32)
    if (start + rows) * 256 <= size:
        # All rows lie in the tensor, so loads need no mask and are four words wide.
        for done in range(0, rows, step):
            row = start + done + tl.arange(0, step)
            value = tl.load(words + row[:, None] * 64 + column[None, :])
            if check_finite:
                found |= ((value ^ -1) & exponent) - lowest & highest
            total += _mix(tl.sum(value.to(tl.int64) * key, axis=1) + (row + 1) * gamma, first, second)
    else:
        for done in range(0, rows, step):
            row = start + done + tl.arange(0, step)
            word = row[:, None] * 64 + column[None, :]
            value = tl.load(words + word, mask=word * 4 + 4 <= size, other=0)
            if size % 4 != 0:
                # A partial last word counts as if zeros followed.
                for byte in tl.static_range(3):
                    place = word * 4 + byte
                    cut = (word * 4 + 4 > size) & (place < size)
                    value += tl.load(octets + place, mask=cut, other=0).to(tl.int32) << (8 * byte)
            if check_finite:
                found |= ((value ^ -1) & exponent) - lowest & highest
            hashed = tl.sum(value.to(tl.int64) * key, axis=1)
            total += tl.where(row * 256 < size, _mix(hashed + (row + 1) * gamma, first, second), 0)
    tl.atomic_add(sums + 2 * owner, tl.sum(total, axis=0))
    if check_finite:
        count = tl.sum(tl.sum((found != 0).to(tl.int64), axis=1), axis=0)
        if count > 0:
            tl.atomic_add(sums + 2 * owner + 1, count)


def row_sums(
    spans: tuple[tuple[int, int], ...],
    keys: torch.Tensor,
    constants: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> torch.Tensor:
    """Return for each tensor the sum of its mixed row hashes, and how many of its words hold NaN or infinite values.

    Args:
        spans: address (a multiple of ``ALIGNMENT``) and bytes of each tensor, on the device of ``keys``.
        keys: one for each word of a row.
        constants: ``digest_torch.constants``.
        dtypes: each tensor's dtype, a key of ``LANES``. Without them, values are not checked.
    """
    device = keys.device
    sums = torch.zeros((len(spans), 2), dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    tensors, programs = _tables(spans, dtypes, device, stream)
    if count := len(programs):
        check_finite = dtypes is not None
        # The fastest of 24 variants on an H200.
        step = 32 if check_finite else 8
        _hash[(count,)](
            tensors, programs, keys, constants, sums, check_finite=check_finite, rows=_ROWS, step=step, num_warps=4
        )
    return sums


@functools.lru_cache(maxsize=_KEPT_TABLES)
def _tables(
    spans: tuple[tuple[int, int], ...],
    dtypes: tuple[torch.dtype, ...] | None,
    device: torch.device,
    stream: int,  # noqa: ARG001 - part of the cache key
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables that ``_hash`` reads.

    They are cached for the next update, whose tensors often lie at the same addresses. Each CUDA stream has its own, because
    it has filled them.
    """
    counts = [-(-nbytes // (256 * _ROWS)) for _, nbytes in spans]
    lanes = [LANES[dtype] for dtype in dtypes] if dtypes else [(0, 0, 0)] * len(spans)
    # Each table gets memory of its own, because Triton compiles another kernel for a pointer of another alignment.
    tensors = torch.tensor([(*span, *lane) for span, lane in zip(spans, lanes, strict=True)]).to(device)
    counted = torch.tensor(counts, dtype=torch.int64)
    owners = torch.repeat_interleave(counted)
    programs = torch.empty((len(owners), 2), dtype=torch.int64)
    programs[:, 0] = owners
    programs[:, 1] = (torch.arange(len(owners)) - (counted.cumsum(0) - counted)[owners]) * _ROWS
    return tensors, programs.to(device)
