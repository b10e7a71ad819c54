"""``digest.py``'s function as one Triton kernel: each byte is read once, and any number of tensors cost one launch."""

from __future__ import annotations

import functools

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# What a program hashes: long enough to keep its table short, short enough to fill a GPU with one small model.
_ROWS = 512
# The kernel reads so many bytes at once.
ALIGNMENT = 16
# For so many sets of tensors: those of an update, in pieces, and the live ones; up to some MB of each.
_KEPT_TABLES = 64


def _lanes(exponent: int, bits: int) -> tuple[int, int, int]:
    """For values of ``bits`` bits, as many as fit into a word: ``exponent``, the lowest and the highest bit of each.

    A value is NaN or infinite where its exponent is all ones: ``~word & exponent`` has zeros in its lane, and one less
    borrows from its highest bit, which ``exponent`` leaves alone.
    """
    repeated = sum(1 << shift for shift in range(0, 32, bits))
    masks = (exponent * repeated, repeated, repeated << (bits - 1))
    first, second, third = (mask - (1 << 32) if mask >> 31 else mask for mask in masks)
    return first, second, third


# Of the dtypes whose values the kernel can look at. Of float8_e4m3fn only one pattern is NaN, and none infinite.
LANES = {
    torch.float32: _lanes(0x7F800000, 32),
    torch.bfloat16: _lanes(0x7F80, 16),
    torch.float16: _lanes(0x7C00, 16),
    torch.float8_e5m2: _lanes(0x7C, 8),
    torch.float8_e4m3fn: _lanes(0x7F, 8),
    **dict.fromkeys((torch.uint8, torch.int8, torch.bool, torch.int16, torch.int32, torch.int64), (0, 0, 0)),
}


# No annotations: Triton looks their names up, and knows its own only.
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
    look: tl.constexpr,
    rows: tl.constexpr,
    step: tl.constexpr,
):
    """Add to the first sum of a tensor the mixed hashes of some of its rows; with ``look``, to the second how many of their
    words hold NaN or infinite values.

    Of each tensor: address, size in bytes, ``LANES``. Of each program: its tensor, and its first row there.
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
    if look:
        exponent = tl.load(tensors + 5 * owner + 2).to(tl.int32)
        lowest = tl.load(tensors + 5 * owner + 3).to(tl.int32)
        highest = tl.load(tensors + 5 * owner + 4).to(tl.int32)
        found = tl.zeros((step, 64), tl.int32)
    if (start + rows) * 256 <= size:
        # Rows of the tensor throughout: loads without a mask are four words wide.
        for done in range(0, rows, step):
            row = start + done + tl.arange(0, step)
            value = tl.load(words + row[:, None] * 64 + column[None, :])
            if look:
                found |= ((value ^ -1) & exponent) - lowest & highest
            total += _mix(tl.sum(value.to(tl.int64) * key, axis=1) + (row + 1) * gamma, first, second)
    else:
        for done in range(0, rows, step):
            row = start + done + tl.arange(0, step)
            word = row[:, None] * 64 + column[None, :]
            value = tl.load(words + word, mask=word * 4 + 4 <= size, other=0)
            if size % 4 != 0:
                # The last word of a tensor that does not fill it: as if zeros followed.
                for byte in tl.static_range(3):
                    place = word * 4 + byte
                    cut = (word * 4 + 4 > size) & (place < size)
                    value += tl.load(octets + place, mask=cut, other=0).to(tl.int32) << (8 * byte)
            if look:
                found |= ((value ^ -1) & exponent) - lowest & highest
            hashed = tl.sum(value.to(tl.int64) * key, axis=1)
            total += tl.where(row * 256 < size, _mix(hashed + (row + 1) * gamma, first, second), 0)
    tl.atomic_add(sums + 2 * owner, tl.sum(total, axis=0))
    if look:
        count = tl.sum(tl.sum((found != 0).to(tl.int64), axis=1), axis=0)
        if count > 0:
            tl.atomic_add(sums + 2 * owner + 1, count)


def row_sums(
    spans: tuple[tuple[int, int], ...],
    keys: torch.Tensor,
    constants: torch.Tensor,
    dtypes: tuple[torch.dtype, ...] | None = None,
) -> torch.Tensor:
    """Of each tensor the sum of the mixed hashes of its rows, and how many of its words hold NaN or infinite values.

    Args:
        spans: address (a multiple of ``ALIGNMENT``) and bytes of each tensor, on the device of ``keys``.
        keys: of each word of a row.
        constants: ``digest``'s three.
        dtypes: of each tensor, a key of ``LANES``; without them nobody looks at values.
    """
    device = keys.device
    sums = torch.zeros((len(spans), 2), dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    tensors, programs = _tables(spans, dtypes, device, stream)
    if count := len(programs):
        look = dtypes is not None
        # The fastest of 24 that were tried on an H200.
        step = 32 if look else 8
        _hash[(count,)](tensors, programs, keys, constants, sums, look=look, rows=_ROWS, step=step, num_warps=4)
    return sums


@functools.lru_cache(maxsize=_KEPT_TABLES)
def _tables(
    spans: tuple[tuple[int, int], ...],
    dtypes: tuple[torch.dtype, ...] | None,
    device: torch.device,
    stream: int,  # noqa: ARG001 - tells tables apart
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``_hash`` reads of tensors and programs. Kept for the next update, whose tensors lie where these do; of each CUDA
    stream its own, which has made them.
    """
    counts = [-(-nbytes // (256 * _ROWS)) for _, nbytes in spans]
    lanes = [LANES[dtype] for dtype in dtypes] if dtypes else [(0, 0, 0)] * len(spans)
    # Each table in memory of its own: a pointer of another alignment would be another kernel to compile.
    tensors = torch.tensor([(*span, *lane) for span, lane in zip(spans, lanes, strict=True)]).to(device)
    counted = torch.tensor(counts, dtype=torch.int64)
    owners = torch.repeat_interleave(counted)
    programs = torch.empty((len(owners), 2), dtype=torch.int64)
    programs[:, 0] = owners
    programs[:, 1] = (torch.arange(len(owners)) - (counted.cumsum(0) - counted)[owners]) * _ROWS
    return tensors, programs.to(device)
