"""Digests of tensors: 64 bits over the bytes, computed on the device where they lie, the same on CPU and CUDA.

A guard against faults (a flipped bit, zeros, elements or rows in other places, a tensor cut off), not against forgers: the
wire is authenticated. The bytes are cut into rows of 256. A row is hashed by a multilinear function of its 32-bit words
with fixed random keys, modulo 2^64 (two different rows collide with a probability of 2^-33 at most). The hash of each row
is mixed with the row's number, so that its place counts, and their sum with the number of bytes. Dtype and shape are not
in it: compare them beside it, or use ``manifest``.

On GPUs one Triton kernel reads any number of tensors where they lie (``digest_triton.py``), on CPUs a loop that Numba compiles
(``digest_cpu.py``). Where there is neither it is torch's operators: all tensors of a bucket cost as many launches as one of
its size; temporary memory: two pieces of ``_PIECE_BYTES``, and a quarter of the buffer for the hashes of its rows and their
places. Measured: 2.7 TB/s on an H200 (with operators 0.09), 5.9 GB/s on a core of a Xeon of 2.5 GHz (0.9).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

import torch

from ..protocol import TensorMeta, encoder

logger = logging.getLogger("vllm.areal_vllm_ext")

# Tensors by name: what each is, and its digest.
Contents = dict[str, tuple[TensorMeta, int]]

ROW_BYTES = 256
_WORDS = ROW_BYTES // 4
# What is hashed at once: on a CPU it stays in a core's cache, on a GPU it is long enough to hide a launch.
_PIECE_BYTES = {"cpu": 1 << 20}
_PIECE_BYTES_ELSEWHERE = 32 << 20
# Of several tensors, those up to this are put together.
_SMALL_BYTES = 16 << 20
# For the kernel: what it cannot read where it lies is copied, so much at once.
_COPIED_BYTES = 256 << 20


def _signed(bits: int) -> int:
    """The 64-bit integer of torch that has these bits."""
    return bits - (1 << 64) if bits >> 63 else bits


# Multipliers of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def digests(buffer: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[int]:
    """The digests of tensors that lie in one buffer.

    Args:
        buffer: contiguous ``uint8``. What lies between the tensors does not count.
        spans: offset (a multiple of ``ROW_BYTES``) and bytes of each tensor.

    Returns:
        for each tensor an integer of 64 bits.

    Raises:
        ValueError: where a tensor does not lie in the buffer, or not on a row.
    """
    for offset, nbytes in spans:
        if offset % ROW_BYTES or min(offset, nbytes) < 0 or offset + nbytes > buffer.numel():
            raise ValueError(f"{nbytes} bytes at {offset} do not lie on rows inside a buffer of {buffer.numel()} bytes")
    if not spans:
        return []
    if not has_kernel(buffer.device):
        return _spans_by_operators(buffer, spans)
    if buffer.device.type == "cpu" or (start := buffer.data_ptr()) % ROW_BYTES:
        return _by_kernel([buffer[offset : offset + nbytes] for offset, nbytes in spans], buffer.device)
    # Without a tensor for each: torch lets go of the interpreter with every operator, and an engine that generates takes it.
    return _at([(start + offset, nbytes) for offset, nbytes in spans], buffer.device)[0]


def _spans_by_operators(buffer: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[int]:
    rows = _hash_rows(buffer, spans)
    counts = [-(-nbytes // ROW_BYTES) for _, nbytes in spans]
    total = sum(counts)
    # One copy to the device: of each tensor its first row, its rows, where they end among those of all tensors, its bytes.
    columns = zip(spans, counts, itertools.accumulate(counts), strict=True)
    table = [(offset // ROW_BYTES, count, end, nbytes) for (offset, nbytes), count, end in columns]
    starts, lengths, ends, sizes = torch.tensor(table).to(buffer.device).unbind(1)
    before = ends - lengths
    owner = torch.repeat_interleave(lengths, output_size=total)
    place = torch.arange(total, device=buffer.device) - before[owner]
    mixed = _mix(rows[starts[owner] + place] + (place + 1) * _GAMMA)
    sums = torch.zeros(total + 1, dtype=torch.int64, device=buffer.device)
    torch.cumsum(mixed, 0, out=sums[1:])
    result: list[int] = _mix(sums[ends] - sums[before] + sizes * _GAMMA).tolist()
    return [value % (1 << 64) for value in result]


def digests_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """The digest of each tensor, of any dtype and device, over its elements in order.

    One that is not contiguous is copied for the time of its digest. By torch's operators, small ones are copied into one
    buffer first, so that many of them cost few launches.
    """
    result: list[int] = []
    for device, together in itertools.groupby(tensors, key=lambda tensor: tensor.device):
        if has_kernel(device):
            result += _by_kernel(together, device)
        else:
            result += _by_operators(together)
    return result


def supports_finite_check(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether ``digests_and_finite`` can be asked about these."""
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and _can_check_values(devices.pop(), (tensor.dtype for tensor in tensors))


