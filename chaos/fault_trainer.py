"""The trainer process of the fault rounds: it updates the engines on command and reports every phase.

It reads one line of JSON for each update: ``version``, ``timeout``, and ``stop_at``, the phase before which the trainer
waits for another line. It prints one line of JSON for each phase, and one for the end: ``outcome`` and ``seconds``. A line with
``call`` puts the engines to sleep or wakes them up instead.

The weights follow from the version alone, so any process can make the model of a version. If updates are adapters, each brings
a version of ``ADAPTER``, and no base weights. If they bring a drafter too, it has the base model's weights of that version.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.client.weights import named_weights
from areal_vllm_ext.protocol import SleepLevel

# The adapter that updates bring, and requests ask for.
ADAPTER = "math"


class Weights:
    """Makes the model's weights of any version; version 0 is the checkpoint."""

    def __init__(self, model_dir: str) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._first = [parameter.detach().clone() for parameter in self.model.parameters()]

    @torch.no_grad()
    def set(self, version: int) -> PreTrainedModel:
        """Return the model with the weights of ``version``."""
        generator = torch.Generator().manual_seed(version)
        for parameter, first in zip(self.model.parameters(), self._first, strict=True):
            noise = torch.randn(first.shape, generator=generator) if version else 0.0
            parameter.copy_(first + 0.05 * noise)
        return self.model


class Adapters:
    """Makes the model with the adapter of any version, on the weights of the checkpoint."""

    def __init__(self, model_dir: str) -> None:
        import peft

        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"])
        self.model: Any = peft.get_peft_model(base, config).eval()
        self._parts = [one for name, one in self.model.named_parameters() if "lora_" in name]

    @torch.no_grad()
    def set(self, version: int) -> Any:
        """Return the model with the adapter of ``version``; that of version 0 changes nothing."""
        generator = torch.Generator().manual_seed(version)
        for parameter in self._parts:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.15 if version else 0.0))
        return self.model


def weights_of(kind: str, model_dir: Path | str) -> Weights | Adapters:
    """Return what makes the versions that updates of this kind bring, as ``--update`` names it."""
    return Adapters(str(model_dir)) if kind == "adapter" else Weights(str(model_dir))


def report(**what: object) -> None:
    print(json.dumps(what), flush=True)


def call(group: EngineGroup, name: str, timeout: float, level: SleepLevel = 1) -> None:
    """Put the engines to sleep or wake them up, and report how that ended."""
    started, outcome = time.monotonic(), "done"
    try:
        if name == "sleep":
            group.sleep(level, timeout=timeout)
        else:
            group.wake_up(timeout=timeout)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    report(outcome=outcome, seconds=time.monotonic() - started)


def main() -> None:
    directory, key_file, model_dir, kind = sys.argv[1:]
    weights = weights_of(kind, model_dir)
    group = EngineGroup.connect(directory, key_file=key_file)
    report(ready=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "call" in order:
            call(group, order.pop("call"), **order)
            continue

        stops = [order["stop_at"]]

        def on_phase(phase: str, stops: list[str] = stops) -> None:
            report(phase=phase)
            if phase in stops:
                stops.clear()  # only once, because an update that has lost its connection begins again
                sys.stdin.readline()

        def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
            named = list(named_weights(model))
            for index, entry in enumerate(named):
                if index == len(named) // 2:
                    on_phase("receiving")
                yield entry

        model = weights.set(order["version"])
        started = time.monotonic()
        try:
            with group.update(order["version"], timeout=order["timeout"], bucket_mib=1, on_phase=on_phase) as update:
                if kind == "adapter":
                    on_phase("receiving")
                    update.send_adapter(ADAPTER, model)
                else:
                    update.send(tensors(model), draft=model if kind == "draft" else None)
            outcome, lost = "committed", list(update.result.lost)
        except UpdateAborted as error:
            outcome, lost = f"aborted: {error}", []
        except Exception as error:
            outcome, lost = f"{type(error).__name__}: {error}", []
        report(outcome=outcome, lost=lost, seconds=time.monotonic() - started)


if __name__ == "__main__":
    main()
