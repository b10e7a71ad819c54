"""Fault rounds on a real vLLM: two nodes (network namespaces), an engine on each, and a trainer process.

A round starts an update, lets a fault strike before or during one phase of the update, ends the fault, and checks: All
engines that are left answer, serve one version, and generate that version's tokens as Hugging Face does. A fresh update by
another trainer works. Nothing is left behind. Meanwhile every engine is asked without a break, and the history of all updates
and answers of a deployment must be that of one register. Rounds share a deployment until a fault kills an engine.

With ``--update asleep`` the engines sleep when the update comes, and wake up when the fault has ended. With
``--update adapter`` each update brings a version of a LoRA adapter and no base weights, and requests ask for the adapter. With
``--update draft`` each brings a draft model too, and an engine must draft with the version that it claims.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness.report import described

from .bad_wire import BadNamespaces
from .real_deployment import RealDeployment, command_of, descriptors

RESULTS = Path(__file__).parent / "results" / "faults.json"
# "shadow": while workers build the new weights beside generation, which those of a MoE model on a CPU do in each update.
PHASES = ("begin", "receiving", "prepare", "shadow", "pause", "commit", "resume")
# When a fault strikes after its phase has begun, in seconds. A shadow takes longer than that.
STRIKES_AFTER = {"shadow": (0.02, 0.15)}
LEASE_SECONDS = 10.0
# Longest time in which vLLM ends a deployment of which a worker was killed.
ENDED_SECONDS = 30.0
SERVES_AGAIN_SECONDS = LEASE_SECONDS + 5.0
TIMEOUT = 20.0
STOP_SECONDS = 12.0
OVERRUN_SECONDS = 1.0
# Most descriptors that a process may gain; each worker keeps the connections of four earlier trainers.
DESCRIPTORS = 40

KINDS = (
    "kill trainer",
    "stop trainer",
    "stop head",
    "stop headless",
    "stop worker",
    "link down",
    "loss 10 %",
    "delay 200 ms",
    "rate 5 Mbit/s",
    "kill head",
    "kill headless",
    "kill worker",
)
QUALITY = {"loss 10 %": {"loss": 0.1}, "delay 200 ms": {"delay": 0.2}, "rate 5 Mbit/s": {"rate": 5e6 / 8}}
VIOLATIONS = ("mixed_versions", "hangs", "wrong_tokens", "leftovers", "overruns", "untrue_outcomes", "wrong_histories")


@dataclasses.dataclass
class Outcome:
    """The result of a round: one line of the table.

    Attributes:
        slept: the level of the engines' sleep; 0 if they were awake.
    """

    fault: str
    phase: str
    during: bool
    outcome: str = ""
    version: object = None
    serves_again_s: float = 0.0
    slept: int = 0
    overrun_s: float = 0.0
    violations: list[str] = dataclasses.field(default_factory=list)

    def violated(self, kind: str, what: str) -> None:
        self.violations.append(f"{kind}: {what}")


class Round:
    """One round: an update and a fault."""

    def __init__(self, deployment: RealDeployment, kind: str, phase: str, dice: random.Random) -> None:
        self.deployment = deployment
        self.kind = kind
        self.dice = dice
        self.outcome = Outcome(kind, phase, during=dice.random() < 0.5 or phase == "shadow")
        head, headless = deployment.engines
        self.deed, _, victim = kind.partition(" ")
        self.trainer = deployment.trainers[0]
        deployment.version += 1
        self.version = deployment.version
        # True if another trainer updates while this one is stopped.
        self.rival = kind == "stop trainer" and dice.random() < 0.5
        self.left = deployment.engines
        if kills_engine(kind):
            self.left = [headless] if victim == "head" else [head]
        self.pid = {
            "trainer": self.trainer.process.pid,
            "head": head.pid,
            "headless": headless.pid,
            "worker": headless.workers[0].pid,
        }.get(victim, 0)

    def strike(self) -> None:
        if self.deed in ("kill", "stop"):
            os.kill(self.pid, signal.SIGKILL if self.deed == "kill" else signal.SIGSTOP)
        elif self.deed == "link":
            self.deployment.namespaces.set_link("b", "down")
        else:
            self.deployment.namespaces.set_quality(**QUALITY[self.kind])

    def heal(self) -> None:
        """Wait a while, then end the fault."""
        if self.deed == "stop":
            ends = time.monotonic() + STOP_SECONDS
            if self.rival:  # its update waits until the stopped trainer's lease runs out
                self.deployment.fresh_update()
            time.sleep(max(ends - time.monotonic(), 0.0))
            os.kill(self.pid, signal.SIGCONT)
        elif self.deed == "link":
            time.sleep(self.dice.uniform(0.5, STOP_SECONDS))
            self.deployment.namespaces.set_link("b", "up")
        elif self.kind in QUALITY:
            self.deployment.namespaces.set_quality()

    def run(self) -> Outcome:
        if self.deployment.update == "asleep":
            self.sleep()
        outcome, started = self.outcome, time.monotonic()
        end = self.update_under_fault()
        healed = time.monotonic()
        if end is None:
            end = self.trainer.await_end(TIMEOUT + 45.0)
        outcome.outcome = end["outcome"] if end else "hangs"
        self.deployment.observer.wrote(self.version, started, time.monotonic(), outcome.outcome)
        if end is None:
            outcome.violated("hangs", f"the trainer's update does not end in {TIMEOUT + 45:.0f} s")
        elif "trainer" not in self.kind:  # a stopped process cannot keep a deadline
            outcome.overrun_s = round(max(end["seconds"] - TIMEOUT, 0.0), 2)
            if outcome.overrun_s > OVERRUN_SECONDS:
                outcome.violated("overruns", f"took {end['seconds']:.1f} s of {TIMEOUT:.0f} s")
        if outcome.slept:
            self.wake_up()
        self.check_engines(healed)
        for what in self.deployment.observer.problems():
            outcome.violated("wrong_histories", what)
        if self.kind == "kill trainer":
            self.deployment.replace_trainer()
        return outcome

    def sleep(self) -> None:
        """Put the engines to sleep before the update."""
        self.outcome.slept = self.dice.choice([1, 2])
        if (end := self.deployment.call("sleep", level=self.outcome.slept))["outcome"] != "done":
            self.outcome.violated("hangs", f"a sleep: {end}")

    def wake_up(self) -> None:
        """Wake the engines up after the update and its fault."""
        if (end := self.deployment.call("wake up"))["outcome"] != "done":
            self.outcome.violated("hangs", f"a waking: {end}")

    def update_under_fault(self) -> dict[str, Any] | None:
        """Update, strike and heal; returns the end of the update if it is known by then."""
        trainer, phase = self.trainer, self.outcome.phase.replace("shadow", "prepare")
        if self.kind in QUALITY:
            self.strike()
        trainer.send(version=self.version, timeout=TIMEOUT, stop_at=phase)
        if self.kind in QUALITY:
            end = trainer.await_end(TIMEOUT + 45.0)
            self.heal()
            return end
        while (line := trainer.read(TIMEOUT)) and line.get("phase") != phase:
            if "outcome" in line:
                return line
        if self.outcome.during:
            trainer.send(go=True)
            time.sleep(self.dice.uniform(*STRIKES_AFTER.get(self.outcome.phase, (0.0, 0.02))))
        self.strike()
        if not self.outcome.during:
            trainer.send(go=True)
        self.heal()
        if self.kind != "kill trainer":
            return None
        trainer.close()
        return {"outcome": "killed", "seconds": 0.0}

    def check_engines(self, healed: float) -> None:
        """Check the engines that are left, before another trainer comes."""
        deployment, outcome = self.deployment, self.outcome
        ends = max(healed + SERVES_AGAIN_SECONDS, time.monotonic() + 1.0)
        statuses, problem = deployment.wait_serving(self.left, ends, discarded=outcome.slept == 2)
        outcome.serves_again_s = round(time.monotonic() - healed, 2)
        versions = {status.version for status in statuses.values() if status}
        outcome.version = sorted(map(str, versions))
        # When no engine answers, vLLM has ended the deployment, or the engines hang: see below.
        if outcome.outcome == "committed" and not self.rival and versions and self.version not in versions:
            outcome.violated("untrue_outcomes", f"committed, but engines are on {outcome.version}")
        if outcome.outcome.startswith("aborted") and self.version in versions:
            outcome.violated("untrue_outcomes", f"aborted, but engines are on {outcome.version}")
        wrong = deployment.wrong_tokens(statuses) if self.left[0].dp_rank == 0 and not problem else ""
        # When a worker dies, its EngineCore reports that, and vLLM's front end ends itself and every engine. The engines of a
        # MoE model compute together: when one dies, vLLM ends the others.
        ends_all = self.kind == "kill worker" or (deployment.moe and kills_engine(self.kind))
        if ends_all and (problem or wrong) and deployment.ended(ENDED_SECONDS):
            outcome.outcome += "; vLLM ended the deployment"
            return
        if problem:
            outcome.violated("mixed_versions" if problem.startswith("mixed") else "hangs", problem)
        if wrong:
            outcome.violated("wrong_tokens", wrong)
        if not kills_engine(self.kind):
            self.check_all_there()

    def check_all_there(self) -> None:
        """Check that a fresh update works, that its tokens are right, and that nothing is left."""
        deployment, outcome = self.deployment, self.outcome
        fresh = deployment.fresh_update()
        if fresh["outcome"] != "committed" or fresh.get("lost"):
            outcome.violated("hangs", f"a fresh update: {fresh}")
        statuses, problem = deployment.wait_serving(deployment.engines, time.monotonic() + 5.0)
        if problem:
            outcome.violated("hangs", f"after a fresh update: {problem}")
        if wrong := deployment.wrong_tokens(statuses):
            outcome.violated("wrong_tokens", f"after a fresh update: {wrong}")
        if files := list(Path("/dev/shm").glob("areal-*")):  # noqa: S108, that is where shared memory is
            outcome.violated("leftovers", f"{files}")
        if pids := deployment.namespaces_pids() - deployment.processes:
            outcome.violated("leftovers", f"processes {[command_of(pid) for pid in pids]}")
        for pid, baseline in deployment.descriptors.items():
            if not Path(f"/proc/{pid}").exists():
                outcome.violated("hangs", f"process {pid} has ended\n{deployment.log_ends()}")
            elif (now := descriptors(pid)) > baseline + DESCRIPTORS:
                outcome.violated("leftovers", f"process {pid} has {now} descriptors, {baseline} before")


def choose(options: argparse.Namespace, dice: random.Random) -> list[tuple[str, str]]:
    """Return pairs of fault and phase: every fault in turn, over all phases; faults that kill engines come last."""
    kinds = [kind for kind in KINDS if options.only in kind]
    if options.update == "asleep":  # engines that are left wake up with the others only
        kinds = [kind for kind in kinds if not kills_engine(kind)]
    possible = [phase for phase in PHASES if options.phase in phase]
    phases = {kind: collections.deque(dice.sample(possible, len(possible))) for kind in kinds}
    chosen = []
    for index in range(options.rounds):
        kind = kinds[index % len(kinds)]
        phases[kind].rotate()
        chosen.append((kind, "all" if kind in QUALITY else phases[kind][0]))
    return sorted(chosen, key=lambda one: (kills_engine(one[0]), KINDS.index(one[0])))


def kills_engine(kind: str) -> bool:
    return kind.startswith("kill") and kind != "kill trainer"


def play(options: argparse.Namespace) -> dict[str, object]:
    """Play rounds, print a line for each, write the table, and return the totals."""
    dice = random.Random(options.seed)
    waiting = collections.deque(choose(options, dice))
    done: list[Outcome] = []
    started = time.monotonic()
    deployments = 0
    answers: dict[int, int] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves the contexts below, so every process ends
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-faults-")))
        namespaces = BadNamespaces()
        key_file = stack.enter_context(namespaces.secured(folder))
        while waiting and time.monotonic() - started < options.seconds:
            deployments += 1
            deployment = RealDeployment(
                folder / str(deployments),
                namespaces,
                key_file,
                moe=options.moe,
                update=options.update,
            )
            with deployment.up():
                while waiting and time.monotonic() - started < options.seconds:
                    kind, phase = waiting.popleft()
                    one = Round(deployment, kind, phase, dice).run()
                    done.append(one)
                    report(one)
                    answers[deployments] = deployment.observer.count
                    if kills_engine(kind) or any(
                        what.startswith(("hangs: a fresh", "hangs: after")) for what in one.violations
                    ):
                        break  # the next round needs a deployment that works
    totals: dict[str, object] = {"faults": len(done)}
    for kind in VIOLATIONS:
        totals[kind] = sum(what.startswith(kind) for one in done for what in one.violations)
    totals["max_overrun_s"] = max((one.overrun_s for one in done), default=0.0)
    totals["deployments"] = deployments
    totals["answers_checked"] = sum(answers.values())
    totals["seconds"] = round(time.monotonic() - started)
    table = described({"totals": totals, "rounds": [dataclasses.asdict(one) for one in done]})
    (options.out or RESULTS).write_text(json.dumps(table, indent=1) + "\n")
    return totals


def report(one: Outcome) -> None:
    moment = f"{one.phase}, {'during' if one.during else 'before'} it" if one.phase != "all" else "all of it"
    moment += f", slept at level {one.slept}" if one.slept else ""
    print(
        f"{one.fault:14s} {moment:22s} {one.outcome[:60]:60s} on {one.version}, serves after {one.serves_again_s:5.2f} s, "
        f"overrun {one.overrun_s:5.2f} s: {'; '.join(one.violations) or 'ok'}",
        flush=True,
    )