def digests_and_finite_in(
    buffer: torch.Tensor, spans: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
) -> tuple[list[int], list[bool]] | None:
    """``digests_and_finite`` of tensors in one buffer, as ``digests`` takes it; None where that cannot be asked."""
    start = buffer.data_ptr()
    if start % ROW_BYTES or not _can_check_values(buffer.device, dtypes):
        return None
    return _at([(start + offset, nbytes) for offset, nbytes in spans], buffer.device, dtypes)


def _can_check_values(device: torch.device, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether the kernel looks at values there."""
    if device.type == "cpu" or not has_kernel(device):
        return False
    from .digest_triton import LANES

    return all(dtype in LANES for dtype in set(dtypes))


def digests_and_finite(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[bool]]:
    """``digests_of``, and whether all values of each are finite, in one read, where ``supports_finite_check``."""
    return _on_gpu(tensors, tensors[0].device, look=True)


def digests_and_finite_async(tensors: Sequence[torch.Tensor]) -> Callable[[], tuple[list[int], list[bool]]]:
    """Have the device begin with what ``digests_and_finite`` gives, which the result waits for: of tensors that lie where the
    kernel can read them, and stay as they are until then.
    """
    device = tensors[0].device
    with torch.cuda.device(device):
        spans = tuple((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
        sums = _launched(spans, device, tuple(tensor.dtype for tensor in tensors))
        found = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

    def finish() -> tuple[list[int], list[bool]]:
        done.synchronize()
        return _finished(found, spans)

    return finish


def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs on ``device``, and gives there what torch's operators give.

    On a CPU not before it is compiled, for which the first call starts a thread: Numba takes seconds, and no deadline has them.
    """
    if device.type == "cpu":
        return compile_cpu_kernel().done() and compile_cpu_kernel().result()
    return _is_right(device)


@functools.cache
def compile_cpu_kernel() -> Future[bool]:
    """Whether there is a kernel for CPUs, when that is known."""
    found: Future[bool] = Future()
    threading.Thread(target=lambda: found.set_result(_is_right(torch.device("cpu"))), name="areal-compile").start()
    return found


@functools.cache
def _is_right(device: torch.device) -> bool:
    probe = torch.arange(1 << 20, device=device).view(torch.uint8)
    probes = [probe, probe[: 3 * ROW_BYTES], probe[: 2 * ROW_BYTES + 7], probe[:2], probe[:0]]
    try:
        right = _by_kernel(probes, device) == _by_operators(probes, on_cpu=True)
    except Exception:  # no Triton, or no compiler for its launchers; no Numba
        logger.info("areal_vllm_ext: digests are computed by torch's operators, which takes longer", exc_info=True)
        return False
    if not right:
        logger.warning("areal_vllm_ext: the kernel for digests is wrong on %s, and is not used", device)
    return right


def _by_kernel(tensors: Iterable[torch.Tensor], device: torch.device) -> list[int]:
    return _on_cpu(tensors) if device.type == "cpu" else _on_gpu(tensors, device)[0]


def _on_cpu(tensors: Iterable[torch.Tensor]) -> list[int]:
    from . import digest_numba

    cpu = torch.device("cpu")
    keys, constants = _keys(cpu).numpy(), _constants(cpu).numpy().view("uint64")
    result: list[int] = []
    for tensor in tensors:
        flat = as_bytes(tensor.detach())
        if flat.data_ptr() % 4:
            flat = flat.clone()
        result.append(int(digest_numba.digest(flat.numpy(), keys, constants)))
    return result


def _on_gpu(
    tensors: Iterable[torch.Tensor], device: torch.device, *, look: bool = False
) -> tuple[list[int], list[bool]]:
    """Digests; with ``look`` also whether all values of each are finite."""
    from . import digest_triton

    result: list[int] = []
    finite: list[bool] = []
    batch: list[torch.Tensor] = []
    copied = 0

    def flush() -> None:
        nonlocal copied
        if batch:
            spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in batch]
            values, are_finite = _at(spans, device, [tensor.dtype for tensor in batch] if look else None)
            result.extend(values)
            finite.extend(are_finite)
        batch.clear()
        copied = 0

    for tensor in tensors:
        readable = tensor
        if not tensor.is_contiguous() or tensor.data_ptr() % digest_triton.ALIGNMENT:
            readable = tensor.detach().clone(memory_format=torch.contiguous_format)
            copied += readable.nbytes
        batch.append(readable)
        if copied > _COPIED_BYTES:
            flush()
    flush()
    return result, finite


def _at(
    spans: Sequence[tuple[int, int]], device: torch.device, dtypes: Sequence[torch.dtype] | None = None
) -> tuple[list[int], list[bool]]:
    """The same of (address, bytes) on a GPU; with ``dtypes`` also whether all values of each are finite."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        sums = _launched(tuple(spans), device, tuple(dtypes) if dtypes else None).cpu()
    values, finite = _finished(sums, spans)
    return values, finite if dtypes else []


def _launched(
    spans: tuple[tuple[int, int], ...], device: torch.device, dtypes: tuple[torch.dtype, ...] | None
) -> torch.Tensor:
    """The kernel's sums, on the device, which may not be there yet."""
    from . import digest_triton

    return digest_triton.row_sums(spans, _keys(device), _constants(device), dtypes)


