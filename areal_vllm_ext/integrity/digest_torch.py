"""``digest.py``'s function by torch's operators: what it is defined by, and the fallback where no kernel runs.

All tensors of a buffer cost as many launches as one tensor of its size. Temporary memory: two pieces of ``_PIECE_BYTES``, and
a quarter of the buffer for the hashes of its rows.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROW_BYTES = 256
_WORDS = ROW_BYTES // 4
# Bytes that are hashed at once: on a CPU they stay in a core's cache, on a GPU they are enough to hide a launch.
_PIECE_BYTES = {"cpu": 1 << 20}
_PIECE_BYTES_ELSEWHERE = 32 << 20
# Tensors up to this size are copied into one buffer, so that many of them cost few launches.
_SMALL_BYTES = 16 << 20


def _signed(bits: int) -> int:
    """Return the signed 64-bit integer with these bits, because torch has no unsigned arithmetic."""
    return bits - (1 << 64) if bits >> 63 else bits


# Multipliers of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


@functools.cache
def keys(device: torch.device) -> torch.Tensor:
    """Return the key of each word of a row. They are the same in every process."""
    text = hashlib.shake_256(b"areal_vllm_ext.digest").digest(8 * _WORDS)
    values = [int.from_bytes(text[start : start + 8], "little", signed=True) | 1 for start in range(0, len(text), 8)]
    return torch.tensor(values, device=device)


@functools.cache
def constants(device: torch.device) -> torch.Tensor:
    """Return SplitMix64's three multipliers."""
    return torch.tensor([_GAMMA, _FIRST, _SECOND], device=device)


def from_row_sums(sums: torch.Tensor, nbytes: torch.Tensor) -> list[int]:
    """Return digests from the sum of each tensor's mixed row hashes, and its size."""
    values: list[int] = _mix(sums + nbytes * _GAMMA).tolist()
    return [value % (1 << 64) for value in values]


def digests_in(buffer: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the digests of tensors that lie in one buffer on ``spans``; see ``digest.digests``."""
    rows = _hash_rows(buffer, spans)
    counts = [-(-nbytes // ROW_BYTES) for _, nbytes in spans]
    total = sum(counts)
    # One copy to the device: for each tensor its first row, its rows, where they end among all tensors' rows, its bytes.
    columns = zip(spans, counts, itertools.accumulate(counts), strict=True)
    table = [(offset // ROW_BYTES, count, end, nbytes) for (offset, nbytes), count, end in columns]
    starts, lengths, ends, sizes = torch.tensor(table).to(buffer.device).unbind(1)
    before = ends - lengths
    owner = torch.repeat_interleave(lengths, output_size=total)
    number = torch.arange(total, device=buffer.device) - before[owner]
    mixed = _mix(rows[starts[owner] + number] + (number + 1) * _GAMMA)
    sums = torch.zeros(total + 1, dtype=torch.int64, device=buffer.device)
    torch.cumsum(mixed, 0, out=sums[1:])
    return from_row_sums(sums[ends] - sums[before], sizes)


def digests_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return the digest of each tensor, all of one device."""
    result: list[int] = []
    small: list[torch.Tensor] = []
    nbytes = 0

    def flush() -> None:
        nonlocal nbytes
        if small:
            result.extend(_of_small(small))
        small.clear()
        nbytes = 0

    for tensor in tensors:
        if nbytes + tensor.nbytes > _SMALL_BYTES:
            flush()
        if tensor.nbytes > _SMALL_BYTES:
            flat = as_bytes(tensor.detach())
            result += digests_in(flat, [(0, flat.numel())])
        else:
            small.append(tensor.detach())
            nbytes += tensor.nbytes
    flush()
    return result


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's elements in order as flat ``uint8``: a view if it is contiguous, else a copy."""
    return tensor.reshape(-1).view(torch.uint8)


def _of_small(tensors: Sequence[torch.Tensor]) -> list[int]:
    spans: list[tuple[int, int]] = []
    end = 0
    for tensor in tensors:
        spans.append((end, tensor.nbytes))
        end += -(-tensor.nbytes // ROW_BYTES) * ROW_BYTES
    buffer = torch.zeros(end, dtype=torch.uint8, device=tensors[0].device)
    for tensor, (offset, nbytes) in zip(tensors, spans, strict=True):
        buffer[offset : offset + nbytes] = as_bytes(tensor)
    return digests_in(buffer, spans)


def _hash_rows(buffer: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    whole = buffer.numel() // ROW_BYTES
    words = buffer[: whole * ROW_BYTES].view(torch.int32).view(-1, _WORDS)
    row_keys = keys(buffer.device)
    hashes = torch.empty(whole + 1, dtype=torch.int64, device=buffer.device)
    step = _PIECE_BYTES.get(buffer.device.type, _PIECE_BYTES_ELSEWHERE) // ROW_BYTES
    products = torch.empty((min(step, whole), _WORDS), dtype=torch.int64, device=buffer.device)
    for start in range(0, whole, step):
        piece = words[start : start + step]
        torch.mul(piece, row_keys, out=products[: len(piece)])
        torch.sum(products[: len(piece)], 1, out=hashes[start : min(start + step, whole)])
    # A tensor's last, partial row counts as if zeros followed, because anything may follow in the buffer.
    partial = [((offset + nbytes) // ROW_BYTES, nbytes % ROW_BYTES) for offset, nbytes in spans if nbytes % ROW_BYTES]
    column = torch.arange(ROW_BYTES, device=buffer.device)
    for start in range(0, len(partial), step):
        rows, used = torch.tensor(partial[start : start + step]).to(buffer.device).unbind(1)
        index = (rows[:, None] * ROW_BYTES + column).clamp_(max=buffer.numel() - 1)
        row_bytes = buffer[index] * (column < used[:, None])
        hashes[rows] = (row_bytes.view(torch.int32) * row_keys).sum(1)
    return hashes


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Apply SplitMix64's finaliser, a bijection of 64 bits in which each output bit depends on all input bits."""
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right and fill with zeros; torch's own shift repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
