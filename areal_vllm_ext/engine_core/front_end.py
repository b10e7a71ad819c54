"""``AdapterNames``: lets a vLLM front end accept the names of the group's LoRA adapters as models.

A front end knows names only; what a name means is the engine's to know (``adapters.py``). It asks its engines by vLLM's own
utility call, when a name comes that it does not know, and otherwise once a second while requests come.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from ..vllm_patching import is_ours, patch_once
from .adapters import BY_NAME, belongs_to_the_group

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("vllm.areal_vllm_ext")

_FRESH_SECONDS = 1.0
_SERVING_MODULES = ("serve.engine.serving", "openai.engine.serving", "pooling.base.serving")


class AdapterNames:
    """The adapters of the engines behind one ``OpenAIServingModels``."""

    def __init__(self, models: Any) -> None:
        self._models = models
        self._ours: set[str] = set()
        self._asked = -_FRESH_SECONDS
        self._asking: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, models: Any) -> AdapterNames | None:
        """Return those of ``models``; None if its engines are not ours, or serve no adapters."""
        config = getattr(getattr(models, "engine_client", None), "vllm_config", None)
        if config is None or config.lora_config is None or not is_ours(config):
            return None
        known: AdapterNames = models.__dict__.setdefault("_areal_adapters", cls(models))
        return known

    async def look_up(self, name: str | None) -> None:
        """Make sure that the front end knows ``name`` if it is an adapter, and not if it was removed."""
        if not name or self._models.is_base_model(name):
            return
        if name not in self._ours:
            await self.ask()
        elif time.monotonic() - self._asked > _FRESH_SECONDS and self._asking is None:
            self._asking = asyncio.create_task(self.ask())
            self._asking.add_done_callback(self._answered)

    async def refusal(self, name: str) -> str:
        """Return why this front end must not load or unload an adapter of this name; empty if it may."""
        await self.ask()
        return belongs_to_the_group(name) if name in self._ours else ""

    async def ask(self) -> None:
        """Ask the engines for the adapters that all of them serve."""
        from vllm.lora.request import LoRARequest

        client = self._models.engine_client.engine_core
        asked = time.monotonic()
        if hasattr(client, "call_utility_all_async"):
            answers = await client.call_utility_all_async("areal_adapters")
        else:
            answers = [await client.call_utility_async("areal_adapters")]
        served = set.intersection(*(set(one) for one in answers))
        requests = self._models.lora_requests
        for name in self._ours - served:
            requests.pop(name, None)
        for name in served:
            requests[name] = LoRARequest(name, 1, BY_NAME)
        self._ours, self._asked = served, asked

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._asking = None
        if not task.cancelled() and (error := task.exception()):
            logger.warning("areal_vllm_ext: the engines do not say which adapters they serve: %s", error)


def _model_checkers() -> list[type]:
    """Return the classes that check the model of a request. They are in other modules from version to version."""
    found = []
    for name in _SERVING_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(f"vllm.entrypoints.{name}")
            found += [one for one in vars(module).values() if isinstance(one, type) and "_check_model" in vars(one)]
    if not found:
        raise AttributeError("no class of vllm.entrypoints has _check_model")
    return found


def accept_adapter_names() -> None:
    """Patch the front end in this process.

    Not in every process that loads the plugin, because importing vLLM's HTTP front end takes long.
    """
    from vllm.entrypoints.openai.models import serving

    def check_first(original: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        async def _check_model(self: Any, request: Any) -> Any:
            if names := AdapterNames.of(self.models):
                await names.look_up(request.model)
            return await original(self, request)

        return _check_model

    def ask_first(original: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        async def show_available_models(self: Any) -> Any:
            if names := AdapterNames.of(self):
                await names.ask()
            return await original(self)

        return show_available_models

    def refuse_the_groups(original: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        async def change_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            if (names := AdapterNames.of(self)) and (refusal := await names.refusal(request.lora_name)):
                return serving.create_error_response(
                    message=refusal, err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST
                )
            return await original(self, request, *args, **kwargs)

        return change_lora_adapter

    for owner in _model_checkers():
        patch_once(owner, "_check_model", check_first)
    patch_once(serving.OpenAIServingModels, "show_available_models", ask_first)
    for name in ("load_lora_adapter", "unload_lora_adapter"):
        patch_once(serving.OpenAIServingModels, name, refuse_the_groups)
