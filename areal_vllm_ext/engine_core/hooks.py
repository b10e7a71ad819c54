"""What of vLLM is patched for good: one function a patch, each with its reason, the versions it was checked on, and a
guard against patching twice. Each is inert unless ``worker_extension_cls`` is ours: ``install`` applies those of front end
and EngineCore, which look at the configuration; ``require`` those of workers, in workers that have our extension.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import HookError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

_LAUNCH_FACTS = "_AREAL_VLLM_LAUNCH_FACTS"
# Not an address or a port: these are each node's own.
_SAME_EVERYWHERE = tuple(
    f"AREAL_VLLM_{name}" for name in ("KEY_FILE", "DIRECTORY", "REPLICA", "TRAINER_LOST", "MAX_MESSAGE_MIB")
)

# What stands on the engine's input queue for a call of ours; vLLM's own request types are an enum.
CALL = object()


def is_ours(config: VllmConfig) -> bool:
    """Whether the engine was started with ``--worker-extension-cls`` set to our extension, or to a subclass of it."""
    name = config.parallel_config.worker_extension_cls
    if not name:
        return False
    if name.startswith("areal_vllm_ext."):
        return True
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from ..worker.extension import WorkerExtension

    return issubclass(resolve_obj_by_qualname(name), WorkerExtension)


def _patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``make(original)`` unless that was done before."""
    original = owner.__dict__[name]
    if getattr(original, "_areal_patch", False):
        return
    patched = make(original)
    patched._areal_patch = True
    setattr(owner, name, patched)


def start_endpoint_with_busy_loop() -> None:
    """Give every EngineCore process its control endpoint, from the moment that its loop runs; calls of ours run on the loop,
    between two steps.

    Reason: vLLM has no extension point in an EngineCore, and front-end routes do not reach headless nodes. Plugins load
    inside ``EngineCore.__init__``, so before the loop, in every such process (also Ray actors, which inherit the loop). The
    loop's input queue is the one door to its thread, and a put wakes an idle engine. What takes requests from it is replaced
    on the engine, not on its class: Ray gives an actor's class methods of its own, taken from vLLM's before plugins load.
    Checked on: 0.32.0.
    """
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def run_busy_loop(self: Any) -> None:
            if not is_ours(self.vllm_config):
                original(self)
                return
            from .controller import under_control

            handle = self._handle_client_request

            def handle_ours_too(request_type: Any, request: Any) -> None:
                if request_type is CALL:
                    request()
                else:
                    handle(request_type, request)

            self._handle_client_request = handle_ours_too
            with under_control(self, lambda call: self.input_queue.put_nowait((CALL, call))):
                original(self)

        return run_busy_loop

    EngineCoreProc._handle_client_request  # noqa: B018 - where it is missing, before a model is loaded
    for owner in (EngineCoreProc, DPEngineCoreProc):
        _patch(owner, "run_busy_loop", make)


def control_in_process_engines() -> None:
    """Give an engine that lives in the user's own process (``LLM`` without multiprocessing) its endpoint.

    Reason: such an engine has no loop; the user's thread steps it. Calls of ours run on a thread of their own, and a lock
    keeps them between two steps. (vLLM offers no pause mode ``wait`` there.)
    Checked on: 0.32.0.
    """
    from vllm.v1.engine.core_client import InprocClient

    def make_init(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if is_ours(vllm_config):
                from concurrent.futures import ThreadPoolExecutor

                from .controller import Controller

                self._areal_lock = threading.RLock()
                pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="areal-calls")

                def between_steps(call: Callable[[], None]) -> None:
                    with self._areal_lock:
                        call()

                self._areal_controller = Controller(self.engine_core, lambda call: pool.submit(between_steps, call))

        return __init__

    def make_locked(original: Any) -> Any:
        @functools.wraps(original)
        def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
            lock = getattr(self, "_areal_lock", None)
            if lock is None:
                return original(self, *args, **kwargs)
            with lock:
                return original(self, *args, **kwargs)

        return locked

    def make_shutdown(original: Any) -> Any:
        @functools.wraps(original)
        def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
            if controller := self.__dict__.pop("_areal_controller", None):
                controller.stop()
            original(self, *args, **kwargs)

        return shutdown

    _patch(InprocClient, "__init__", make_init)
    for name in ("get_output", "add_request", "abort_requests"):
        _patch(InprocClient, name, make_locked)
    _patch(InprocClient, "shutdown", make_shutdown)


def check_settings_before_model_load() -> None:
    """Stop an engine whose settings cannot work before its model loads, which takes minutes for a large one.

    Reason: the endpoint starts with the loop, after the model. The executor is the first thing that ``EngineCore`` makes
    after it loaded its plugins, and every executor calls this initialiser.
    Checked on: 0.32.0.
    """
    from vllm.v1.executor.abstract import Executor

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            if is_ours(vllm_config):
                from .controller import check_settings

                check_settings(vllm_config)
            original(self, vllm_config, *args, **kwargs)

        return __init__

    _patch(Executor, "__init__", make)


