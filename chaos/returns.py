"""Kill -9 of a headless engine, again and again: it must be back, and serve its group's version.

    python -m chaos.returns [--rounds 10] [--updates] [--adapter] [--out FILE]

One replica stays. Another one, of a head and a headless node, loses its headless engine in each round. vLLM takes no single
engine back, so the replica is restarted, as a supervisor would do. Both of its engines start with the weights of the
checkpoint, fetch the group's from a peer, and must then generate Hugging Face's tokens. They are asked from the first moment
on: no answer may come from the checkpoint's weights. With ``--updates`` a trainer comes in every second round as soon as the
directory knows both engines again, and updates the group while they fetch. With ``--adapter`` updates bring a version of a LoRA
adapter, and requests ask for it: engines that return must have that too. The last line is JSON. Exits with 1 if a promise
was broken. Needs root and ``ip``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from areal_vllm_ext import EngineGroup, EngineState
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment, Node
from areal_vllm_ext.demo.model import greedy_tokens, make_model
from harness.network import Namespaces
from harness.report import described

from .fault_trainer import Adapters, Weights
from .real_deployment import LORA
from .real_history import Observer

PROMPTS = ([10, 20, 30], [5, 6, 7, 8, 9], [100, 3, 50, 7])
TOKENS = 16
BACK_SECONDS = 10.0
# For answers with the version of each token.
ARGUMENTS = ("--enable-scale-out",)
VIOLATIONS = ("hangs", "wrong_tokens", "untrue_outcomes", "wrong_histories")
STAYS, RETURNS = "stays", "returns"


@dataclasses.dataclass
class Outcome:
    """One round: seconds from the moment when the directory knew the engines until they served, and what went wrong."""

    back_s: list[float]
    loaded: list[str]
    violations: list[str]


def node(namespaces: Namespaces, name: str, key_file: str, **env: str) -> Node:
    given = {"AREAL_VLLM_KEY_FILE": key_file, "GLOO_SOCKET_IFNAME": namespaces.links[name], **env}
    return Node(address=namespaces.addresses[name], prefix=namespaces.prefix(name), env=given)


def returned(group: EngineGroup) -> dict[int, EngineState]:
    return {state.dp_rank: state for state in group.status() if state.replica == RETURNS}


class Trainer:
    """Updates the group.

    Attributes:
        version: of its last update.
        adapter: which its updates bring; empty for base weights.
        writes: its updates, for the histories: version, begin and end.
    """

    def __init__(self, group: EngineGroup, weights: Weights | Adapters, adapter: str = "") -> None:
        self.version, self.adapter = 0, adapter
        self.writes: list[tuple[int, float, float]] = []
        self._group, self._weights = group, weights

    def update(self) -> None:
        self.version += 1
        started = time.monotonic()
        model = self._weights.set(self.version)
        if self.adapter:
            self._group.update_weights(version=self.version, adapters={self.adapter: model}, timeout=60)
        else:
            self._group.update_weights(model, version=self.version, timeout=60)
        self.writes.append((self.version, started, time.monotonic()))

    def tokens(self) -> list[list[int]]:
        """Return what an engine must answer now."""
        return greedy_tokens(self._weights.set(self.version), PROMPTS, TOKENS)


def play_round(
    group: EngineGroup, deployment: Deployment, observer: Observer, trainer: Trainer, *, updates: bool
) -> Outcome:
    """Wait until both engines serve, compare their tokens and what they answered before, and kill the headless one.

    Args:
        group: watches the engines.
        deployment: of the engines that return.
        observer: asks them.
        trainer: knows what they must serve.
        updates: whether ``trainer`` updates as soon as both engines are known again.
    """
    trains = updates
    outcome, seen, back = Outcome([], [], []), dict[int, float](), dict[int, float]()
    ends = time.monotonic() + 400.0
    while (len(back) < 2 or updates) and time.monotonic() < ends:
        deployment.check()
        if updates and len(seen) == 2:
            updates = False
            trainer.update()
            observer.wrote(*trainer.writes[-1], "committed")
        for rank, state in returned(group).items():
            if state.generation == "unreachable":
                continue
            seen.setdefault(rank, time.monotonic())
            if (state.version, state.generation, state.update_phase) == (trainer.version, "running", "idle"):
                back.setdefault(rank, time.monotonic() - seen[rank])
        time.sleep(0.05)
    outcome.back_s = [round(back.get(rank, float("inf")), 2) for rank in (0, 1)]
    outcome.violations += [f"hangs: back after {one} s" for one in outcome.back_s if one > BACK_SECONDS]
    outcome.loaded = [state.loaded for _, state in sorted(returned(group).items())]
    if not trains:
        outcome.violations += [f"untrue_outcomes: loaded by {one}" for one in outcome.loaded if "peer: " not in one]
    deployment.wait(timeout=400, report=lambda _: None)
    completions, expected = Completions(deployment.url, timeout=60, adapter=trainer.adapter), trainer.tokens()
    for rank in (0, 1):
        if completions.greedy(PROMPTS, tokens=TOKENS, engine=rank) != expected:
            outcome.violations.append(f"wrong_tokens: DP rank {rank}")
    outcome.violations += [f"wrong_histories: {what}" for what in observer.problems()]
    (headless,) = (engine for engine in group.engines() if engine.replica == RETURNS and engine.headless)
    os.kill(headless.pid, signal.SIGKILL)
    return outcome


def play(options: argparse.Namespace) -> dict[str, object]:
    """Play the rounds; return the totals."""
    done: list[Outcome] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-returns-")))
        namespaces = Namespaces()
        key_file = stack.enter_context(namespaces.secured(folder))
        model = folder / "model"
        make_model(model)
        adapter = "math" if options.adapter else ""
        weights = Adapters(str(model)) if adapter else Weights(str(model))
        arguments = (*ARGUMENTS, *(LORA if adapter else ()))
        stays = Deployment(
            model,
            [node(namespaces, "a", key_file, AREAL_VLLM_REPLICA=STAYS)],
            log_dir=folder / STAYS,
            vllm_args=arguments,
        )
        stack.enter_context(stays)
        stays.wait(timeout=400, report=lambda _: None)
        trainer = Trainer(
            stack.enter_context(EngineGroup.connect(stays.directory, key_file=key_file)), weights, adapter
        )
        trainer.update()
        env = {"AREAL_VLLM_REPLICA": RETURNS, "AREAL_VLLM_DIRECTORY": stays.directory}
        nodes = [node(namespaces, name, key_file, **env) for name in ("b", "a")]
        answers = 0
        for number in range(options.rounds):
            deployment = Deployment(model, nodes, log_dir=folder / str(number), vllm_args=arguments)
            observer = Observer(deployment.url, (0, 1), weights, adapter)
            for write in trainer.writes:
                observer.wrote(*write, "committed")
            with deployment, observer, EngineGroup.connect(stays.directory, key_file=key_file) as watching:
                updates = options.updates and number % 2 == 1
                done.append(play_round(watching, deployment, observer, trainer, updates=updates))
            answers += observer.count
            print(f"round {number}: {done[-1]}", flush=True)
    problems = [what for one in done for what in one.violations]
    totals: dict[str, object] = {
        "rounds": len(done),
        "answers_checked": answers,
        "slowest_back_s": max(max(one.back_s) for one in done),
    }
    for kind in VIOLATIONS:
        totals[kind] = sum(what.startswith(kind) for what in problems)
    table = described({"totals": totals, "rounds": [dataclasses.asdict(one) for one in done]})
    if options.out:
        options.out.write_text(json.dumps(table, indent=1) + "\n")
    return totals


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a headless engine again and again; a peer brings it back.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--updates", action="store_true", help="let a trainer update in every second round")
    parser.add_argument("--adapter", action="store_true", help="let updates bring a LoRA adapter")
    parser.add_argument("--out", type=Path, help="write the table of rounds here")
    totals = play(parser.parse_args())
    print(json.dumps(totals))
    return int(any(totals[kind] for kind in VIOLATIONS))


if __name__ == "__main__":
    sys.exit(main())
