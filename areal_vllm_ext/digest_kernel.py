"""``digest.py``'s function as one Triton kernel: each byte is read once, and any number of tensors cost one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

# What a program hashes: long enough to keep its table short, short enough to fill a GPU with one small model.
_ROWS = 512
# The kernel reads so many bytes at once.
ALIGNMENT = 16


# No annotations: Triton looks their names up, and knows its own only.
@triton.jit
def _mix(values, first, second):  # type: ignore[no-untyped-def]
    values = (values ^ ((values >> 30) & 0x3FFFFFFFF)) * first
    values = (values ^ ((values >> 27) & 0x1FFFFFFFFF)) * second
    return values ^ ((values >> 31) & 0x1FFFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _hash(  # type: ignore[no-untyped-def]
    addresses,
    sizes,
    owners,
    starts,
    keys,
    sums,
    constants,
    rows: tl.constexpr,
    step: tl.constexpr,
):
    """Add to the sum of a tensor the mixed hashes of some of its rows.

    Of tensor i: ``addresses[i]`` and ``sizes[i]`` in bytes; of program j: its tensor ``owners[j]``, and its first row there.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    size = tl.load(sizes + owner)
    address = tl.load(addresses + owner)
    words = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    octets = address.to(tl.pointer_type(tl.uint8))
    gamma, first, second = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    start = tl.load(starts + program)
    column = tl.arange(0, 64)
    key = tl.load(keys + column)[None, :]
    total = tl.zeros((step,), tl.int64)
    if (start + rows) * 256 <= size:
        # Rows of the tensor throughout: loads without a mask are four words wide.
        for done in range(0, rows, step):
            row = start + done + tl.arange(0, step)
            value = tl.load(words + row[:, None] * 64 + column[None, :])
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
            hashed = tl.sum(value.to(tl.int64) * key, axis=1)
            total += tl.where(row * 256 < size, _mix(hashed + (row + 1) * gamma, first, second), 0)
    tl.atomic_add(sums + owner, tl.sum(total, axis=0))


def row_sums(spans: Sequence[tuple[int, int]], keys: torch.Tensor, constants: torch.Tensor) -> torch.Tensor:
    """The sum of the mixed hashes of each tensor's rows.

    Args:
        spans: address (a multiple of ``ALIGNMENT``) and bytes of each tensor, on the device of ``keys``.
        keys: of each word of a row.
        constants: ``digest``'s three.
    """
    device = keys.device
    programs = torch.tensor([-(-nbytes // (256 * _ROWS)) for _, nbytes in spans])
    count = int(programs.sum())
    sums = torch.zeros(len(spans), dtype=torch.int64, device=device)
    if count:
        ends = programs.cumsum(0)
        owners = torch.repeat_interleave(torch.arange(len(spans)), programs)
        starts = (torch.arange(count) - (ends - programs)[owners]) * _ROWS
        # Each in memory of its own: a pointer of another alignment would be another kernel to compile.
        tables = [torch.tensor(column).to(device) for column in zip(*spans, strict=True)]
        tables += [owners.to(device), starts.to(device)]
        _hash[(count,)](*tables, keys, sums, constants, rows=_ROWS, step=32, num_warps=4)
    return sums
