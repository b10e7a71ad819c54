"""Where the versions of vLLM from 0.19 to 0.33 differ for this package, one function a difference."""

from __future__ import annotations

import functools
import os
import sys
from importlib import import_module
from importlib.metadata import entry_points
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


def drop_keys_and_values(engine: Any) -> bool:
    """Have an engine drop cached keys and values, those of running requests too; return whether it did.

    0.19 calls it a failure if there is no connector whose cache could be dropped. And its asynchronous scheduler throws the
    next token of each running request away, because it takes that for one of before. In an engine that has paused, none is
    in flight, so a token would be missing in the answer.
    """
    scheduler = engine.scheduler
    settled = [one for one in getattr(scheduler, "running", ()) if not getattr(one, "num_output_placeholders", 0)]
    connected = getattr(scheduler, "connector", None) is not None
    done = bool(engine.reset_prefix_cache(reset_running_requests=True, reset_connector=connected))
    for request in settled:
        if hasattr(request, "discard_latest_async_tokens"):
            request.discard_latest_async_tokens = False
    return done


def load_endpoint_plugins() -> None:
    """Have the API server of this process load plugins of the group ``vllm.endpoint_plugins``; vLLM 0.19 knows none.

    As in later versions, VLLM_PLUGINS must name them, and their routes take precedence over vLLM's.
    """
    from vllm import plugins

    server: Any = sys.modules.get("vllm.entrypoints.openai.api_server")
    # Engines and workers do not import the API server.
    if hasattr(plugins, "load_endpoint_plugins") or server is None:
        return
    wanted = os.environ.get("VLLM_PLUGINS", "").split(",")
    found = [one for one in entry_points(group="vllm.endpoint_plugins") if one.name in wanted]
    build, initialize = server.build_app, server.init_app_state
    if not found or hasattr(build, "__wrapped__"):
        return

    @functools.wraps(build)
    def build_app(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        routes = app.router.routes
        before = len(routes)
        app.state.areal_endpoint_plugins = [one.load()() for one in found]
        for plugin in app.state.areal_endpoint_plugins:
            plugin.attach_router(app)
        routes[:] = routes[before:] + routes[:before]
        return app

    @functools.wraps(initialize)
    async def init_app_state(engine_client: Any, state: Any, args: Any, *more: Any, **kwargs: Any) -> None:
        await initialize(engine_client, state, args, *more, **kwargs)
        for plugin in getattr(state, "areal_endpoint_plugins", ()):
            await plugin.init_state(engine_client, state, args)

    server.build_app, server.init_app_state = build_app, init_app_state
