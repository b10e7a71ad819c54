"""A real vLLM for the benchmarks, and the oracle that says whether it serves the trainer's weights."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import torch

from areal_vllm_ext import EngineGroup
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment, Node
from harness.network import Namespaces, missing

from .sizes import TrainerModel

BASELINE_WORKER = "benchmarks.baseline_worker.BaselineWorker"
PROMPTS = [[10, 20, 30], [5, 6, 7, 8, 9], [100, 3, 50, 7], [7] * 5]
TOKENS = 16
# Largest distance of log-probabilities, as a share of the distance to other weights. Another order of summation in bf16
# makes a few hundredths.
_LOGPROB_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the engines and the trainer run.

    Attributes:
        device: ``cpu`` or ``cuda``. On CPU with ``two_nodes``, the trainer has one network namespace and all engines
            another. On CUDA, the trainer has the first GPUs; the engines have the others, or the same if ``colocated``.
        trainers: the number of the trainer's GPUs.
        engines: the number of data-parallel engines, each of ``tp`` workers.
        quantization: how vLLM quantizes the weights as it loads them.
        eager: whether the engines run without CUDA graphs.
        fresh: whether the engines start from a checkpoint of the trainer's weights of version 0, so that their own output
            at the start is the oracle: where weights are quantized, or a rounding decides which expert a token is given to,
            Hugging Face's is none.
    """

    device: str
    two_nodes: bool = False
    colocated: bool = False
    trainers: int = 1
    engines: int = 1
    tp: int = 1
    quantization: str | None = None
    eager: bool = False
    fresh: bool = False

    @property
    def trainer_device(self) -> torch.device:
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")


class Server:
    """A deployment and its trainer."""

    def __init__(self, deployment: Deployment, place: Place, key_file: str | None, host: str) -> None:
        """Connect; ``host`` is the trainer's address for the workers."""
        self.deployment, self.place, self.key_file, self.host = deployment, place, key_file, host
        self.model = str(deployment.model_dir)
        self.url = deployment.url
        # Distance in nats between log-probabilities of two sets of weights; measured once.
        self._scale = 0.0
        # What the engine answered when it had just started, and the largest distance of two of its answers then.
        self._at_start: list[float] = []
        self._noise = 0.0

    def connect(self) -> EngineGroup:
        return EngineGroup.connect(self.deployment.directory, key_file=self.key_file)

    def post(self, path: str, body: dict[str, Any] | None = None, timeout: float = 300.0, **query: str) -> Any:
        """Call vLLM's HTTP API.

        Raises:
            RuntimeError: the answer is not 200.
        """
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=timeout)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"{path}?{urlencode(query)}", json.dumps(body or {}), headers)
            answer = connection.getresponse()
            text = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{path} answered {answer.status}: {text[:2000].decode(errors='replace')}")
        return json.loads(text) if text else None

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker; returns the answers of the first engine's workers."""
        answer = self.post("/collective_rpc", {"method": method, "args": arguments})
        return answer["results"] if answer else []

    def wrong(self, trainer: TrainerModel) -> str:
        """Return how the engines' output differs from the trainer's model; empty if it does not.

        In float32, greedy tokens must be those of Hugging Face. In bf16, nearly tied tokens may differ, so log-probabilities
        of a prompt are compared: their mean distance may be at most a tenth of the distance to other weights.
        """
        completions = Completions(self.url)
        exact = trainer.model.dtype == torch.float32
        if exact:
            tokens = trainer.greedy(PROMPTS, TOKENS)
            for engine in range(self.place.engines):
                served = completions.greedy(PROMPTS, tokens=TOKENS, engine=engine)
                if served != tokens:
                    return f"engine {engine} generates {served[0][:5]}..., Hugging Face {tokens[0][:5]}..."
            return ""
        prompt = _prompt(trainer)
        expected = trainer.logprobs(prompt)
        self._scale = self._scale or _distance(trainer.logprobs_of_others(prompt), expected)
        error = _distance(self._logprobs(prompt), expected)
        if error > _LOGPROB_TOLERANCE * self._scale:
            return f"log-probabilities differ by {error:.3f} nats; those of other weights by {self._scale:.3f}"
        print(f"log-probabilities: {error:.4f} nats from the trainer's; other weights: {self._scale:.3f}", flush=True)
        return ""

    def remember_start(self, trainer: TrainerModel) -> None:
        """Record what a freshly started engine answers, alone and beside other requests, and how far its answers differ."""
        prompt = _prompt(trainer)
        answers = [self._logprobs(prompt) for _ in range(2)]
        with ThreadPoolExecutor(4) as pool:
            others = [pool.submit(Completions(self.url).greedy, PROMPTS, tokens=TOKENS) for _ in range(3)]
            answers += [self._logprobs(prompt) for _ in range(2)]
            for other in others:
                other.result()
        self._at_start = answers[0]
        self._noise = max(_distance(answers[0], answer) for answer in answers)
        apart = [round(_distance(answers[0], answer), 5) for answer in answers[1:]]
        print(f"a fresh engine's own answers differ by {apart} nats", flush=True)

    def unlike_start(self, trainer: TrainerModel) -> str:
        """Return how the engine's output differs from that of its start; empty if two fresh answers differ as much."""
        error = _distance(self._logprobs(_prompt(trainer)), self._at_start)
        if error > 2 * self._noise:
            return (
                f"log-probabilities differ by {error:.5f} nats from a fresh engine's, two of which by {self._noise:.5f}"
            )
        print(
            f"log-probabilities: {error:.5f} nats from a fresh engine's; two of its own: {self._noise:.5f}", flush=True
        )
        return ""

    def _logprobs(self, prompt: list[int]) -> list[float]:
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1}
        answer = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for entry, token in zip(answer[1:], prompt[1:], strict=True)]


