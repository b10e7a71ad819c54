"""Digests of tensors: 64 bits over the bytes, computed on the device where they lie, equal on CPU and CUDA.

They guard against faults (a flipped bit, zeros, elements or rows in other places, a truncated tensor), not against forgers:
the wire is authenticated. The bytes are cut into rows of 256. A multilinear function of its 32-bit words with fixed random
keys, modulo 2^64, hashes each row, so two different rows collide with a probability of at most 2^-33. The hash of each row is
mixed with the row's number, so that its position counts. The digest mixes the sum of these with the number of bytes. Dtype
and shape are not part of it: compare them too, or use ``manifest``.

``torch.hash_tensor`` is no alternative: it XORs the values, so their order does not count and two equal rows cancel out.

Three implementations give the same digests. On GPUs one Triton kernel reads any number of tensors where they lie
(``digest_triton.py``: 2.7 TB/s on an H200). On CPUs Numba compiles a loop (``digest_numba.py``: 5.9 GB/s on one core of a
2.5 GHz Xeon). Torch's operators (``digest_torch.py``: 0.09 TB/s and 0.9 GB/s) are the definition that kernels are compared
with before they are used. They are also the fallback: a trainer may have no Numba, a container may have no C compiler for
Triton's launchers, and Numba compiles for seconds while the first update is already sent.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future

import torch

from ..observability import fault_points
from ..protocol import TensorMeta, encoder
from . import digest_torch
from .digest_torch import as_bytes

logger = logging.getLogger("vllm.areal_vllm_ext")

ROW_BYTES = digest_torch.ROW_BYTES
# Tensors by name: what each is, and its digest.
Contents = dict[str, tuple[TensorMeta, int]]

# Tensors that the GPU kernel cannot read where they lie are copied; at most this many bytes at once.
_COPIED_BYTES = 256 << 20


def digests(buffer: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the digests of tensors that lie in one buffer.

    Args:
        buffer: contiguous ``uint8``. Bytes between the tensors do not count.
        spans: offset (a multiple of ``ROW_BYTES``) and size of each tensor in bytes.

    Returns:
        an integer of 64 bits for each tensor.

    Raises:
        ValueError: a tensor does not lie inside the buffer, or does not start on a row.
    """
    for offset, nbytes in spans:
        if offset % ROW_BYTES or min(offset, nbytes) < 0 or offset + nbytes > buffer.numel():
            raise ValueError(f"{nbytes} bytes at {offset} do not lie on rows inside a buffer of {buffer.numel()} bytes")
    if not spans:
        return []
    fault_points.reach("digest")
    if not has_kernel(buffer.device):
        return digest_torch.digests_in(buffer, spans)
    if buffer.device.type == "cpu" or (start := buffer.data_ptr()) % ROW_BYTES:
        return _by_kernel([buffer[offset : offset + nbytes] for offset, nbytes in spans], buffer.device)
    # Do not make a tensor of each span: each operator releases the GIL, and a generating engine takes it.
    return _at_addresses([(start + offset, nbytes) for offset, nbytes in spans], buffer.device)[0]


def digests_of(tensors: Iterable[torch.Tensor]) -> list[int]:
    """Return the digest of each tensor, of any dtype and device, over its elements in order.

    A tensor that is not contiguous is copied while it is read.
    """
    result: list[int] = []
    fault_points.reach("digest")
    for device, group in itertools.groupby(tensors, key=lambda tensor: tensor.device):
        by_device = functools.partial(_by_kernel, device=device) if has_kernel(device) else digest_torch.digests_of
        result += by_device(group)
    return result


