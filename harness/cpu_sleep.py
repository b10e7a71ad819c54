"""A sleep mode for vLLM on a CPU, where it has none: a plugin for tests.

While an engine sleeps, its parameters and keys and values are poison, and a step raises. So tokens or an error show a step of
an engine that sleeps, weights that were written meanwhile, and weights that come back old. Level 1 keeps a copy of the
parameters and brings it back; level 2 keeps buffers only, as vLLM does. Weights that vLLM packs for the CPU stay.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

ARGUMENTS = ("--enable-sleep-mode",)
_POISON = float("nan")
# Keys and values come back as garbage. It is finite, because a CPU's attention multiplies what it masks by zero.
_GARBAGE = 1000.0


def environment(folder: Path) -> dict[str, str]:
    """Return variables with which vLLM loads this plugin; ``folder`` gets what names it."""
    package = folder / "areal_cpu_sleep-1.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: areal-cpu-sleep\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[vllm.general_plugins]\nareal_cpu_sleep = {__name__}:register\n")
    path = [str(folder), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(one for one in path if one)}


def register() -> None:
    """Give vLLM's CPU worker a sleep mode. vLLM calls this in every process."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker

    CpuPlatform.is_sleep_mode_available = lambda _: True
    CPUWorker.sleep, CPUWorker.wake_up = _sleep, _wake_up


def _sleep(worker: Any, level: int = 1) -> None:
    runner = worker.model_runner
    model = runner.get_model()
    buffers = {id(one) for one in model.buffers()}
    worker.kept = []
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            worker.kept.append((tensor, tensor.data.clone() if level == 1 or id(tensor) in buffers else None))
            tensor.data.fill_(_POISON)
    for cache in _flat(runner.kv_caches):
        cache.fill_(_POISON)
    worker.asleep = {"weights", "kv_cache"}
    if "execute_model" not in vars(runner):
        original = runner.execute_model

        def execute_model(*arguments: Any, **options: Any) -> Any:
            scheduled = arguments[0] if arguments else options["scheduler_output"]
            if worker.asleep and scheduled.total_num_scheduled_tokens:
                raise RuntimeError(f"a step of an engine whose {sorted(worker.asleep)} sleep")
            return original(*arguments, **options)

        runner.execute_model = execute_model


def _wake_up(worker: Any, tags: list[str] | None = None) -> None:
    woken = worker.asleep & set(tags or worker.asleep)
    worker.asleep -= woken
    if "weights" in woken:
        for tensor, kept in worker.kept:
            if kept is not None:
                tensor.data.copy_(kept)
        worker.kept = []
    if "kv_cache" in woken:
        for cache in _flat(worker.model_runner.kv_caches):
            cache.fill_(_GARBAGE)


def _flat(caches: Iterable[Any]) -> Iterable[torch.Tensor]:
    for one in caches:
        if isinstance(one, torch.Tensor):
            yield one
        else:
            yield from _flat(one)
