"""Rounds on a real vLLM: two nodes (network namespaces), an engine on each, a trainer process, and a fault in mid-update.

A round starts an update, lets the fault strike before or during one of its phases, ends the fault, and looks: do all
engines that are left answer, serve one version, and generate that version's tokens (as Hugging Face does)? Does a fresh
update by another trainer work? Is anything left behind? Rounds share a deployment until one kills an engine.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from areal_vllm_ext import AsyncEngineGroup, protocol
from areal_vllm_ext.control.link import Link
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment, Node
from areal_vllm_ext.demo.model import greedy_tokens, make_model
from areal_vllm_ext.errors import ArealError
from areal_vllm_ext.protocol import EngineInfo, Status, security
from harness.report import described

from .bad_wire import BadNamespaces
from .fault_trainer import Weights

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "faults.json"
PROMPTS = ([10, 20, 30], [5, 6, 7, 8, 9], [100, 3, 50, 7])
TOKENS = 16
PHASES = ("begin", "receiving", "prepare", "pause", "commit", "resume")
LEASE_SECONDS = 10.0
# A deployment of which nothing is left by then has ended in order.
ENDED_SECONDS = 30.0
SERVES_AGAIN_SECONDS = LEASE_SECONDS + 5.0
DEADLINE = 20.0
STOP_SECONDS = 12.0
OVERRUN_SECONDS = 1.0
# Four connections of earlier trainers are kept by each worker; more than this is a leak.
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
VIOLATIONS = ("mixed_versions", "hangs", "wrong_tokens", "leftovers", "overruns", "untrue_outcomes")


@dataclasses.dataclass
class Outcome:
    """What a round came to, as one line of the table."""

    fault: str
    phase: str
    during: bool
    outcome: str = ""
    version: object = None
    serves_again_s: float = 0.0
    overrun_s: float = 0.0
    violations: list[str] = dataclasses.field(default_factory=list)

    def violated(self, kind: str, what: str) -> None:
        self.violations.append(f"{kind}: {what}")


class TrainerProcess:
    """A trainer in the head's namespace."""

    def __init__(self, prefix: list[str], directory: str, key_file: str, model_dir: Path) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "chaos.fault_trainer", directory, key_file, str(model_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.hear(60.0)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put({})  # it has ended

    def say(self, **what: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def hear(self, timeout: float) -> dict[str, Any] | None:
        """The next line; empty where the process has ended, None where nothing came in time."""
        try:
            return self._lines.get(timeout=timeout)
        except queue.Empty:
            return None

    def hear_end(self, timeout: float) -> dict[str, Any] | None:
        """The line that ends the update."""
        ends = time.monotonic() + timeout
        while (line := self.hear(max(ends - time.monotonic(), 0.0))) is not None:
            if "phase" not in line:
                return line
        return None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Ground:
    """A deployment of two nodes, the oracle, and the trainers."""

    def __init__(self, folder: Path, namespaces: BadNamespaces, key_file: str, moe: bool) -> None:
        self.model_dir = folder / "model"
        make_model(self.model_dir, moe=moe)
        self.weights = Weights(str(self.model_dir))
        self.namespaces = namespaces
        self.key_file = key_file
        self.version = 0
        self.trainers: list[TrainerProcess] = []  # the one whose update is struck, and the one that comes after it
        self._expected: dict[int, list[list[int]]] = {}
        nodes = [
            Node(
                address=namespaces.addresses[node],
                prefix=namespaces.prefix(node),
                env={"AREAL_VLLM_KEY_FILE": key_file, "GLOO_SOCKET_IFNAME": namespaces.links[node]},
            )
            for node in ("a", "b")
        ]
        self.deployment = Deployment(self.model_dir, nodes, log_dir=folder / "logs")

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """The deployment serves meanwhile, and is on a version that a trainer has sent."""
        with self.deployment:
            self.deployment.wait(timeout=400, report=lambda _: None)
            try:
                self.engines = asyncio.run(self._discover())
                while len(self.trainers) < 2:
                    self.trainers.append(self._start_trainer())
                for _ in range(2):
                    end = self.fresh_update()
                    assert end["outcome"] == "committed", end
                self.descriptors = {pid: descriptors(pid) for pid in self.pids()}
                self.processes = self.namespaces_pids()
                yield
            finally:
                for trainer in self.trainers:
                    trainer.close()

    async def _discover(self) -> list[EngineInfo]:
        async with AsyncEngineGroup.connect(self.deployment.directory, key_file=self.key_file) as group:
            return await group.wait_ready(engines=2, timeout=60)

    def pids(self) -> list[int]:
        """The engines and their workers."""
        return [pid for engine in self.engines for pid in (engine.pid, *(worker.pid for worker in engine.workers))]

    def last_words(self) -> str:
        """The ends of the engines' logs."""
        return "\n".join(f"--- {one.name}\n{one.process.last_lines(60)}" for one in self.deployment.processes)

    def ended(self, timeout: float) -> bool:
        """Wait until no engine and no worker is left; False where one still is."""
        ends = time.monotonic() + timeout
        while (left := any(Path(f"/proc/{pid}").exists() for pid in self.pids())) and time.monotonic() < ends:
            time.sleep(0.1)
        return not left

    def namespaces_pids(self) -> set[int]:
        """All processes in the namespaces, without this one's trainer."""
        found: set[int] = set()
        for name in self.namespaces.names.values():
            with subprocess.Popen(["ip", "netns", "pids", name], stdout=subprocess.PIPE, text=True) as asking:
                assert asking.stdout is not None
                found |= {int(pid) for pid in asking.stdout.read().split()} - {asking.pid}
        return found - {os.getpid(), *(trainer.process.pid for trainer in self.trainers)}

    # What engines say

    def statuses(self, engines: list[EngineInfo], timeout: float) -> dict[int, Status | None]:
        """What each engine says, by DP rank; None where it does not answer."""

        async def ask() -> dict[int, Status | None]:
            link = Link(lambda host: security.key_for(host, self.key_file), 1 << 20)
            try:
                asked = {str(engine.dp_rank): (engine.address, protocol.GetStatus()) for engine in engines}
                found = await link.request_all(asked, timeout)
                return {int(rank): answer if isinstance(answer, Status) else None for rank, answer in found.items()}
            finally:
                await link.close()

        return asyncio.run(ask())

    def wait_serving(self, engines: list[EngineInfo], ends: float) -> tuple[dict[int, Status | None], str]:
        """Wait until all of ``engines`` run on one version; returns what they said last, and the problem."""
        while True:
            statuses = self.statuses(engines, timeout=1.0)
            problem = problem_of(statuses)
            if not problem or problem.startswith("mixed") or time.monotonic() > ends:
                return statuses, problem
            time.sleep(0.1)

    def wrong_tokens(self, statuses: dict[int, Status | None]) -> str:
        """Which engine's tokens are not those of the version that it claims; empty where all are right."""
        completions = Completions(self.deployment.url, timeout=30)
        for rank, status in statuses.items():
            if status is None or status.generation != "running":
                continue
            claimed = status.version if isinstance(status.version, int) else 0
            if claimed not in self._expected:
                self._expected[claimed] = greedy_tokens(self.weights.set(claimed), PROMPTS, TOKENS)
            try:
                tokens = completions.greedy(PROMPTS, tokens=TOKENS, engine=rank)
            except ArealError as error:
                return f"DP rank {rank} does not generate: {error}"
            if tokens != self._expected[claimed]:
                return f"DP rank {rank} does not generate the tokens of version {claimed}"
        return ""

    # Trainers

    def _start_trainer(self) -> TrainerProcess:
        return TrainerProcess(self.namespaces.prefix("a"), self.deployment.directory, self.key_file, self.model_dir)

    def replace_trainer(self) -> None:
        """The first was killed: the second takes its place."""
        self.trainers.pop(0)
        self.trainers.append(self._start_trainer())

    def fresh_update(self) -> dict[str, Any]:
        """An update by the second trainer, without faults."""
        self.version += 1
        trainer = self.trainers[1]
        trainer.say(version=self.version, deadline=60.0, stop_at="")
        return trainer.hear_end(70.0) or {"outcome": "hangs", "seconds": 70.0}


def problem_of(statuses: dict[int, Status | None]) -> str:
    """Why the engines do not all serve one version; empty where they do."""
    if silent := [rank for rank, status in statuses.items() if status is None]:
        return f"DP ranks {silent} do not answer"
    answers = [status for status in statuses.values() if status]
    if len(versions := {status.version for status in answers if status.generation == "running"}) > 1:
        return f"mixed: {versions}"
    if any(status.generation != "running" for status in answers):
        return f"not running: {[(status.engine.dp_rank, status.update_phase, status.generation) for status in answers]}"
    return ""


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208, half as slow


class Round:
    """One fault."""

    def __init__(self, ground: Ground, kind: str, phase: str, dice: random.Random) -> None:
        self.ground = ground
        self.kind = kind
        self.dice = dice
        self.outcome = Outcome(kind, phase, during=dice.random() < 0.5)
        head, headless = ground.engines
        self.deed, _, victim = kind.partition(" ")
        self.trainer = ground.trainers[0]
        ground.version += 1
        self.version = ground.version
        # Whether another trainer updates while this one is stopped.
        self.rival = kind == "stop trainer" and dice.random() < 0.5
        self.left = ground.engines
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
            self.ground.namespaces.set_link("b", "down")
        else:
            self.ground.namespaces.set_quality(**QUALITY[self.kind])

    def heal(self) -> None:
        """End the fault, after a while."""
        if self.deed == "stop":
            ends = time.monotonic() + STOP_SECONDS
            if self.rival:  # it waits for the sleeper's lease to run out
                self.ground.fresh_update()
            time.sleep(max(ends - time.monotonic(), 0.0))
            os.kill(self.pid, signal.SIGCONT)
        elif self.deed == "link":
            time.sleep(self.dice.uniform(0.5, STOP_SECONDS))
            self.ground.namespaces.set_link("b", "up")
        elif self.kind in QUALITY:
            self.ground.namespaces.set_quality()

    def run(self) -> Outcome:
        outcome = self.outcome
        end = self.update_under_fault()
        healed = time.monotonic()
        if end is None:
            end = self.trainer.hear_end(DEADLINE + 45.0)
        outcome.outcome = end["outcome"] if end else "hangs"
        if end is None:
            outcome.violated("hangs", f"the trainer's update does not end in {DEADLINE + 45:.0f} s")
        elif "trainer" not in self.kind:  # a process that was stopped keeps no deadline
            outcome.overrun_s = round(max(end["seconds"] - DEADLINE, 0.0), 2)
            if outcome.overrun_s > OVERRUN_SECONDS:
                outcome.violated("overruns", f"took {end['seconds']:.1f} s of {DEADLINE:.0f} s")
        self.look(healed)
        if self.kind == "kill trainer":
            self.ground.replace_trainer()
        return outcome

    def update_under_fault(self) -> dict[str, Any] | None:
        """Update, strike, heal; returns the update's end where it is known by then."""
        trainer, phase = self.trainer, self.outcome.phase
        if self.kind in QUALITY:
            self.strike()
        trainer.say(version=self.version, deadline=DEADLINE, stop_at=phase)
        if self.kind in QUALITY:
            end = trainer.hear_end(DEADLINE + 45.0)
            self.heal()
            return end
        while (line := trainer.hear(DEADLINE)) and line.get("phase") != phase:
            if "outcome" in line:
                return line
        if self.outcome.during:
            trainer.say(go=True)
            time.sleep(self.dice.uniform(0.0, 0.02))
        self.strike()
        if not self.outcome.during:
            trainer.say(go=True)
        self.heal()
        if self.kind != "kill trainer":
            return None
        trainer.close()
        return {"outcome": "killed", "seconds": 0.0}

    def look(self, healed: float) -> None:
        """What is left of the engines, before anybody else comes."""
        ground, outcome = self.ground, self.outcome
        ends = max(healed + SERVES_AGAIN_SECONDS, time.monotonic() + 1.0)
        statuses, problem = ground.wait_serving(self.left, ends)
        outcome.serves_again_s = round(time.monotonic() - healed, 2)
        versions = {status.version for status in statuses.values() if status}
        outcome.version = sorted(map(str, versions))
        if outcome.outcome == "committed" and not self.rival and self.version not in versions:
            outcome.violated("untrue_outcomes", f"committed, but engines are on {outcome.version}")
        if outcome.outcome.startswith("aborted") and self.version in versions:
            outcome.violated("untrue_outcomes", f"aborted, but engines are on {outcome.version}")
        wrong = ground.wrong_tokens(statuses) if self.left[0].dp_rank == 0 and not problem else ""
        # An EngineCore whose worker is gone says so, and vLLM's front end then ends itself and every engine.
        if self.kind == "kill worker" and (problem or wrong) and ground.ended(ENDED_SECONDS):
            outcome.outcome += "; vLLM ended the deployment"
            return
        if problem:
            outcome.violated("mixed_versions" if problem.startswith("mixed") else "hangs", problem)
        if wrong:
            outcome.violated("wrong_tokens", wrong)
        if not kills_engine(self.kind):
            self.check_all_there()

    def check_all_there(self) -> None:
        """The engines are all there: a fresh update works, with right tokens after it, and nothing is left."""
        ground, outcome = self.ground, self.outcome
        fresh = ground.fresh_update()
        if fresh["outcome"] != "committed" or fresh.get("lost"):
            outcome.violated("hangs", f"a fresh update: {fresh}")
        statuses, problem = ground.wait_serving(ground.engines, time.monotonic() + 5.0)
        if problem:
            outcome.violated("hangs", f"after a fresh update: {problem}")
        if wrong := ground.wrong_tokens(statuses):
            outcome.violated("wrong_tokens", f"after a fresh update: {wrong}")
        if files := list(Path("/dev/shm").glob("areal-*")):  # noqa: S108, that is where shared memory is
            outcome.violated("leftovers", f"{files}")
        if pids := ground.namespaces_pids() - ground.processes:
            outcome.violated("leftovers", f"processes {pids}")
        for pid, baseline in ground.descriptors.items():
            if not Path(f"/proc/{pid}").exists():
                outcome.violated("hangs", f"process {pid} has ended\n{ground.last_words()}")
            elif (now := descriptors(pid)) > baseline + DESCRIPTORS:
                outcome.violated("leftovers", f"process {pid} has {now} descriptors, {baseline} before")


def choose(options: argparse.Namespace, dice: random.Random) -> list[tuple[str, str]]:
    """Faults and phases: every kind in turn, each with all its phases in some order; what kills engines comes last."""
    kinds = [kind for kind in KINDS if options.only in kind]
    phases = {kind: collections.deque(dice.sample(PHASES, len(PHASES))) for kind in kinds}
    chosen = []
    for index in range(options.rounds):
        kind = kinds[index % len(kinds)]
        phases[kind].rotate()
        chosen.append((kind, "all" if kind in QUALITY else phases[kind][0]))
    return sorted(chosen, key=lambda one: (kills_engine(one[0]), KINDS.index(one[0])))


def kills_engine(kind: str) -> bool:
    return kind.startswith("kill") and kind != "kill trainer"


def play(options: argparse.Namespace) -> dict[str, object]:
    """Play rounds, print a line each, write the table; returns the totals."""
    dice = random.Random(options.seed)
    waiting = collections.deque(choose(options, dice))
    done: list[Outcome] = []
    started = time.monotonic()
    deployments = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what it started
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-faults-")))
        namespaces = BadNamespaces()
        stack.callback(namespaces.remove)
        namespaces.make()
        key_file = str(folder / "cluster.key")
        security.write_key(key_file)
        stack.enter_context(namespaces.inside("a"))
        while waiting:
            deployments += 1
            ground = Ground(folder / str(deployments), namespaces, key_file, options.moe)
            with ground.up():
                while waiting:
                    kind, phase = waiting.popleft()
                    one = Round(ground, kind, phase, dice).run()
                    done.append(one)
                    report(one)
                    if kills_engine(kind) or any(
                        what.startswith(("hangs: a fresh", "hangs: after")) for what in one.violations
                    ):
                        break  # what comes next deserves a deployment in order
    totals: dict[str, object] = {"faults": len(done)}
    for kind in VIOLATIONS:
        totals[kind] = sum(what.startswith(kind) for one in done for what in one.violations)
    totals["max_overrun_s"] = max(one.overrun_s for one in done)
    totals["deployments"] = deployments
    totals["seconds"] = round(time.monotonic() - started)
    table = described({"totals": totals, "rounds": [dataclasses.asdict(one) for one in done]})
    (options.out or RESULTS).write_text(json.dumps(table, indent=1) + "\n")
    return totals


def report(one: Outcome) -> None:
    moment = f"{one.phase}, {'during' if one.during else 'before'} it" if one.phase != "all" else "all of it"
    print(
        f"{one.fault:14s} {moment:22s} {one.outcome[:60]:60s} on {one.version}, serves after {one.serves_again_s:5.2f} s, "
        f"overrun {one.overrun_s:5.2f} s: {'; '.join(one.violations) or 'ok'}",
        flush=True,
    )