def supports_finite_check(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether ``digests_and_finite`` can read these tensors."""
    devices = {tensor.device for tensor in tensors}
    return len(devices) == 1 and _kernel_checks(devices.pop(), (tensor.dtype for tensor in tensors))


def digests_and_finite(tensors: Sequence[torch.Tensor]) -> tuple[list[int], list[bool]]:
    """Return ``digests_of``, and whether all values of each are finite, in one read.

    Only for tensors for which ``supports_finite_check`` is true.
    """
    return _on_gpu(tensors, tensors[0].device, check_finite=True)


def digests_and_finite_in(
    buffer: torch.Tensor, spans: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]
) -> tuple[list[int], list[bool]] | None:
    """Return ``digests_and_finite`` of tensors in one buffer (see ``digests``); None if it is not supported there."""
    start = buffer.data_ptr()
    if start % ROW_BYTES or not _kernel_checks(buffer.device, dtypes):
        return None
    return _at_addresses([(start + offset, nbytes) for offset, nbytes in spans], buffer.device, dtypes)


def digests_and_finite_async(tensors: Sequence[torch.Tensor]) -> Callable[[], tuple[list[int], list[bool]]]:
    """Start ``digests_and_finite`` on the device. Call the result to wait for it.

    The tensors must be contiguous and aligned for the kernel, and must not change until then.
    """
    return _started(tensors, tuple(tensor.dtype for tensor in tensors))


def digests_of_async(tensors: Sequence[torch.Tensor]) -> Callable[[], list[int]]:
    """Start ``digests_of`` if a GPU's kernel can read all tensors where they lie. Call the result to wait, or to do it now.

    The tensors must not change until then.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or devices.pop().type != "cuda" or not has_kernel(tensors[0].device) or not _readable(tensors):
        return lambda: digests_of(tensors)
    fault_points.reach("digest")
    finish = _started(tensors)
    return lambda: finish()[0]


def _readable(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether the GPU kernel can read these tensors where they lie."""
    from .digest_triton import ALIGNMENT

    return all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)


def _started(
    tensors: Sequence[torch.Tensor], dtypes: tuple[torch.dtype, ...] | None = None
) -> Callable[[], tuple[list[int], list[bool]]]:
    """Launch the GPU kernel and the copy of its sums to the host."""
    device = tensors[0].device
    with torch.cuda.device(device):
        spans = tuple((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
        sums = _row_sums(spans, device, dtypes)
        on_host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

    def finish() -> tuple[list[int], list[bool]]:
        done.synchronize()
        return _from_sums(on_host, spans)

    return finish


def by_name(entries: Iterable[tuple[TensorMeta, int]]) -> Contents:
    """Return tensors and their digests by the tensors' names."""
    return {meta.name: (meta, value) for meta, value in entries}


def manifest(entries: Iterable[tuple[TensorMeta, int]]) -> str:
    """Return one digest (32 hexadecimal digits) of a set of tensors: their names, dtypes, shapes and digests in any order."""
    ordered = sorted(entries, key=lambda entry: entry[0].name)
    return hashlib.blake2b(encoder.encode(ordered), digest_size=16).hexdigest()


def adapter_manifest(config: str, entries: Iterable[tuple[TensorMeta, int]]) -> str:
    """Return the digest of an adapter: its configuration (JSON) and its tensors."""
    return _combined(config, manifest(entries))


def units_manifest(weights: str, adapters: Mapping[str, str], draft: str = "") -> str:
    """Return the digest of all units of an update.

    Args:
        weights: the manifest of the base weights; empty if the update brings none.
        adapters: the manifest of each adapter, by name.
        draft: the manifest of the drafter; empty if the update brings none.
    """
    units = sorted(({**adapters, "": draft} if draft else adapters).items())  # an adapter has a name
    return _combined(weights, *(text for pair in units for text in pair)) if units else weights


def _combined(*texts: str) -> str:
    return hashlib.blake2b(encoder.encode(texts), digest_size=16).hexdigest()


def has_kernel(device: torch.device) -> bool:
    """Return whether a kernel runs on ``device`` and gives what torch's operators give.

    On a CPU it does once it is compiled. The first call starts that on a thread, because it takes Numba seconds.
    """
    if device.type == "cpu":
        return compile_cpu_kernel().done() and compile_cpu_kernel().result()
    return _is_right(device)


@functools.cache
def compile_cpu_kernel() -> Future[bool]:
    """Start to compile the kernel for CPUs. The result says whether it can be used."""
    found: Future[bool] = Future()
    threading.Thread(target=lambda: found.set_result(_is_right(torch.device("cpu"))), name="areal-compile").start()
    return found


@functools.cache
def _is_right(device: torch.device) -> bool:
    probe = torch.arange(1 << 20, device=device).view(torch.uint8)
    probes = [probe, probe[: 3 * ROW_BYTES], probe[: 2 * ROW_BYTES + 7], probe[:2], probe[:0]]
    try:
        right = _by_kernel(probes, device) == digest_torch.digests_of(one.cpu() for one in probes)
    except Exception:  # no Triton, or no compiler for its launchers; no Numba
        logger.info("areal_vllm_ext: digests are computed by torch's operators, which takes longer", exc_info=True)
        return False
    if not right:
        logger.warning("areal_vllm_ext: the kernel for digests is wrong on %s, so it is not used", device)
    return right


def _by_kernel(tensors: Iterable[torch.Tensor], device: torch.device) -> list[int]:
    return _on_cpu(tensors) if device.type == "cpu" else _on_gpu(tensors, device)[0]


def _on_cpu(tensors: Iterable[torch.Tensor]) -> list[int]:
    from . import digest_numba

    cpu = torch.device("cpu")
    keys, constants = digest_torch.keys(cpu).numpy(), digest_torch.constants(cpu).numpy().view("uint64")
    result: list[int] = []
    for tensor in tensors:
        flat = as_bytes(tensor.detach())
        if flat.data_ptr() % 4:
            flat = flat.clone()
        result.append(int(digest_numba.digest(flat.numpy(), keys, constants)))
    return result


def _on_gpu(
    tensors: Iterable[torch.Tensor], device: torch.device, *, check_finite: bool = False
) -> tuple[list[int], list[bool]]:
    """Return digests and, with ``check_finite``, whether all values of each tensor are finite."""
    from . import digest_triton

    result: list[int] = []
    finite: list[bool] = []
    batch: list[torch.Tensor] = []
    copied = 0

    def flush() -> None:
        nonlocal copied
        if batch:
            spans = [(tensor.data_ptr(), tensor.nbytes) for tensor in batch]
            dtypes = [tensor.dtype for tensor in batch] if check_finite else None
            values, are_finite = _at_addresses(spans, device, dtypes)
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


def _kernel_checks(device: torch.device, dtypes: Iterable[torch.dtype]) -> bool:
    """Return whether the kernel on ``device`` also checks values of these dtypes."""
    if device.type == "cpu" or not has_kernel(device):
        return False
    from .digest_triton import LANES

    return all(dtype in LANES for dtype in set(dtypes))


def _at_addresses(
    spans: Sequence[tuple[int, int]], device: torch.device, dtypes: Sequence[torch.dtype] | None = None
) -> tuple[list[int], list[bool]]:
    """Return the digests of spans (address, bytes) on a GPU and, with ``dtypes``, whether their values are finite."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        sums = _row_sums(tuple(spans), device, tuple(dtypes) if dtypes else None).cpu()
    values, finite = _from_sums(sums, spans)
    return values, finite if dtypes else []


def _row_sums(
    spans: tuple[tuple[int, int], ...], device: torch.device, dtypes: tuple[torch.dtype, ...] | None
) -> torch.Tensor:
    """Launch the GPU kernel. Its sums are on the device."""
    from . import digest_triton

    return digest_triton.row_sums(spans, digest_torch.keys(device), digest_torch.constants(device), dtypes)


def _from_sums(sums: torch.Tensor, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Return digests and finiteness from the GPU kernel's sums in host memory."""
    sizes = torch.tensor([nbytes for _, nbytes in spans], dtype=torch.int64)
    return digest_torch.from_row_sums(sums[:, 0], sizes), (sums[:, 1] == 0).tolist()
