"""Where the versions of vLLM from 0.19 to 0.33 differ for this package, one function a difference."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def present(owner: type, name: str) -> tuple[str, ...]:
    """Return the method's name if ``owner`` has it itself. ``set_weight_version`` came after 0.19."""
    return (name,) if name in owner.__dict__ else ()


def ray_executors() -> list[type]:
    """Return the executors on Ray: ``ray_executor_v2`` came after 0.19, and ``ray_executor`` went with 0.33."""
    found: list[type] = []
    for module, name in (("ray_executor", "RayDistributedExecutor"), ("ray_executor_v2", "RayExecutorV2")):
        try:
            found.append(getattr(import_module(f"vllm.v1.executor.{module}"), name))
        except ModuleNotFoundError as error:
            if error.name != f"vllm.v1.executor.{module}":
                raise
    if not found:
        raise ImportError("this vLLM has no executor on Ray that is known")
    return found


def forget_loading_layers(layerwise: Any) -> None:
    """Empty vLLM's set of layers whose reload has begun; 0.19 has none."""
    getattr(layerwise, "LOADING_LAYERS", set()).clear()


def set_device(worker: Any) -> None:
    """Note in a worker where its model is; a CPU worker of 0.19 does not."""
    if worker.device is None:
        worker.device = worker.model_runner.device
