"""The permanent patches of vLLM's front end and EngineCore, one function each.

Each docstring gives the reason and the vLLM versions that the patch was checked on. Every patch does nothing unless
``worker_extension_cls`` is ours or AREAL_VLLM_ENABLE is 1. Patches of workers: ``worker/hooks.py``.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from ..vllm_patching import is_ours, patch_once
from ..vllm_versions import present, ray_executors
from .launch_facts import LAUNCH_FACTS_VARIABLE, LaunchFacts, leave_launch_facts

if TYPE_CHECKING:
    from collections.abc import Callable

# HOST and PORT are deliberately absent: they differ on every node.
_SAME_EVERYWHERE = tuple(
    f"AREAL_VLLM_{name}"
    for name in ("ENABLE", "KEY_FILE", "DIRECTORY", "REPLICA", "TRAINER_LOST", "PEERS", "MAX_MESSAGE_MIB")
)

# Marks one of our callables on vLLM's input queue. It cannot collide with vLLM's request types, which are enum members.
CALL = object()


def start_endpoint_with_busy_loop() -> None:
    """Give every EngineCore process its control endpoint, and run our calls on its loop, between two steps.

    Reason: vLLM has no extension point in an EngineCore, and front-end routes do not reach headless nodes. Plugins load
    inside ``EngineCore.__init__``, so before the loop, in every such process (also Ray actors, which inherit the loop). The
    input queue is the only way to run code on the loop's thread; putting an item also wakes an idle engine. We patch
    ``_handle_client_request`` on the instance, because Ray copies the class's methods into the actor class before plugins load.
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

    EngineCoreProc._handle_client_request  # noqa: B018 - fails here, before a model is loaded, if vLLM no longer has it
    for owner in (EngineCoreProc, DPEngineCoreProc):
        patch_once(owner, "run_busy_loop", make)


def control_in_process_engines() -> None:
    """Give an engine that lives in the user's own process (``LLM`` without multiprocessing) its endpoint.

    Reason: such an engine has no loop; the user's thread steps it. Our calls run on a thread of their own, and a lock keeps
    them between two steps. And a pause of mode ``abort`` ends requests there without an output, so ``generate`` would wait for
    them for ever. (vLLM offers no pause mode ``wait`` there.)
    Checked on: 0.32.0.
    """
    from vllm.v1.engine.core_client import InprocClient

    from . import in_process

    patch_once(InprocClient, "__init__", in_process.start_control)
    patch_once(InprocClient, "get_output", lambda original: in_process.locked(in_process.with_aborted(original)))
    names = ("add_request", "abort_requests", "sleep", "wake_up", "collective_rpc")
    for name in (*names, *present(InprocClient, "set_weight_version")):
        patch_once(InprocClient, name, in_process.locked)
    patch_once(InprocClient, "shutdown", in_process.stop_control)


def check_settings_before_model_load() -> None:
    """Stop an engine whose settings cannot work before its model loads, because a large one takes minutes.

    Reason: the endpoint starts with the loop, after the model. The executor is the first object that ``EngineCore`` creates
    after it has loaded its plugins, and every executor calls this initialiser.
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

    patch_once(Executor, "__init__", make)


def put_ray_workers_into_given_placement_group() -> None:
    """Let ``vllm serve`` with the Ray executor use the placement group of AREAL_VLLM_PLACEMENT_GROUP (its id, hexadecimal).

    Reason: the launcher's colocated placement needs it, but vLLM takes over a group only inside a Ray actor that was
    scheduled into it. A server that must end with its whole process tree is no actor.
    Checked on: 0.32.0.
    """
    group = os.environ.get("AREAL_VLLM_PLACEMENT_GROUP")
    if not group:
        return

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def _init_executor(self: Any) -> None:
            from ray import PlacementGroupID
            from ray.util.placement_group import PlacementGroup

            self.parallel_config.placement_group = PlacementGroup(PlacementGroupID(bytes.fromhex(group)))
            original(self)

        return _init_executor

    for owner in ray_executors():
        patch_once(owner, "_init_executor", make)


def hand_launch_facts_to_engines() -> None:
    """Tell EngineCore processes and actors whether they are headless, and how many DP ranks there are.

    Reason: an EngineCore does not keep the first, and vLLM sets the DP size of a dense model's rank to 1. Both are needed to
    say which engines are missing, and where.
    Checked on: 0.32.0.
    """
    from vllm.v1.engine.utils import CoreEngineActorManager, CoreEngineProcManager

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            config = kwargs.get("vllm_config")
            if config is not None and is_ours(config):
                leave_launch_facts(
                    LaunchFacts(
                        headless=not kwargs.get("local_client", True),  # actors are started by the front end
                        data_parallel_size=config.parallel_config.data_parallel_size,
                    )
                )
            original(self, *args, **kwargs)

        return __init__

    for owner in (CoreEngineProcManager, CoreEngineActorManager):
        patch_once(owner, "__init__", make)


def carry_settings_to_ray_actors() -> None:
    """Copy the launch facts, and the settings that are the same on all nodes, to the actors that vLLM starts on Ray.

    Reason: vLLM copies only its own variables and those that a user names.
    Checked on: 0.32.0.
    """
    from vllm.ray import ray_env

    ray_env.DEFAULT_EXTRA_ENV_VARS.update({*_SAME_EVERYWHERE, LAUNCH_FACTS_VARIABLE})


def accept_names_of_adapters() -> None:
    """Let front ends accept the names of adapters that updates brought, as ``model`` of a request.

    Reason: a front end knows only adapters that were loaded through it, by a path. Its own resolvers of names need
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``, which opens routes to load any path.
    Checked on: 0.32.0.
    """
    from vllm.v1.engine.core_client import AsyncMPClient

    def make(original: Any) -> Any:
        @functools.wraps(original)
        def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if vllm_config.lora_config is not None and is_ours(vllm_config):
                from .front_end import accept_adapter_names

                accept_adapter_names()

        return __init__

    patch_once(AsyncMPClient, "__init__", make)


ENGINE_PATCHES: tuple[Callable[[], None], ...] = (
    start_endpoint_with_busy_loop,
    control_in_process_engines,
    check_settings_before_model_load,
    hand_launch_facts_to_engines,
    carry_settings_to_ray_actors,
    put_ray_workers_into_given_placement_group,
    accept_names_of_adapters,
)
