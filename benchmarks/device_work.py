"""Time each piece of an update's work on one device, and the lower bound: one copy of the same bytes.

    python -m benchmarks.device_work                 # Qwen3-8B's tensors, 16.4 GB of bf16: needs 50 GB of device memory
    python -m benchmarks.device_work --layers 2      # fewer layers; runs on a CPU too
    python -m benchmarks.device_work --experts 128 --layers 4   # many small tensors: the experts of an MoE, one by one

Each piece must give the right bytes before its time counts. Times are medians of ``--repeat`` runs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch

from areal_vllm_ext.integrity import digest, digest_torch
from areal_vllm_ext.transport.buckets import digest_and_check_finite, first_non_finite
from areal_vllm_ext.worker.load.plan import LoadPlan, ModelFingerprint, PlanRun
from areal_vllm_ext.worker.load.strides import Copy, StridedSlice
from areal_vllm_ext.worker.load.targets import LiveTarget, RecordedStorage
from areal_vllm_ext.worker.staging import Pool

_PIECE_BYTES = 1 << 30


def shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Qwen3-8B's tensors; with ``experts``, its MLP is that of Qwen3-30B-A3B."""
    hidden, ffn, moe_ffn, q, kv, vocabulary = 4096, 12288, 768, 4096, 1024, 151936
    found: dict[str, tuple[int, ...]] = {"embed": (vocabulary, hidden), "norm": (hidden,), "head": (vocabulary, hidden)}
    for i in range(layers):
        found |= {f"{i}.q": (q, hidden), f"{i}.k": (kv, hidden), f"{i}.v": (kv, hidden), f"{i}.o": (hidden, q)}
        found |= {f"{i}.in": (hidden,), f"{i}.post": (hidden,), f"{i}.q_norm": (128,), f"{i}.k_norm": (128,)}
        if experts:
            for e in range(experts):
                found |= {f"{i}.{e}.{w}": (moe_ffn, hidden) for w in ("gate", "up")}
                found[f"{i}.{e}.down"] = (hidden, moe_ffn)
        else:
            found |= {f"{i}.gate": (ffn, hidden), f"{i}.up": (ffn, hidden), f"{i}.down": (hidden, ffn)}
    return found


def staged(found: dict[str, tuple[int, ...]], device: torch.device, bucket_bytes: int) -> dict[str, torch.Tensor]:
    """Return random tensors in buckets, as they arrive at a worker."""
    tensors: dict[str, torch.Tensor] = {}
    bucket, end = torch.empty(0, dtype=torch.uint8), 0
    for name, shape in found.items():
        nbytes = 2 * math.prod(shape)
        if end + nbytes > bucket.numel():
            bucket, end = torch.empty(max(bucket_bytes, nbytes), dtype=torch.uint8, device=device), 0
        tensors[name] = bucket[end : end + nbytes].view(torch.bfloat16).view(shape).normal_()
        end += -(-nbytes // 256) * 256
    return tensors


def plan_of(tensors: dict[str, torch.Tensor]) -> tuple[LoadPlan, list[torch.Tensor]]:
    """Return a plan that copies each tensor to memory of its own, and that memory."""
    targets, live = [], []
    for name, tensor in tensors.items():
        flat = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        storage = RecordedStorage(names=(name,))
        run = StridedSlice(0, (tensor.numel(),), (1,))
        storage.copies.append(Copy(run, name, run))
        targets.append(LiveTarget(flat, storage))
        live.append(flat)
    return LoadPlan(targets, tensors, ModelFingerprint(torch.nn.Module())), live


def measured(work: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Return the median time of ``work`` in milliseconds."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    times = []
    for _ in range(repeat):
        finish()
        started = time.perf_counter()
        work()
        finish()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--experts", type=int, default=0, help="experts of each layer; 0: a dense model")
    parser.add_argument("--bucket-mib", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    tensors = staged(shapes(options.layers, options.experts), device, options.bucket_mib << 20)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    rows: dict[str, float] = {}
    failures: list[str] = []

    def row(name: str, work: Callable[[], object]) -> None:
        rows[name] = measured(work, device, options.repeat)
        rate = nbytes / rows[name] / 1e6
        print(f"{name:42} {rows[name]:10.2f} ms {rate:8.0f} GB/s", flush=True)

    print(f"{len(tensors)} tensors, {nbytes / 1e9:.2f} GB, {device}")
    halves = torch.empty(2, nbytes, dtype=torch.uint8, device=device)
    row("limit: one copy", lambda: halves[0].copy_(halves[1]))
    halves = halves[:, :0].clone()

    plan, live = plan_of(tensors)
    bound = PlanRun(plan)
    bound.add(plan.copies_of(tensors))

    def singly() -> None:
        for to, tensor in zip(live, tensors.values(), strict=True):
            to.view(tensor.shape).copy_(tensor, non_blocking=True)

    def wrong() -> bool:
        equal = all(torch.equal(to.view(one.shape), one) for to, one in zip(live, tensors.values(), strict=True))
        for to in live:
            to.zero_()
        return not equal

    for name, work in (("plan: copy", bound.copy), ("a copy_ for each tensor", singly)):
        row(name, work)
        if wrong():
            failures.append(f"{name}: wrong bytes")
    row("plan: bind (beside generation)", lambda: PlanRun(plan).add(plan.copies_of(tensors)))
    digest.compile_cpu_kernel().result()
    row("digests", lambda: digest.digests_of(tensors.values()))
    right = digest_torch.digests_of(list(tensors.values())[:5])
    if digest.digests_of(list(tensors.values())[:5]) != right:
        failures.append("digests: the kernel's are others than the operators'")
    row("digests by torch's operators", lambda: digest_torch.digests_of(tensors.values()))
    row(
        "finite? isfinite().all() each",
        lambda: torch.stack([torch.isfinite(one).all() for one in tensors.values()]).all(),
    )
    row(
        "finite? largest of each",
        lambda: torch.isfinite(torch.stack(torch._foreach_norm(list(tensors.values()), math.inf))).all(),
    )
    row("finite? as it is done where there is no kernel", lambda: first_non_finite(tensors.items()))
    row("digests and finite?", lambda: digest_and_check_finite(list(tensors.items())))
    pool, pieces = Pool(device), -(-nbytes // _PIECE_BYTES)

    def take(*, give_back: bool) -> None:
        for _ in [pool.empty(_PIECE_BYTES) for _ in range(pieces)]:
            pass
        if give_back:
            pool.give_back()

    row(f"staging: {pieces} GiB taken and given back", lambda: take(give_back=True))
    row(f"staging: {pieces} GiB taken again", lambda: take(give_back=False))
    result = {
        "command": " ".join(["python -m benchmarks.device_work", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tensors": len(tensors),
        "bytes": nbytes,
        "kernel": digest.has_kernel(device),
        "ms": {name: round(value, 3) for name, value in rows.items()},
        "failures": failures,
    }
    print(json.dumps(result))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
