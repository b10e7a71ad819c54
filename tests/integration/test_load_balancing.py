"""An MoE replica whose DP ranks are balanced outside of vLLM: each rank, or each node, is a ``vllm serve`` of its own."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from typing import TYPE_CHECKING

import pytest
import torch
from vllm_server import vllm_server

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.deployment import free_ports
from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.process.serving import responds_ok

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


EXTERNAL = ["--data-parallel-rank"]
HYBRID = ["--data-parallel-hybrid-lb", "--data-parallel-size-local", "1", "--data-parallel-start-rank"]


@pytest.mark.parametrize("rank_arguments", [EXTERNAL, HYBRID], ids=["external", "hybrid"])
def test_ranks_of_several_servers_are_one_replica(tmp_path: Path, rank_arguments: list[str]) -> None:
    model = make_model(tmp_path / "model", moe=True)
    first, second, rpc, directory_port = free_ports(4)
    ports = (first, second)
    directory = f"tcp://127.0.0.1:{directory_port}"
    common = ["--data-parallel-size", "2", "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(rpc)]
    prompt = [10, 20, 30]
    with contextlib.ExitStack() as stack:
        for rank, port in enumerate(ports):
            own = [*rank_arguments, str(rank)]
            stack.enter_context(vllm_server(tmp_path / "model", port, directory, *common, *own))
        group = stack.enter_context(EngineGroup.connect(directory))
        group.wait_ready(engines=2, timeout=240)
        ends = time.monotonic() + 60
        while not all(responds_ok("127.0.0.1", port, "/health") for port in ports):  # the engines are ready before them
            assert time.monotonic() < ends, "a server does not answer"
            time.sleep(0.2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        group.update_weights(model, version=1, timeout=60)
        assert [(state.dp_rank, state.version) for state in group.status()] == [(0, 1), (1, 1)]
        assert len({state.replica for state in group.status()}) == 1
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        for port in ports:
            body = {"model": "m", "prompt": prompt, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body | {"ignore_eos": True}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["token_ids"] == expected
