"""Other users of an engine: vLLM's own calls, over HTTP, beside updates of this package. Two API servers, one engine."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import torch
from vllm_server import vllm_server

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.deployment import free_ports
from areal_vllm_ext.demo.model import make_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


class Server:
    """A vLLM of one engine, a client of it, and the trainer's model."""

    def __init__(self, url: str, group: EngineGroup, model: PreTrainedModel) -> None:
        self.url, self.group, self.model = url, group, model
        self._steps = 0

    def call(self, path: str, body: Any = None, *, method: str = "POST", timeout: float = 30.0) -> Any:
        """Return the answer of vLLM's route, or its HTTP error as a string."""
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return f"HTTP {error.code}: {error.read().decode()}"

    def tokens(self, prompt: list[int], timeout: float = 30.0) -> list[int]:
        options = {"max_tokens": 8, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        answer = self.call("/v1/completions", {"model": "m", "prompt": prompt, **options}, timeout=timeout)
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def right(self, prompt: list[int]) -> list[int]:
        found: list[int] = self.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0].tolist()
        return found[len(prompt) :]

    def train(self) -> int:
        self._steps += 1
        generator = torch.Generator().manual_seed(self._steps)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return self._steps

    @property
    def generation(self) -> str:
        return self.group.status()[0].generation


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    model = make_model(folder / "model")
    port, directory_port = free_ports(2)
    directory = f"tcp://127.0.0.1:{directory_port}"
    with (
        vllm_server(folder / "model", port, directory, "--api-server-count", "2") as log,
        EngineGroup.connect(directory) as group,
    ):
        group.wait_ready(engines=1, timeout=300)
        running = Server(f"http://127.0.0.1:{port}", group, model)
        ends = time.monotonic() + 60
        while True:
            try:
                running.tokens([1, 2, 3])
                break
            except (OSError, TypeError):
                assert time.monotonic() < ends, log.read_text()[-3000:]
                time.sleep(0.5)
        yield running


def test_a_pause_by_vllms_own_call_outlasts_an_update(server: Server) -> None:
    server.call("/pause?mode=keep")
    assert server.generation == "paused"
    server.group.update_weights(server.model, version=server.train(), timeout=60)
    assert server.generation == "paused"
    assert server.call("/is_paused", method="GET") == {"is_paused": True}
    server.call("/resume")
    assert server.generation == "running"
    assert server.tokens([10, 20, 30]) == server.right([10, 20, 30])


def test_a_resume_by_vllms_own_call_ends_a_pause_and_status_says_so(server: Server) -> None:
    server.group.pause("keep")
    server.call("/resume")
    assert server.generation == "running"
    assert server.tokens([10, 20, 31]) == server.right([10, 20, 31])


def test_nobody_resumes_between_pause_and_commit(server: Server) -> None:
    """The request of that moment is answered with the new weights, and so is the same prompt later."""
    prompt = [7 + i % 200 for i in range(300)]
    answers: dict[str, Any] = {}

    def resume_and_ask() -> None:
        answers["resume"] = server.call("/resume")
        answers["tokens"] = server.tokens(prompt)

    threads: list[threading.Thread] = []

    def on_phase(phase: str) -> None:
        if phase == "commit":
            threads.append(threading.Thread(target=resume_and_ask))
            threads[0].start()
            time.sleep(1.0)

    server.group.update_weights(server.model, version=server.train(), timeout=60, on_phase=on_phase)
    threads[0].join(60)
    assert answers["tokens"] == server.right(prompt)
    assert server.tokens(prompt) == server.right(prompt)
    assert server.group.verify().equal
    assert server.generation == "running"


def test_weights_that_another_user_reloads_are_named_and_an_update_ends_that(server: Server) -> None:
    version = server.train()
    server.group.update_weights(server.model, version=version, timeout=60)
    server.call("/collective_rpc", {"method": "reload_weights"})
    (state,) = server.group.status()
    assert state.update_phase == "foreign"
    assert "reload_weights was called through vLLM" in state.error
    found = server.group.verify()
    assert not found.equal
    assert any("not from an update" in str(one) for one in found.differences)
    assert server.tokens([10, 20, 32]) != server.right([10, 20, 32])
    server.group.update_weights(server.model, version=server.train(), timeout=60)
    assert server.group.status()[0].update_phase == "idle"
    assert server.tokens([10, 20, 33]) == server.right([10, 20, 33])
    assert server.group.verify().equal
