"""``digest.py``'s function for CPUs, compiled by Numba (which vLLM installs): one pass, without the GIL."""

from __future__ import annotations

import numba
import numpy as np

_ROW_BYTES, _WORDS = 256, 64


@numba.njit("uint64(uint64, uint64[::1])", cache=True)
def _mix(value, constants):  # type: ignore[no-untyped-def]
    value = (value ^ (value >> np.uint64(30))) * constants[1]
    value = (value ^ (value >> np.uint64(27))) * constants[2]
    return value ^ (value >> np.uint64(31))


@numba.njit("uint64(uint8[::1], int64[::1], uint64[::1])", nogil=True, cache=True)
def digest(data, keys, constants):  # type: ignore[no-untyped-def]
    """The digest of one tensor's bytes.

    Args:
        data: ``uint8``, aligned to 4 bytes.
        keys: one for each word of a row.
        constants: ``digest_torch.constants``.
    """
    rows = data.size // _ROW_BYTES
    words = data[: rows * _ROW_BYTES].view(np.int32)
    total = np.uint64(0)
    for row in range(rows):
        hashed = np.int64(0)
        for word in range(_WORDS):
            hashed += words[row * _WORDS + word] * keys[word]
        total += _mix(np.uint64(hashed) + np.uint64(row + 1) * constants[0], constants)
    if rows * _ROW_BYTES < data.size:
        # A partial row counts as if zeros followed.
        last = np.zeros(_ROW_BYTES, dtype=np.uint8)
        last[: data.size - rows * _ROW_BYTES] = data[rows * _ROW_BYTES :]
        hashed = np.int64(0)
        for word, value in enumerate(last.view(np.int32)):
            hashed += value * keys[word]
        total += _mix(np.uint64(hashed) + np.uint64(rows + 1) * constants[0], constants)
    return _mix(total + np.uint64(data.size) * constants[0], constants)
