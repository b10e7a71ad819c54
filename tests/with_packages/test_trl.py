"""TRL's classes on two real engines: every sync exact on both; a failed one leaves the old weights and no rank alone."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is in .venv-integrations: make test-integrations")

from areal_vllm_ext import InvalidWeights, UpdateAborted
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment
from areal_vllm_ext.demo.model import greedy_tokens, make_model
from areal_vllm_ext.integrations.trl import ArealWeightTransfer, use_areal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [[10, 20, 30], [100, 3, 50, 7]]
EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_grpo.py"


class Served:
    """Two engines, and the trainer's model."""

    def __init__(self, deployment: Deployment, model: PreTrainedModel) -> None:
        self.deployment, self.model = deployment, model

    def train(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.data) for name, parameter in self.model.named_parameters())

    def is_exact(self) -> bool:
        engines = Completions(self.deployment.url)
        expected = greedy_tokens(self.model, PROMPTS, 16)
        return all(engines.greedy(PROMPTS, tokens=16, engine=rank) == expected for rank in (0, 1))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("trl")
    model = make_model(folder / "model")
    with Deployment(folder / "model", log_dir=folder / "logs") as deployment:
        deployment.wait(timeout=400)
        yield Served(deployment, model)


def test_each_call_of_trls_client_is_one_update_of_every_engine(served: Served) -> None:
    results: list[Any] = []
    made = use_areal(served.deployment.directory, engines=2, timeout=60, on_update=results.append)
    client = made(base_url=served.deployment.url)
    client.init_communicator("cpu")
    served.train()
    client.update_named_params([], served.named())
    assert served.is_exact()
    served.train()
    client.update_model_params(served.model)
    client.reset_prefix_cache()
    assert served.is_exact()
    served.train()
    with client.weight_update():
        for name, tensor in served.named():
            client.update_named_param(name, tensor)
    assert served.is_exact()
    name, tensor = next(iter(served.named()))
    # One tensor alone: refused where weights are packed, as on a CPU, because an engine cannot keep the others.
    with pytest.raises(UpdateAborted, match="cannot keep"):
        client.update_named_param(name, tensor * 1.5)
    assert served.is_exact()
    assert [result.version for result in results] == [1, 2, 3]
    # A tensor that does not fit: refused, the old weights serve, and the generator that gathers was walked to its end.
    walked: list[str] = []

    def wrong() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in served.named():
            walked.append(name)
            yield name, tensor[:1] if len(walked) == 2 else tensor

    with pytest.raises(InvalidWeights):
        client.update_named_params([], wrong())
    assert len(walked) == len(list(served.named()))
    assert served.is_exact()
    client.close_communicator()


def test_the_weight_transfer_of_async_grpo(served: Served) -> None:
    from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol

    transfer = ArealWeightTransfer(served.deployment.directory, engines=2, timeout=60)
    for name, method in inspect.getmembers(WeightTransferProtocol, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(ArealWeightTransfer, name))
            assert list(ours.parameters) == list(inspect.signature(method).parameters), name
    transfer.init_weight_transfer()
    for _ in range(2):
        served.train()
        transfer.pause()
        transfer.send_weights(served.named())
        transfer.resume()
        assert served.is_exact()
    transfer.destroy()


def test_a_colocated_trainer_is_the_sender(tmp_path: Path) -> None:
    """TRL's own generation object, but for its ``LLM``: the engines are others that really receive."""
    from accelerate import Accelerator
    from served import assert_serve, connected, serving_model, train
    from trl.generation import vllm_generation

    calls: list[list[str]] = []
    with serving_model(tmp_path) as (engines, model, key_file), connected(engines.deployment, key_file) as group:
        for _ in range(2):  # the second call replaces the first's settings, and wraps nothing twice
            use_areal(engines.deployment.directory, key_file=str(key_file), engines=2, timeout=60)
        generation = vllm_generation.VLLMGeneration.__new__(vllm_generation.VLLMGeneration)
        generation.mode, generation.enable_sleep_mode, generation.tensor_parallel_size = "colocate", True, 1
        generation.model, generation.accelerator = model, Accelerator(cpu=True)
        generation._dist = vllm_generation.DistributedBackend(generation.accelerator)
        generation.llm = SimpleNamespace(wake_up=lambda *, tags: calls.append(tags))
        generation._llm_weights_sleeping = True
        for version in (1, 2):
            train(model, version)
            generation.sync_weights()
            assert_serve(engines, model, group, version)
        generation._areal_syncs.close()
        assert calls == [["weights"]] * 2
        assert not generation._llm_weights_sleeping


def test_a_colocated_engine_is_exact_after_each_sync(tmp_path: Path) -> None:
    """TRL's generation with its own in-process ``LLM``, whose raw loading a CPU would refuse."""
    assert run(Path(__file__).with_name("trl_colocated.py"), str(tmp_path)).splitlines().count("exact") == 3


def test_the_example_trains_until_the_reward_rises() -> None:
    assert "syncs exact on both engines" in run(EXAMPLE)


def run(program: Path, *arguments: str) -> str:
    """Run a program to its end, and return what it wrote."""
    path = os.pathsep.join(filter(None, (str(EXAMPLE.parents[1]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
