"""A real two-engine deployment for tests, its clients, and the oracle: Hugging Face's ``generate`` on the trainer's model."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.deployment import WORKER_EXTENSION, Deployment, Node
from areal_vllm_ext.demo.model import greedy_tokens, make_model
from harness.network import Namespaces, missing

Pending = Future[dict[str, Any]]

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

PROMPTS = ([10, 20, 30], [5, 6, 7, 8, 9], [100, 3, 50, 7])
TOKENS = 16


class Cluster:
    """Two engines that serve, one of them headless on the other node, and the trainer's model."""

    def __init__(self, deployment: Deployment, model: PreTrainedModel, key_file: str | None, two_nodes: bool) -> None:
        self.deployment = deployment
        self.model = model
        self.key_file = key_file
        self.two_nodes = two_nodes
        self._steps = 0

    def connect(self) -> EngineGroup:
        return EngineGroup.connect(self.deployment.directory, key_file=self.key_file)

    def train(self) -> int:
        """Move the trainer's weights far enough to change its tokens; returns the number of the step."""
        self._steps += 1
        generator = torch.Generator().manual_seed(self._steps)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return self._steps

    def oracle(self, prompts: Any = PROMPTS, tokens: int = TOKENS) -> list[list[int]]:
        """The tokens that the trainer's model would generate."""
        return greedy_tokens(self.model, prompts, tokens)

    def generated(self, rank: int, prompts: Any = PROMPTS, tokens: int = TOKENS) -> list[list[int]]:
        """The tokens that the engine of DP rank ``rank`` generates."""
        return [self.complete(rank, prompt, tokens)["token_ids"] for prompt in prompts]

    def complete(self, rank: int, prompt: list[int], tokens: int = TOKENS, model: str = "") -> dict[str, Any]:
        """One request to the engine of DP rank ``rank``; returns the choice of the completions API.

        ``model``: the name of an adapter; empty for the base model.
        """
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.deployment.url}/v1/completions",
            json.dumps({"model": model or str(self.deployment.model_dir), **body}).encode(),
            {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            choice: dict[str, Any] = json.load(answer)["choices"][0]
        return choice

    def start(self, rank: int, prompt: list[int], tokens: int, model: str = "") -> Future[dict[str, Any]]:
        """``complete``, on a thread."""
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self.complete, rank, prompt, tokens, model)
        pool.shutdown(wait=False)
        return future

    def freeze(
        self,
        group: EngineGroup,
        ranks: tuple[int, ...],
        prompt: list[int],
        tokens: int,
        after: float = 0.0,
        model: str = "",
    ) -> list[Pending]:
        """A request for each of these DP ranks, all of which a pause (``keep``) has frozen ``after`` so many seconds."""
        for _ in range(5):
            self.wait_idle(group)
            group.pause("keep")
            requests = [self.start(rank, prompt, tokens, model) for rank in ranks]
            self.wait_in_flight(group, *ranks)
            group.resume()
            time.sleep(after)
            group.pause("keep")
            # What engines say, not whether answers have come: those may be on their way.
            if all(state.requests for state in group.status() if state.dp_rank in ranks):
                return requests
            group.resume()  # this machine was too slow for us: once more
        raise AssertionError("the requests were over before the pause, five times")

    def wait_idle(self, group: EngineGroup) -> None:
        """Wait until the requests of tests before this one are over."""
        ends = time.monotonic() + 60
        while any(state.requests for state in group.status()):
            assert time.monotonic() < ends, "an engine still has requests"
            time.sleep(0.05)

    def wait_in_flight(self, group: EngineGroup, *ranks: int) -> None:
        """Wait until each of these DP ranks has had a request; short ones may be over by then."""
        ends, missing = time.monotonic() + 20, set(ranks)
        while missing := missing - {state.dp_rank for state in group.status() if state.requests}:
            assert time.monotonic() < ends, f"no request has come to DP ranks {missing}"

    def assert_serves_trainers_weights(self) -> None:
        """Every engine's greedy tokens are the trainer's."""
        expected = self.oracle()
        for rank in (0, 1):
            assert self.generated(rank) == expected, f"DP rank {rank} generates other tokens than the trainer's model"


@contextlib.contextmanager
def start_cluster(
    folder: Path,
    *,
    moe: bool,
    worker_extension: str = WORKER_EXTENSION,
    env: Mapping[str, str] | None = None,
    vllm_args: Sequence[str] = (),
) -> Iterator[Cluster]:
    """Two nodes as namespaces where that is possible, else two on loopback. The caller lives on the head's node meanwhile."""
    model = make_model(folder / "model", moe=moe)
    with contextlib.ExitStack() as stack:
        key_file = None
        if missing():
            nodes = [Node(), Node()]
        else:
            namespaces = Namespaces()
            key_file = stack.enter_context(namespaces.secured(folder))
            nodes = [
                Node(
                    address=namespaces.addresses[node],
                    prefix=namespaces.prefix(node),
                    env={"AREAL_VLLM_KEY_FILE": key_file, "GLOO_SOCKET_IFNAME": namespaces.links[node]},
                )
                for node in ("a", "b")
            ]
        deployment = stack.enter_context(
            Deployment(
                folder / "model",
                nodes,
                log_dir=folder / "logs",
                worker_extension=worker_extension,
                env=env,
                vllm_args=vllm_args,
            )
        )
        deployment.wait(timeout=240)
        yield Cluster(deployment, model, key_file, two_nodes=not missing())


def process_of(pid: int) -> str:
    """The state letter of a process from /proc, or empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
