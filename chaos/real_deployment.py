"""The deployment of the fault rounds: a real vLLM on two nodes, its trainers, and the oracle."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from areal_vllm_ext import AsyncEngineGroup, protocol
from areal_vllm_ext.control.link import Link
from areal_vllm_ext.demo.completions import Completions
from areal_vllm_ext.demo.deployment import Deployment, Node, gpu_count
from areal_vllm_ext.demo.model import make_model
from areal_vllm_ext.errors import ArealError
from areal_vllm_ext.protocol import EngineInfo, Status, security
from harness import cpu_sleep

from . import drafters
from .bad_wire import BadNamespaces
from .fault_trainer import ADAPTER, weights_of
from .real_history import TIE_16_BITS, TIE_ON_GPU, Observer, continues

ROOT = Path(__file__).parent.parent
PROMPTS = ([10, 20, 30], [5, 6, 7, 8, 9], [100, 3, 50, 7])
TOKENS = 16
# Two versions in a batch, and CPU experts without LoRA.
LORA = (
    "--enable-lora",
    "--max-lora-rank",
    "8",
    "--max-loras",
    "2",
    "--lora-target-modules",
    "q_proj",
    "v_proj",
    "o_proj",
)


class TrainerProcess:
    """A trainer process in the head's namespace."""

    def __init__(self, prefix: list[str], directory: str, key_file: str, model_dir: Path, update: str) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "chaos.fault_trainer", directory, key_file, str(model_dir), update],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.read(60.0)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put({})  # the process has ended

    def send(self, **what: object) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def read(self, timeout: float) -> dict[str, Any] | None:
        """Return the next line; empty after the end of the process, None after ``timeout``."""
        try:
            return self._lines.get(timeout=timeout)
        except queue.Empty:
            return None

    def await_end(self, timeout: float) -> dict[str, Any] | None:
        """Return the line that ends the update, or None after ``timeout``."""
        ends = time.monotonic() + timeout
        while (line := self.read(max(ends - time.monotonic(), 0.0))) is not None:
            if "phase" not in line:
                return line
        return None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class RealDeployment:
    """A deployment of two nodes, two trainers, and the oracle.

    Attributes:
        moe: whether the model is a mixture of experts, whose engines compute together.
        update: what updates are, or when they come, as ``--update`` names it.
        trainers: the trainer whose update meets the fault, and the trainer that updates afterwards.
        tie: by how much the logits of two tokens may differ from the oracle's.
        observer: asks the engines all the time, and knows every update.
    """

    observer: Observer

    def __init__(
        self,
        folder: Path,
        namespaces: BadNamespaces,
        key_file: str,
        *,
        moe: bool = False,
        update: str = "weights",
    ) -> None:
        self.model_dir = folder / "model"
        self.moe = moe
        on_gpu = gpu_count() > 0
        # vLLM's kernels for adapters on GPUs take 16 bits only.
        self._in_16_bits = on_gpu and update == "adapter"
        self.tie = TIE_16_BITS if self._in_16_bits else TIE_ON_GPU if on_gpu else 0.0
        make_model(self.model_dir, moe=moe)
        self.update = update
        self.adapter = ADAPTER if update == "adapter" else ""
        self.weights = weights_of(update, self.model_dir)
        self.namespaces = namespaces
        self.key_file = key_file
        self.version = 0
        self.trainers: list[TrainerProcess] = []
        nodes = [
            Node(
                address=namespaces.addresses[node],
                prefix=namespaces.prefix(node),
                env={"AREAL_VLLM_KEY_FILE": key_file, "GLOO_SOCKET_IFNAME": namespaces.links[node]},
            )
            for node in ("a", "b")
        ]
        self.deployment = Deployment(
            self.model_dir,
            nodes,
            log_dir=folder / "logs",
            vllm_args=["--enable-scale-out", *self._arguments(folder, moe=moe)],
            env=cpu_sleep.environment(folder / "plugin") if update == "asleep" and not on_gpu else {},
        )

    def _arguments(self, folder: Path, *, moe: bool) -> Sequence[str]:
        """Return vLLM's arguments for this kind of update."""
        if self.update == "asleep":
            return cpu_sleep.ARGUMENTS
        if self.update == "adapter":
            return (*LORA, "--dtype", "bfloat16") if self._in_16_bits else LORA
        if self.update == "draft":
            make_model(folder / "drafter", moe=moe)
            return drafters.arguments(folder / "drafter")
        return ()

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Run the deployment inside this context, with weights that a trainer has sent."""
        with self.deployment:
            self.deployment.wait(timeout=400, report=lambda _: None)
            try:
                self.engines = asyncio.run(self._discover())
                ranks = [engine.dp_rank for engine in self.engines]
                self.observer = Observer(self.deployment.url, ranks, self.weights, self.adapter, self.tie)
                while len(self.trainers) < 2:
                    self.trainers.append(self._start_trainer())
                for _ in range(2):
                    end = self.fresh_update()
                    assert end["outcome"] == "committed", end
                self.descriptors = {pid: descriptors(pid) for pid in self.pids()}
                self.processes = self.namespaces_pids()
                with self.observer:
                    yield
            finally:
                for trainer in self.trainers:
                    trainer.close()

    async def _discover(self) -> list[EngineInfo]:
        async with AsyncEngineGroup.connect(self.deployment.directory, key_file=self.key_file) as group:
            return await group.wait_ready(engines=2, timeout=60)

    def pids(self) -> list[int]:
        """Return the process ids of the engines and their workers."""
        return [pid for engine in self.engines for pid in (engine.pid, *(worker.pid for worker in engine.workers))]

    def log_ends(self) -> str:
        """Return the last lines of the engines' logs."""
        return "\n".join(f"--- {one.name}\n{one.process.last_lines(60)}" for one in self.deployment.processes)

    def ended(self, timeout: float) -> bool:
        """Wait until every engine and worker has ended; False after ``timeout``."""
        ends = time.monotonic() + timeout
        while (left := any(Path(f"/proc/{pid}").exists() for pid in self.pids())) and time.monotonic() < ends:
            time.sleep(0.1)
        return not left

    def namespaces_pids(self) -> set[int]:
        """Return all processes in the namespaces but this one and the trainers."""
        found: set[int] = set()
        for name in self.namespaces.names.values():
            with subprocess.Popen(["ip", "netns", "pids", name], stdout=subprocess.PIPE, text=True) as asking:
                assert asking.stdout is not None
                found |= {int(pid) for pid in asking.stdout.read().split()} - {asking.pid}
        return found - {os.getpid(), *(trainer.process.pid for trainer in self.trainers)}

    # Engines

    def statuses(self, engines: list[EngineInfo], timeout: float) -> dict[int, Status | None]:
        """Return each engine's status by DP rank; None if it does not answer."""

        async def ask() -> dict[int, Status | None]:
            link = Link(lambda host: security.key_for(host, self.key_file), 1 << 20)
            try:
                asked = {str(engine.dp_rank): (engine.address, protocol.GetStatus()) for engine in engines}
                found = await link.request_all(asked, timeout)
                return {int(rank): answer if isinstance(answer, Status) else None for rank, answer in found.items()}
            finally:
                link.close()

        return asyncio.run(ask())

    def wait_serving(
        self, engines: list[EngineInfo], ends: float, *, discarded: bool = False
    ) -> tuple[dict[int, Status | None], str]:
        """Wait until all ``engines`` run on one version; returns their statuses, and the problem if they do not.

        Args:
            engines: see above.
            ends: when to give up.
            discarded: whether they may also be tainted, all of them, because a sleep has discarded their weights.
        """
        while True:
            statuses = self.statuses(engines, timeout=1.0)
            problem = problem_of(statuses)
            if discarded and all(status and status.update_phase == "tainted" for status in statuses.values()):
                problem = ""
            if not problem or problem.startswith("mixed") or time.monotonic() > ends:
                return statuses, problem
            time.sleep(0.1)

    def wrong_tokens(self, statuses: dict[int, Status | None]) -> str:
        """Return which engine generates other tokens than its version's, or drafts others; empty if all are right."""
        completions = Completions(self.deployment.url, timeout=30, adapter=self.adapter)
        for rank, status in statuses.items():
            if status is None or status.generation != "running":
                continue
            claimed = status.version if isinstance(status.version, int) else 0
            model = self.weights.set(claimed)
            try:
                answers = completions.greedy(PROMPTS, tokens=TOKENS, engine=rank)
                if not all(continues(model, *one, self.tie) for one in zip(PROMPTS, answers, strict=True)):
                    return f"DP rank {rank} does not generate the tokens of version {claimed}"
                if problem := self._drafts_rejected(completions, rank):
                    return f"DP rank {rank} drafts with other weights than those of version {claimed}: {problem}"
            except (ArealError, OSError) as error:
                return f"DP rank {rank} does not generate: {error}"
        return ""

    def _drafts_rejected(self, completions: Completions, rank: int) -> str:
        """Return how few tokens of an engine's drafter are accepted; empty if all are, or there is none."""
        if self.update != "draft":
            return ""
        metrics = functools.partial(drafters.metrics_of, self.deployment.url)
        return drafters.rejected(metrics, lambda: completions.greedy(PROMPTS, tokens=TOKENS, engine=rank), rank)

    # Trainers

    def _start_trainer(self) -> TrainerProcess:
        prefix = self.namespaces.prefix("a")
        return TrainerProcess(prefix, self.deployment.directory, self.key_file, self.model_dir, self.update)

    def replace_trainer(self) -> None:
        """Replace the first trainer, which was killed unless its update ended before, by the second."""
        self.trainers.pop(0).close()
        self.trainers.append(self._start_trainer())

    def call(self, name: str, **options: object) -> dict[str, Any]:
        """Let the second trainer put the engines to sleep or wake them up; returns how that ended."""
        trainer = self.trainers[1]
        trainer.send(call=name, timeout=30.0, **options)
        return trainer.await_end(40.0) or {"outcome": "hangs", "seconds": 40.0}

    def fresh_update(self) -> dict[str, Any]:
        """Update with the second trainer, without faults; returns the end of the update."""
        self.version += 1
        version, trainer, started = self.version, self.trainers[1], time.monotonic()
        trainer.send(version=version, timeout=60.0, stop_at="")
        end = trainer.await_end(70.0) or {"outcome": "hangs", "seconds": 70.0}
        self.observer.wrote(version, started, time.monotonic(), end.get("outcome", ""))
        return end


def problem_of(statuses: dict[int, Status | None]) -> str:
    """Return why the engines do not all serve one version; empty if they do."""
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


def command_of(pid: int) -> str:
    """Return a process's id and command."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"{pid} (ended)"
    return f"{pid} {' '.join(words)[:200]}"