def put_ray_workers_into_given_placement_group() -> None:
    """Let ``vllm serve`` with the Ray executor use the placement group that AREAL_VLLM_PLACEMENT_GROUP (its id, hexadecimal)
    names, as the launcher's colocated placement asks.

    Reason: vLLM takes over a group only inside of a Ray actor that was scheduled into it; a server that must end with its
    whole process tree is no actor.
    Checked on: 0.32.0.
    """
    group = os.environ.get("AREAL_VLLM_PLACEMENT_GROUP")
    if not group:
        return
    from vllm.v1.executor.ray_executor import RayDistributedExecutor
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def _init_executor(self: Any) -> None:
            from ray import PlacementGroupID
            from ray.util.placement_group import PlacementGroup

            self.parallel_config.placement_group = PlacementGroup(PlacementGroupID(bytes.fromhex(group)))
            original(self)

        return _init_executor

    for owner in (RayDistributedExecutor, RayExecutorV2):
        _patch(owner, "_init_executor", make)


class LaunchFacts(NamedTuple):
    """What only the process that launches EngineCores knows."""

    headless: bool = False
    data_parallel_size: int = 1


def launch_facts() -> LaunchFacts:
    """What the launching process left for this one."""
    return LaunchFacts(**json.loads(os.environ.get(_LAUNCH_FACTS, "{}")))


def hand_launch_facts_to_engines() -> None:
    """Tell EngineCore processes, and actors, whether they are headless, and how many DP ranks there are.

    Reason: an EngineCore does not keep the first, and a rank of a dense model is made to believe in DP=1. Both are needed
    to say which engines are missing, and where.
    Checked on: 0.32.0.
    """
    from vllm.v1.engine.utils import CoreEngineActorManager, CoreEngineProcManager

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            config = kwargs.get("vllm_config")
            if config is not None and is_ours(config):
                facts = LaunchFacts(
                    headless=not kwargs.get("local_client", True),  # actors are started by the front end
                    data_parallel_size=config.parallel_config.data_parallel_size,
                )
                os.environ[_LAUNCH_FACTS] = json.dumps(facts._asdict())
            original(self, *args, **kwargs)

        return __init__

    for owner in (CoreEngineProcManager, CoreEngineActorManager):
        _patch(owner, "__init__", make)


def carry_settings_to_ray_actors() -> None:
    """Have vLLM give the settings that are the same on all nodes, and the launch facts, to the actors that it starts on Ray.

    Reason: it copies its own variables, and those that a user names.
    Checked on: 0.32.0.
    """
    from vllm.ray import ray_env

    ray_env.DEFAULT_EXTRA_ENV_VARS.update({*_SAME_EVERYWHERE, _LAUNCH_FACTS})


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

    _patch(UnquantizedFusedMoEMethod, "_setup_kernel", make)


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


ENGINE_PATCHES: tuple[Callable[[], None], ...] = (
    start_endpoint_with_busy_loop,
    control_in_process_engines,
    check_settings_before_model_load,
    hand_launch_facts_to_engines,
    carry_settings_to_ray_actors,
    put_ray_workers_into_given_placement_group,
)
WORKER_PATCHES: tuple[Callable[[], None], ...] = (
    repack_cpu_experts_on_reload,
    gather_variable_sizes_on_cpu,
)

# Why the hook is not in place in this process; empty once it is.
missing_because = "vLLM did not load the plugin areal_vllm_ext (is VLLM_PLUGINS set without it?)"


def install() -> None:
    """Apply the patches of front end and EngineCore. A failure is kept, for ``require`` to raise where it matters."""
    global missing_because  # noqa: PLW0603 - one process, one hook
    missing_because = _apply(ENGINE_PATCHES)


def _apply(patches: tuple[Callable[[], None], ...]) -> str:
    """Apply ``patches``; returns why one could not be, with the way out, or an empty string."""
    from vllm.version import __version__ as vllm_version

    for patch in patches:
        try:
            patch()
        except Exception as error:
            return (
                f"vLLM {vllm_version} cannot be hooked: patch {patch.__name__} failed ({type(error).__name__}: {error}); "
                "use vLLM 0.32, or an areal-vllm-ext made for yours"
            )
    return ""


def require() -> None:
    """Refuse to go on without the hook, and apply the patches of workers. Every worker asks, before it loads its model.

    Raises:
        HookError: with the vLLM version, the patch and the way out.
    """
    if problem := missing_because or _apply(WORKER_PATCHES):
        raise HookError(f"areal_vllm_ext: {problem}")
