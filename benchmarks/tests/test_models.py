"""The trial of model families: what counts as right, and what the page says about the rest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.models import page, quantized, trial
from benchmarks.models.engine import distance
from benchmarks.models.families import FAMILIES
from benchmarks.models.trainer import SENDS, Trainer

if TYPE_CHECKING:
    from pathlib import Path

ZERO: Any = [([1, 2], [-1.0, -2.0])]
ONE: Any = [([1, 3], [-1.0, -2.5])]


def outcome(**sends: dict[str, Any]) -> dict[str, Any]:
    return {"model": "Model", "oracle": {"zero": ZERO, "one": ONE}, "sends": sends, "unproven": "", "not_planned": ""}


def test_the_distance_is_that_of_the_worst_value_and_infinite_for_another_token() -> None:
    assert distance(ZERO, [([1, 2], [-1.25, -2.0])]) == 0.25
    assert distance(ZERO, ONE) == math.inf


def test_a_send_is_right_if_the_engine_says_what_the_oracle_says_to_the_weights_that_it_should_serve() -> None:
    done = {"way": "reload", "pause_ms": 30.0, "kept": 0, "update_phase": "idle"}
    row = trial.judged(
        outcome(
            module={"weights": "one", "said": ONE, **done},
            disk={"weights": "one", "said": ONE, **done, "way": "plan", "pause_ms": 4.0},
        ),
        {"zero": ZERO, "one": ONE},
        0.001,
    )
    assert page.is_right(row)
    assert (row["first_pause_ms"], row["pause_ms"]) == (30.0, 4.0)
    row |= {"oracle": "Hugging Face", "architecture": "Arch"}
    assert "| 2 of 2 | reload, then plan | 30.0 / 4.0 | Hugging Face |" in page.text(result({"qwen2": row}))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({"said": ZERO, "way": "plan", "pause_ms": 1.0}, "wrong: other tokens"),
        ({"said": ONE, "error": "WeightsTainted: half"}, "refused: WeightsTainted: half"),
        ({"said": ZERO, "error": "WeightsTainted: half"}, "and serves wrong weights (tainted)"),
    ],
)
def test_what_is_wrong_or_refused_is_not_right_and_named(sent: dict[str, Any], said: str) -> None:
    faulty = outcome(module={"weights": "one", "update_phase": "tainted", **sent})
    row = trial.judged(faulty, {"zero": ZERO, "one": ONE}, 0.001) | {"oracle": "Hugging Face", "architecture": "Arch"}
    assert not page.is_right(row)
    assert said in page.text(result({"qwen2": row}))
    assert "1 models of 1 architectures were tried. vLLM serves 1 of them. 0 are right" in page.text(
        result({"qwen2": row})
    )


def test_a_family_that_vllm_does_not_serve_is_listed_with_the_reason() -> None:
    text = page.text(result({"phi": {"architecture": "PhiForCausalLM", "error": "ValueError: no\nsuch | model"}}))
    assert "| phi | PhiForCausalLM | ValueError: no such \\| model |" in text
    assert "Made by `python -m benchmarks.models`" in text.splitlines()[2]


def result(rows: dict[str, Any]) -> dict[str, Any]:
    return {"families": rows, "versions": {"vllm": "0.32"}, "date": "2026-11-30T00:00:00+00:00", "machine": "2 cores"}


def test_a_trainer_sends_the_same_weights_in_each_way(tmp_path: Path) -> None:
    trainer = Trainer(FAMILIES["qwen2"])
    trainer.set("one")
    saved = load_file(trainer.to_send("disk", tmp_path / "one") / "model.safetensors")
    ways = {kind: trainer.to_send(kind, tmp_path / "one") for kind, _ in SENDS}
    sent = {"state dict": ways["state dict"], "iterable": dict(ways["iterable"]), "module": ways["module"].state_dict()}
    for tensors in sent.values():
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[name].float(), saved[name]) for name in saved)
    assert not all(one.is_contiguous() for one in sent["iterable"].values())
    trainer.set("two")
    two = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.set("three")
    three = trainer.model.state_dict()
    assert sum(not torch.equal(two[name], three[name]) for name in two) == 1
    assert any(not torch.equal(two[name], saved[name]) for name in two)


def test_four_bits_are_packed_as_compressed_tensors_unpacks_them(tmp_path: Path) -> None:
    trainer = Trainer(FAMILIES["llama"])
    trainer.save(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    before = load_file(tmp_path / "model.safetensors")[f"{name}.weight"]
    quantized.to_int4(tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    shifts = torch.arange(0, 32, 4)
    values = ((after[f"{name}.weight_packed"].unsqueeze(2) >> shifts) & 15).flatten(1) - 8
    scales = after[f"{name}.weight_scale"].float().repeat_interleave(32, dim=1)
    assert after[f"{name}.weight_shape"].tolist() == list(before.shape)
    assert (values * scales - before).abs().max() <= scales.max()
