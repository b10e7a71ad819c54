"""A server with AReaL's routes over HTTP, in this process, before the engines of a deployment."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from areal_vllm_ext.client.group import AsyncEngineGroup
from areal_vllm_ext.integrations.areal.limits import Limits
from areal_vllm_ext.integrations.areal.routes import attach
from areal_vllm_ext.integrations.areal.session import Session

from .torch_trainer import TorchTrainer

LIMITS = Limits(join=60.0)


def _healthy() -> dict[str, str]:
    return {}


class Server:
    """A server with AReaL's routes, and AReaL's client: a new connection for each call."""

    def __init__(self, directory: str, key_file: Path | str | None, own: tuple[str, int], limits: Limits) -> None:
        self.session: Session | None = None
        app = FastAPI(lifespan=self._lifespan)
        attach(app)
        app.add_api_route("/health", _healthy)
        self._connect = lambda: AsyncEngineGroup.connect(directory, key_file=key_file)
        self._own, self._limits = own, limits
        self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        ends = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < ends
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> Any:
        app.state.areal_session = self.session = Session(self._connect(), self._own, self._limits)
        yield
        await self.session.close()

    def post(self, path: str, body: Any = None, timeout: float = 60.0) -> tuple[int, dict[str, Any]]:
        data = json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def ok(self, path: str, body: Any = None) -> str:
        status, answer = self.post(path, body)
        assert status == 200, answer
        assert answer["success"] is True
        return str(answer["message"])

    def refused(self, path: str, body: Any = None) -> str:
        status, answer = self.post(path, body)
        assert (status, answer["success"]) == (400, False), answer
        assert "\n" not in answer["message"]
        return str(answer["message"])

    def init(self, trainer: TorchTrainer, rank_offset: int = 1) -> tuple[str, dict[str, Any]]:
        return "/areal_init_weights_update_group", {
            "master_address": trainer.host,
            "master_port": str(trainer.port),
            "rank_offset": rank_offset,
            "world_size": trainer.world_size,
            "backend": "gloo",
            "group_name": trainer.name,
        }

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@contextlib.contextmanager
def serving(
    directory: str, key_file: Path | str | None, own: tuple[str, int], limits: Limits = LIMITS
) -> Iterator[Server]:
    """Serve for the engines of a directory, as the server of the engine ``own`` (replica, DP rank)."""
    server = Server(directory, key_file, own, limits)
    try:
        yield server
    finally:
        server.close()
