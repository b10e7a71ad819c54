"""What a model takes is found out by a load without memory, for engines whose checkpoint is not known."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from real_commits import Engines
from real_receivers import SHAPES, connected, send
from real_receivers import weights as served_weights

from areal_vllm_ext import UpdateAborted
from areal_vllm_ext.protocol import security
from areal_vllm_ext.worker.load import proof
from areal_vllm_ext.worker.load.dry_load import DryModel
from areal_vllm_ext.worker.load.unloaded import load_and_find_unloaded


class Model(torch.nn.Module):
    """Loaders as vLLM's: fused, named, strict about shapes and names; a scale that no checkpoint has."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        for name, shape in {"embed": (8, 4), "qkv": (6, 4), "mlp": (4, 4), "scale": (1,)}.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, device=device), requires_grad=False))
        self.head = self.embed  # tied
        self.loads = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.loads += 1
        for name, tensor in weights:
            if name in "qkv":
                target = self.get_parameter("qkv").data.narrow(0, 2 * "qkv".index(name), 2)
            elif name == "embed":
                target = self.get_parameter("embed")[:7].data
                self.get_parameter("embed")[7:].data.fill_(0)
            else:
                target = dict(self.named_parameters())[name].data
            assert target.shape == tensor.shape, f"{name} has shape {tuple(tensor.shape)}"
            target.copy_(tensor)


def weights(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    whole = {"embed": torch.ones(7, 4), **{one: torch.ones(2, 4) for one in "qkv"}, "mlp": torch.ones(4, 4)}
    return {name: tensor for name, tensor in (whole | changes).items() if tensor is not None}


def test_a_model_takes_its_weights_and_is_asked_once() -> None:
    model = Model("meta")
    dry = DryModel(model, complete=True)
    for _ in range(3):
        assert dry.refusal(weights()) is None
    assert model.loads == 1
    assert all(parameter.is_meta for parameter in model.parameters())
    assert dry.refusal(weights(mlp=torch.ones(3, 4))) is not None, "of another shape"
    assert dry.refusal(weights()) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mlp": None, "_orig_mod.mlp": torch.ones(4, 4)}, "does not take these weights: KeyError: '_orig_mod.mlp'"),
        ({"v_head": torch.ones(1)}, "does not take these weights: KeyError: 'v_head'"),
        ({"mlp": torch.ones(4, 2)}, r"does not take these weights: AssertionError: mlp has shape \(4, 2\)"),
        ({"mlp": None}, "1 parameters of the model lack weights: mlp; send all weights"),
        (
            {"q": None, "k": None, "v": None, "mlp": None},
            "2 parameters of the model lack weights: qkv, mlp; send all",
        ),
    ],
)
def test_other_weights_are_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    dry = DryModel(Model("meta"), complete=True)
    with pytest.raises(AssertionError, match=reason):
        assert dry.refusal(weights(**changes)) is None, dry.refusal(weights(**changes))


def test_a_quantised_model_has_parameters_without_weights() -> None:
    assert DryModel(Model("meta"), complete=False).refusal(weights(mlp=None)) is None


def test_a_model_that_cannot_be_built_without_memory_is_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    worker = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=SimpleNamespace()))
    assert DryModel.of(worker) is None
    assert "cannot be checked by a load without memory" in caplog.text


def test_a_parameter_that_gets_other_memory_is_loaded() -> None:
    model: Any = Model()

    def assigns(pairs: Any) -> None:
        for name, tensor in pairs:
            model.get_parameter(name).data = tensor

    model.load_weights = assigns
    assert load_and_find_unloaded(model, [("mlp", torch.ones(4, 4))]) == ["embed", "qkv"]


def test_a_parameter_that_is_written_in_part_may_be_padded() -> None:
    partly: list[str] = []
    sent = weights(q=None)
    assert load_and_find_unloaded(Model("meta"), sent.items(), partly) == []
    assert partly == ["qkv"]
    assert DryModel(Model("meta"), complete=True).refusal(sent) is None, "so it is no reason to say no"


@pytest.mark.parametrize(
    ("unloaded", "cause"),
    [
        (["qkv"], "or the corrections that areal_vllm_ext makes to it, reload this model wrongly: restart the engine"),
        ([], "or the corrections that areal_vllm_ext makes to it, reload this model wrongly: restart the engine"),
        (["mlp"], r"what was sent is not complete \(1 parameters of the model lack weights: mlp\): send all weights"),
    ],
)
def test_a_failed_proof_names_its_cause(monkeypatch: pytest.MonkeyPatch, unloaded: list[str], cause: str) -> None:
    model = Model()
    worker = SimpleNamespace(get_model=lambda: model, device=torch.device("cpu"))
    monkeypatch.setattr(proof, "obstacle", lambda *_: "")

    def fresh(_worker: Any, _weights: Any, found: list[str]) -> torch.nn.Module:
        found.extend(unloaded)
        return Model()

    monkeypatch.setattr(proof, "fresh_model", fresh)
    live = proof.digests_of_model(model) | {"mlp": 1}
    with pytest.raises(proof.ProofFailed, match=rf"1 tensors are not what a fresh load .* gives: mlp; .*{cause}"):
        proof.prove(worker, [], live)


class Dry(torch.nn.Module):
    """The model of ``test_unchanged``'s workers, without memory."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            parameter = torch.nn.Parameter(torch.zeros(shape, device="meta"), requires_grad=False)
            self.register_parameter(name.replace(".", "_"), parameter)

    def load_weights(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in pairs:
            self.get_parameter(name.replace(".", "_")).data.copy_(tensor)


@pytest.mark.parametrize(
    ("wrong", "reason"), [({"extra": torch.ones(1)}, "extra"), ({"norm": None}, "lack weights: norm")]
)
def test_an_engine_without_a_known_checkpoint_says_no_before_anything_is_touched(
    key: security.ClusterKey, key_file: Path, tmp_path: Path, wrong: dict[str, Any], reason: str
) -> None:
    with Engines.started(key, tmp_path, key_file) as engines, connected(engines.deployment, key_file) as group:
        for worker in engines.all_workers:
            assert not worker._areal_receiver.context.intake.known
            worker._areal_receiver.context.dry_model = DryModel(Dry(), complete=True)
        send(group, served_weights(1))
        assert engines.serve(served_weights(1))
        sent = {name: tensor for name, tensor in (served_weights(2) | wrong).items() if tensor is not None}
        with pytest.raises(UpdateAborted, match=f"prepare: ValueError: nothing was applied: .*{reason}"):
            send(group, sent, version=2)
        assert engines.serve(served_weights(1))
        send(group, served_weights(3), version=3)
        assert engines.serve(served_weights(3))
