"""AReaL's routes as a plugin of vLLM's API server (``vllm.endpoint_plugins``, name ``areal_routes``).

vLLM loads it where VLLM_PLUGINS names it: ``VLLM_PLUGINS=areal_vllm_ext,areal_routes``. Every answer is
``{"success": bool, "message": str}`` with the status 200 or 400.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ...config import Settings
from ...errors import SettingsError
from .calls import (
    AdapterMeta,
    Disk,
    Init,
    LoadAdapter,
    LoadAdapterForAreal,
    Meta,
    Refused,
    UnloadAdapter,
    decode,
    one_line,
)
from .limits import Limits
from .session import Session

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Awaitable, Callable

    from fastapi import FastAPI, Request
    from starlette.datastructures import State

    from ...protocol import SleepTag

    Handler = Callable[[Session, Request], Awaitable[str]]

logger = logging.getLogger("vllm.areal_vllm_ext")


async def _init(session: Session, request: Request) -> str:
    return await session.init(decode(Init, await request.body()))


async def _meta(session: Session, request: Request) -> str:
    return await session.meta(decode(Meta, await request.body()))


async def _adapter_meta(session: Session, request: Request) -> str:
    return await session.meta(decode(AdapterMeta, await request.body()))


async def _xccl(session: Session, request: Request) -> str:  # noqa: ARG001 - it says what was announced, or nothing
    return await session.xccl()


async def _disk(session: Session, request: Request) -> str:
    return await session.disk(decode(Disk, await request.body()))


async def _load_adapter(session: Session, request: Request) -> str:
    return await session.load_adapter(decode(LoadAdapter, await request.body()))


async def _load_adapter_for_areal(session: Session, request: Request) -> str:
    call = decode(LoadAdapterForAreal, await request.body())
    return await session.load_adapter(LoadAdapter(call.lora_model_path, call.lora_name))


async def _unload_adapter(session: Session, request: Request) -> str:
    return await session.unload_adapter(decode(UnloadAdapter, await request.body()).lora_name)


async def _pause(session: Session, request: Request) -> str:  # noqa: ARG001 - its body is empty
    return await session.pause()


async def _continue(session: Session, request: Request) -> str:  # noqa: ARG001 - its body is empty
    return await session.resume()


async def _sleep(session: Session, request: Request) -> str:
    if (level := request.query_params.get("level", "1")) not in ("1", "2"):
        raise Refused(f"there is no sleep of level {level}: use 1 or 2")
    return await session.sleep(2 if level == "2" else 1)


async def _wake_up(session: Session, request: Request) -> str:
    tags = request.query_params.getlist("tags")
    if unknown := set(tags) - {"weights", "kv_cache"}:
        raise Refused(f"{min(unknown)} cannot be woken up: use weights, kv_cache, or no tags for both")
    known: tuple[SleepTag, ...] = ("weights", "kv_cache")
    return await session.wake_up([tag for tag in known if tag in tags])


HANDLERS: dict[str, Handler] = {
    "/areal_init_weights_update_group": _init,
    "/areal_set_update_weight_meta": _meta,
    "/areal_update_weights_xccl": _xccl,
    "/areal_set_update_weight_meta_lora": _adapter_meta,
    "/areal_update_weights_lora_xccl": _xccl,
    "/areal_update_weights": _disk,
    "/areal_update_weights_lora": _load_adapter_for_areal,
    "/v1/load_lora_adapter": _load_adapter,
    "/v1/unload_lora_adapter": _unload_adapter,
    "/areal_pause_generation": _pause,
    "/areal_continue_generation": _continue,
    "/sleep": _sleep,
    "/wake_up": _wake_up,
}


def attach(app: FastAPI) -> None:
    """Add the routes to an app, whose ``state.areal_session`` is set before the first call."""
    from fastapi import Request as FastAPIRequest
    from fastapi.responses import JSONResponse

    def route(path: str, handler: Handler) -> None:
        async def answer(request: Any) -> JSONResponse:
            try:
                message = await handler(request.app.state.areal_session, request)
            except Exception as error:
                # A cause that is unknown here must not look like success either.
                problem = one_line(error)
                logger.warning("areal_vllm_ext: %s: %s", path, problem, exc_info=not isinstance(error, Refused))
                return JSONResponse({"success": False, "message": problem}, status_code=400)
            return JSONResponse({"success": True, "message": message})

        answer.__annotations__ = {"request": FastAPIRequest}  # FastAPI reads them, and this file does not import it
        app.post(path, response_model=None)(answer)

    for path, handler in HANDLERS.items():
        route(path, handler)


class ArealRoutes:
    """vLLM's ``EndpointPlugin``."""

    name = "areal_routes"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        attach(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Connect to the engines. The server does not start if it cannot take AReaL's calls.

        Raises:
            SettingsError: its arguments do not fit.
        """
        from ...client.group import AsyncEngineGroup
        from ...engine_core.identity import describe_engine, directory_address
        from ...vllm_patching import is_ours

        config = engine_client.vllm_config
        if not is_ours(config):
            raise SettingsError(
                "AReaL's routes need this package in every engine: start all nodes with "
                "--worker-extension-cls areal_vllm_ext.worker.WorkerExtension"
            )
        if (count := getattr(args, "api_server_count", None) or 1) > 1:
            raise SettingsError(
                f"AReaL's routes need one API server process, and there are {count}: start with --api-server-count 1"
            )
        additional = config.additional_config
        settings = Settings.load(additional if isinstance(additional, dict) else {})
        group = AsyncEngineGroup.connect(directory_address(settings, config), key_file=settings.key_file)
        own = describe_engine(config, settings, "")
        state.areal_session = Session(group, (own.replica, own.dp_rank), Limits())
