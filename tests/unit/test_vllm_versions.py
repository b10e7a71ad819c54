"""This vLLM can be hooked: each patch applies to it. ``make matrix`` runs this file on every version that trainers pin."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from areal_vllm_ext import plugin, vllm_versions
from areal_vllm_ext.engine_core import hooks as engine_hooks
from areal_vllm_ext.worker import hooks as worker_hooks

PATCHES = (*engine_hooks.ENGINE_PATCHES, *worker_hooks.PLUGIN_PATCHES, *worker_hooks.WORKER_PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)
def test_each_patch_applies(patch: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_VLLM_PLACEMENT_GROUP", "00" * 18)
    patch()
    patch()


def test_the_plugin_registers() -> None:
    plugin.register()
    plugin.register()


def test_an_executor_on_ray_is_known() -> None:
    assert {executor.__name__ for executor in vllm_versions.ray_executors()} & {
        "RayDistributedExecutor",
        "RayExecutorV2",
    }


def test_a_module_that_cannot_be_imported_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_name: str) -> None:
        raise ModuleNotFoundError("no module ray", name="ray")

    monkeypatch.setattr(vllm_versions, "import_module", fails)
    with pytest.raises(ModuleNotFoundError, match="no module ray"):
        vllm_versions.ray_executors()


def test_only_what_a_class_has_itself_is_present() -> None:
    class Older:
        def sleep(self) -> None: ...

    assert vllm_versions.present(Older, "sleep") == ("sleep",)
    assert vllm_versions.present(Older, "set_weight_version") == ()


def test_a_reload_without_loading_layers_is_left() -> None:
    vllm_versions.forget_loading_layers(SimpleNamespace())
    layers = {1}
    vllm_versions.forget_loading_layers(SimpleNamespace(LOADING_LAYERS=layers))
    assert not layers


def test_a_worker_without_a_device_gets_its_models() -> None:
    worker = SimpleNamespace(device=None, model_runner=SimpleNamespace(device="cpu"))
    vllm_versions.set_device(worker)
    assert worker.device == "cpu"
    worker.model_runner.device = "other"
    vllm_versions.set_device(worker)
    assert worker.device == "cpu"


class Plugin:
    """A plugin of vLLM's API server whose route vLLM has too."""

    def attach_router(self, app: Any) -> None:
        app.get("/route")(lambda: "the plugin's")

    async def init_state(self, engine_client: Any, state: Any, _args: Any) -> None:
        state.client = engine_client


def test_a_vllm_without_endpoint_plugins_loads_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import APIRouter, FastAPI
    from fastapi.testclient import TestClient
    from vllm import plugins

    def build_app() -> FastAPI:
        app, router = FastAPI(), APIRouter()
        router.get("/route")(lambda: "vLLM's")
        app.include_router(router)
        return app

    async def init_app_state(_engine_client: Any, state: Any, _args: Any) -> None:
        state.initialized = True

    server = SimpleNamespace(build_app=build_app, init_app_state=init_app_state)
    monkeypatch.delattr(plugins, "load_endpoint_plugins", raising=False)
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.openai.api_server", server)
    found = [SimpleNamespace(name=name, load=lambda: Plugin) for name in ("one", "other")]
    monkeypatch.setattr(vllm_versions, "entry_points", lambda **_: found)

    vllm_versions.load_endpoint_plugins()
    assert server.build_app is build_app, "VLLM_PLUGINS names none"
    monkeypatch.setenv("VLLM_PLUGINS", "areal_vllm_ext,one")
    with monkeypatch.context() as later:
        later.setattr(plugins, "load_endpoint_plugins", None, raising=False)
        vllm_versions.load_endpoint_plugins()
        assert server.build_app is build_app, "a later vLLM does it itself"
    vllm_versions.load_endpoint_plugins()
    vllm_versions.load_endpoint_plugins()
    app = server.build_app()
    assert len(app.state.areal_endpoint_plugins) == 1
    assert TestClient(app).get("/route").json() == "the plugin's"
    asyncio.run(server.init_app_state("client", app.state, None))
    assert (app.state.initialized, app.state.client) == (True, "client")


def test_kernels_are_found_beside_an_object_whose_dict_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """llvmlite's library answers every attribute with a function, ``__dict__`` too."""
    dispatcher = pytest.importorskip("vllm.triton_utils.dispatcher")
    binding = pytest.importorskip("llvmlite.binding.ffi")
    assert not isinstance(vars(binding.lib), dict), "this test needs an object of that kind"
    worker_hooks.find_kernels_beside_odd_objects()
    kernel, override = object(), object()
    module = ModuleType("holds_a_kernel")
    module.kernel = kernel  # type: ignore[attr-defined]
    monkeypatch.setattr(dispatcher, "sys", SimpleNamespace(modules={"odd": binding, "kernels": module}))
    dispatcher._rebind_kernels([(kernel, override)])
    assert module.kernel is override


class Engine:
    """As 0.19 drops its keys and values: without a connector to reset it fails, and requests lose their next token."""

    def __init__(self, connector: str | None) -> None:
        requests = [SimpleNamespace(num_output_placeholders=one, discard_latest_async_tokens=False) for one in (0, 1)]
        self.requests, self.scheduler = requests, SimpleNamespace(connector=connector, running=list(requests))

    def reset_prefix_cache(self, *, reset_running_requests: bool, reset_connector: bool) -> bool:
        self.scheduler.running.clear()
        for request in self.requests:
            request.discard_latest_async_tokens = True
        return reset_running_requests and (not reset_connector or self.scheduler.connector is not None)


@pytest.mark.parametrize("connector", [None, "a connector"])
def test_a_connector_is_reset_where_there_is_one(connector: str | None) -> None:
    assert vllm_versions.drop_keys_and_values(Engine(connector))


def test_only_a_token_in_flight_is_thrown_away() -> None:
    vllm_versions.drop_keys_and_values(engine := Engine(None))
    assert [request.discard_latest_async_tokens for request in engine.requests] == [False, True]