def _prompt(trainer: TrainerModel) -> list[int]:
    return [(37 * i + 11) % trainer.model.config.vocab_size for i in range(200)]


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(one, other, strict=True))


@contextlib.contextmanager
def serving(
    trainer: TrainerModel, place: Place, logs: Path | None, *, native: str = "", extension: str | None = BASELINE_WORKER
) -> Iterator[Server]:
    """Run engines of the trainer's shape; inside this context the calling thread is on the trainer's node.

    Args:
        trainer: gives shape and dtype.
        place: where engines and trainer run.
        logs: a folder for the engines' logs.
        native: vLLM's own weight transfer to start with (``ipc``, ``nccl``), if any.
        extension: the worker's class; None starts a vLLM without this package.
    """
    arguments = ["--no-enable-prefix-caching", *([] if place.fresh else ["--load-format", "dummy"])]
    arguments += ["--dtype", str(trainer.model.dtype).removeprefix("torch."), "--tensor-parallel-size", str(place.tp)]
    if place.device == "cuda" and not place.eager:
        arguments += ["--no-enforce-eager"]  # the deployment's own default is for CPUs
    if place.quantization:
        arguments += ["--quantization", place.quantization]
    if native:
        arguments += ["--weight-transfer-config", json.dumps({"backend": native})]
    # The baselines need vLLM's development routes, and the oracle needs float32 without Triton's TF32.
    env = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "TRITON_F32_DEFAULT": "ieee"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    with contextlib.ExitStack() as stack:
        # A checkpoint of many GB lies in memory, where starting from it takes seconds.
        within = "/dev/shm" if place.fresh else None  # noqa: S108 - memory is what this is for
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-bench-", dir=within)))
        trainer.save(folder / "model", weights=place.fresh)
        key_file, host, node = None, "127.0.0.1", Node(engines=place.engines)
        # On a CPU half a GiB, for the model with hundreds of layers.
        arguments += ["--kv-cache-memory-bytes", str(4 << 30 if place.device == "cuda" else 1 << 29)]
        if place.device == "cuda":
            gpus = place.engines * place.tp
            first = 0 if place.colocated else place.trainers
            own = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(first + gpus)))).split(",")
            node = dataclasses.replace(node, env={"CUDA_VISIBLE_DEVICES": ",".join(own[first : first + gpus])})
            # Memory for the trainer, as much again for an optimizer, and staging; the rest is for keys and values.
            arguments += ["--gpu-memory-utilization", "0.4"]
        elif place.two_nodes:
            if problem := missing():
                raise RuntimeError(problem)
            namespaces = Namespaces()
            key_file = stack.enter_context(namespaces.secured(folder))
            host = namespaces.addresses["a"]
            env |= {"AREAL_VLLM_KEY_FILE": key_file}
            node = dataclasses.replace(
                node,
                address=namespaces.addresses["b"],
                prefix=namespaces.prefix("b"),
                env={"GLOO_SOCKET_IFNAME": namespaces.links["b"]},
            )
            stack.enter_context(_variable("GLOO_SOCKET_IFNAME", namespaces.links["a"]))
        else:
            stack.enter_context(_variable("GLOO_SOCKET_IFNAME", "lo"))
        deployment = Deployment(
            folder / "model",
            [node],
            log_dir=logs or folder / "logs",
            vllm_args=arguments,
            env=env,
            worker_extension=extension,
        )
        stack.enter_context(deployment)
        deployment.wait(timeout=400)
        server = Server(deployment, place, key_file, host)
        if place.fresh:
            server.remember_start(trainer)
        yield server


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
