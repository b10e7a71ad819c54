"""The permanent patches of vLLM's workers, one function each, applied before a worker of ours loads its model.

Each docstring gives the bug, its trigger, and the vLLM versions that the patch was checked on.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import vllm_patching
from ..vllm_patching import is_enabled

if TYPE_CHECKING:
    from collections.abc import Callable


def extend_workers_without_the_slot() -> None:
    """Give each worker the methods of ``WorkerExtension`` where AREAL_VLLM_ENABLE is 1.

    Reason: vLLM has one slot for an extension, which many trainers take. It mixes that class in before it makes the worker.
    So a worker that has our methods already has our extension in the slot. Plugins load inside
    ``WorkerWrapperBase.init_worker``, so a patch of that comes too late.
    Checked on: 0.32.0.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if is_enabled() and not hasattr(self, "areal_attach"):
                require()
                _extend(self)

        return __init__

    vllm_patching.patch_once(WorkerBase, "__init__", make)


def _extend(worker: Any) -> None:
    """Set the methods on the object: on the class they would collide with an extension in another engine's slot."""
    from .extension import WorkerExtension

    for name, method in vars(WorkerExtension).items():
        if not name.startswith("__"):
            setattr(worker, name, types.MethodType(method, worker))


def find_kernels_beside_odd_objects() -> None:
    """Let an engine start on a CPU in a process that has imported numba.

    Bug: without Triton, each start of a CPU worker looks through all modules for kernels (``_rebind_kernels``), and takes
    the ``__dict__`` of every object for a dictionary. That of llvmlite's ``ffi.lib`` is a function: AttributeError:
    '_lib_fn_wrapper' object has no attribute 'get'. Trigger: numba, with which this package computes digests, so a second
    ``LLM`` in one process. Cure: an object of that kind holds no kernel.
    Checked on: 0.31.0, 0.32.0; earlier versions have no such search.
    """
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:
        return

    def attributes(value: Any) -> Mapping[str, Any]:
        found: object = vars(value)
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = attributes


def repack_cpu_experts_on_reload() -> None:
    """Make a reload of unquantised MoE weights right on CPU.

    Bug: on a second load ``UnquantizedFusedMoEMethod._setup_kernel`` skips the experts' own
    ``process_weights_after_loading``, where the CPU experts are prepacked (and padded), so that plain weights land in
    packed storage: silently other tokens. Trigger: any reload on CPU, ``reload_weights`` included.
    Cure: on CPU, run that step on a reload too.
    Checked on: 0.32.0.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def _setup_kernel(self: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
            reload = self.moe_kernel is not None
            original(self, layer, *args, **kwargs)
            if reload and current_platform.is_cpu():
                self.moe_kernel.fused_experts.process_weights_after_loading(layer)

        return _setup_kernel

    vllm_patching.patch_once(UnquantizedFusedMoEMethod, "_setup_kernel", make)


def keep_scales_of_int8_weights_on_cpu() -> None:
    """Make a reload of 8-bit weights right on CPU.

    Bug: oneDNN's handler of an 8-bit layer keeps a bare pointer to the layer's scales, and reads them in each product. A
    reload makes the handler with temporary scales, and frees these: silently other tokens. Trigger: any reload on CPU,
    ``reload_weights`` included. Cure: the handler keeps the tensor that it points to.
    Checked on: 0.32.0.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm import _custom_ops

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def create_onednn_scaled_mm(weight: Any, weight_scales: Any, *args: Any, **kwargs: Any) -> Any:
            handler = original(weight, weight_scales, *args, **kwargs)
            handler.areal_scales = weight_scales
            return handler

        return create_onednn_scaled_mm

    vllm_patching.patch_once(_custom_ops, "create_onednn_scaled_mm", make)


def choose_cpu_experts_beside_lora() -> None:
    """Let MoE models run on CPU where LoRA is enabled for other layers than the experts.

    Bug: with ``--enable-lora`` vLLM always chooses Triton's experts, which need a GPU, so the first request ends the engine.
    Cure: on CPU, choose as without LoRA. CPU experts have no LoRA, so vLLM refuses to start unless
    ``--lora-target-modules`` leaves them out.
    Checked on: 0.32.0.
    """
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def select_unquantized_moe_backend(moe_config: Any, *args: Any, **kwargs: Any) -> Any:
            moe_config.is_lora_enabled = False
            return original(moe_config, *args, **kwargs)

        return select_unquantized_moe_backend

    vllm_patching.patch_once(unquantized_fused_moe_method, "select_unquantized_moe_backend", make)


def gather_variable_sizes_on_cpu() -> None:
    """Let MoE models run on several DP ranks on CPU.

    Bug: ``CpuCommunicator`` lacks ``all_gatherv`` and ``reduce_scatterv``, which the MoE layers of a DP group call, so the
    base class's ``NotImplementedError`` ends the engine. Cure: both over the collectives that gloo has, padded.
    Checked on: 0.32.0 (without expert parallelism).
    """
    import torch
    import torch.distributed as dist
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(
        self: Any, input_: torch.Tensor | list[torch.Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        if not isinstance(input_, torch.Tensor):
            return [all_gatherv(self, one, dim, sizes) for one in input_]  # type: ignore[misc]
        assert dim == 0
        counts = sizes or [input_.shape[0]] * self.world_size
        padded = input_.new_zeros((max(counts), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.device_group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
        assert dim in (0, -input_.dim())
        counts = sizes or [input_.shape[0] // self.world_size] * self.world_size
        total = input_.clone()
        dist.all_reduce(total, group=self.device_group)
        start = sum(counts[: self.rank_in_group])
        return total[start : start + counts[self.rank_in_group]].clone()

    for name, function in (("all_gatherv", all_gatherv), ("reduce_scatterv", reduce_scatterv)):
        if getattr(CpuCommunicator, name, None) is getattr(DeviceCommunicatorBase, name, None):
            setattr(CpuCommunicator, name, function)


WORKER_PATCHES: tuple[Callable[[], None], ...] = (
    repack_cpu_experts_on_reload,
    keep_scales_of_int8_weights_on_cpu,
    gather_variable_sizes_on_cpu,
    choose_cpu_experts_beside_lora,
)


# Applied when vLLM loads the plugin: without the slot nothing of ours is imported later, and a worker comes after its kernels.
PLUGIN_PATCHES: tuple[Callable[[], None], ...] = (extend_workers_without_the_slot, find_kernels_beside_odd_objects)


def require() -> None:
    """Apply these patches, and refuse to go on unless the patches of the engine are in place too.

    Raises:
        HookError: with the vLLM version, the patch and what to do.
    """
    vllm_patching.require(WORKER_PATCHES)