def _finished(sums: torch.Tensor, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """What the kernel's sums, in host memory, say of each tensor."""
    sizes = torch.tensor([nbytes for _, nbytes in spans], dtype=torch.int64)
    values: list[int] = _mix(sums[:, 0] + sizes * _GAMMA).tolist()
    return [value % (1 << 64) for value in values], (sums[:, 1] == 0).tolist()


def _by_operators(tensors: Iterable[torch.Tensor], *, on_cpu: bool = False) -> list[int]:
    result: list[int] = []
    small: list[torch.Tensor] = []
    nbytes = 0

    def flush() -> None:
        nonlocal nbytes
        if small:
            result.extend(_small(small))
        small.clear()
        nbytes = 0

    for tensor in tensors:
        one = tensor.detach().cpu() if on_cpu else tensor.detach()
        if nbytes + one.nbytes > _SMALL_BYTES:
            flush()
        if one.nbytes > _SMALL_BYTES:
            flat = as_bytes(one)
            result += _spans_by_operators(flat, [(0, flat.numel())])
        else:
            small.append(one)
            nbytes += one.nbytes
    flush()
    return result


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in order, as flat ``uint8``: its own memory where it is contiguous, else a copy."""
    return tensor.reshape(-1).view(torch.uint8)


def manifest(entries: Iterable[tuple[TensorMeta, int]]) -> str:
    """One digest (32 hexadecimal digits) of a set of tensors, by name, dtype, shape and digest; their order does not count."""
    ordered = sorted(entries, key=lambda entry: entry[0].name)
    return hashlib.blake2b(encoder.encode(ordered), digest_size=16).hexdigest()


@functools.cache
def _keys(device: torch.device) -> torch.Tensor:
    """A key for each word of a row: fixed, the same in every process."""
    text = hashlib.shake_256(b"areal_vllm_ext.digest").digest(8 * _WORDS)
    keys = [int.from_bytes(text[start : start + 8], "little", signed=True) | 1 for start in range(0, len(text), 8)]
    return torch.tensor(keys, device=device)


@functools.cache
def _constants(device: torch.device) -> torch.Tensor:
    return torch.tensor([_GAMMA, _FIRST, _SECOND], device=device)


def _small(tensors: Sequence[torch.Tensor]) -> list[int]:
    spans: list[tuple[int, int]] = []
    end = 0
    for tensor in tensors:
        spans.append((end, tensor.nbytes))
        end += -(-tensor.nbytes // ROW_BYTES) * ROW_BYTES
    buffer = torch.zeros(end, dtype=torch.uint8, device=tensors[0].device)
    for tensor, (offset, nbytes) in zip(tensors, spans, strict=True):
        buffer[offset : offset + nbytes] = as_bytes(tensor)
    return _spans_by_operators(buffer, spans)


def _hash_rows(buffer: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    whole = buffer.numel() // ROW_BYTES
    words = buffer[: whole * ROW_BYTES].view(torch.int32).view(-1, _WORDS)
    keys = _keys(buffer.device)
    hashes = torch.empty(whole + 1, dtype=torch.int64, device=buffer.device)
    step = _PIECE_BYTES.get(buffer.device.type, _PIECE_BYTES_ELSEWHERE) // ROW_BYTES
    products = torch.empty((min(step, whole), _WORDS), dtype=torch.int64, device=buffer.device)
    for start in range(0, whole, step):
        piece = words[start : start + step]
        torch.mul(piece, keys, out=products[: len(piece)])
        torch.sum(products[: len(piece)], 1, out=hashes[start : min(start + step, whole)])
    # The last row of a tensor that does not fill it counts as if zeros followed: what does follow may be anything.
    cut = [((offset + nbytes) // ROW_BYTES, nbytes % ROW_BYTES) for offset, nbytes in spans if nbytes % ROW_BYTES]
    place = torch.arange(ROW_BYTES, device=buffer.device)
    for start in range(0, len(cut), step):
        rows, used = torch.tensor(cut[start : start + step]).to(buffer.device).unbind(1)
        index = (rows[:, None] * ROW_BYTES + place).clamp_(max=buffer.numel() - 1)
        row_bytes = buffer[index] * (place < used[:, None])
        hashes[rows] = (row_bytes.view(torch.int32) * keys).sum(1)
    return hashes


def _mix(values: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser, a bijection of 64 bits in which each bit depends on all."""
    values = (values ^ _shift(values, 30)) * _FIRST
    values = (values ^ _shift(values, 27)) * _SECOND
    return values ^ _shift(values, 31)


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left: torch's own shift repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
