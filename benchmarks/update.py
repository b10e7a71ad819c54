"""Time updates of a real vLLM under load: ours, AReaL's way, vLLM's own, and the raw link as the lower bound.

    python -m benchmarks.update --device cpu --transport broadcast --size 300mb          # two network namespaces, gloo
    python -m benchmarks.update --device cuda --transport ipc --colocated --size qwen3-8b     # one GPU for both
    python -m benchmarks.update --device cuda --transport broadcast,ipc --size qwen3-8b       # a GPU each: NCCL, and a pull

The ways take turns on one server, each turn with new weights. After a way's first and last update every engine must serve
the trainer's weights: greedy tokens of Hugging Face in float32, log-probabilities in bf16. Quantized weights and experts in
bf16 are compared with what the engine answered when it had started from the same weights. A way that fails is reported
as wrong and compared with nothing. Times are medians without the first ``--warm-up`` updates of each way. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from areal_vllm_ext import EngineGroup
from harness.report import finish, save, table

from .link import Link
from .load import load
from .serving import Place, Server, serving
from .sizes import SIZES, TrainerModel
from .ways import Native, Ours, PerTensor, Timing, Way, Weights, join, raw_broadcast, raw_copy


class Contest:
    """The ways, and the result of each."""

    def __init__(self, server: Server, trainer: TrainerModel) -> None:
        self._server, self._trainer = server, trainer
        self._version = 0
        self.timings: dict[str, list[Timing]] = {}
        self.first: dict[str, Timing] = {}
        # By way of ours: how its first and its last update were loaded.
        self.loaded: dict[str, tuple[str, str]] = {}
        self.problems: dict[str, str] = {}
        # By way, a worker's peak memory above its memory before, in MiB: in all updates, and in the first ones with the proof.
        self.memory: dict[str, float] = {}
        self.first_memory: dict[str, float] = {}

    def turn(self, way: Way, *, counts: bool, check: bool) -> None:
        """Update once by ``way`` with new weights; a way that fails is left out from then on."""
        if way.name in self.problems:
            return
        self._version += 1
        self._trainer.set(self._version)
        weights = self._trainer.weights()
        try:
            before = self._server.rpc("baseline_memory")
            timing = way.update(self._version, weights)
            self.first.setdefault(way.name, timing)
            if check and isinstance(way, Ours):
                now = way.loaded()
                self.loaded[way.name] = (self.loaded.get(way.name, (now, now))[0], now)
            if before and before[0]:
                extra = max(int(after[1]) - int(then[0]) for then, after in zip(before, self._memory(), strict=True))
                peaks = self.memory if counts else self.first_memory
                peaks[way.name] = max(peaks.get(way.name, 0.0), round(extra / 2**20, 1))
            if check and (wrong := self._wrong(way)):
                self.problems[way.name] = f"wrong: {wrong}"
        except Exception as error:
            self.problems[way.name] = f"failed: {type(error).__name__}: {str(error)[:500]}"
            self._server.post("/resume")
        if problem := self.problems.get(way.name):
            print(f"{way.name}: {problem}", file=sys.stderr, flush=True)
        elif counts:
            self.timings.setdefault(way.name, []).append(timing)

    def _wrong(self, way: Way) -> str:
        """Return how the engines' output is wrong after an update by ``way``."""
        if not self._server.place.fresh:
            return self._server.wrong(self._trainer)
        if not self._server.unlike_start(self._trainer):
            return "the update changed nothing: the engine answers as when it was started"
        self._version += 1
        self._trainer.set(0)
        way.update(self._version, self._trainer.weights())
        return self._server.unlike_start(self._trainer)

    def _memory(self) -> list[Any]:
        return self._server.rpc("baseline_memory")

    def rows(self, raw: dict[str, list[float]]) -> list[dict[str, Any]]:
        """Return the table: one row for each way, raw links last; shares are relative to the first raw link."""
        limit = statistics.median(next(iter(raw.values())))
        rows: list[dict[str, Any]] = []
        for name in [*self.timings, *(name for name in self.problems if name not in self.timings)]:
            row: dict[str, Any] = {"way": name, "right": name not in self.problems}
            if timings := self.timings.get(name):
                row |= _row([timing.total_ms for timing in timings], self._trainer.nbytes, limit)
                row["pause_ms"] = round(statistics.median(timing.pause_ms for timing in timings), 2)
                row["all_pause_ms"] = [round(timing.pause_ms, 2) for timing in timings]
                commits = [timing.commit_ms for timing in timings if timing.commit_ms is not None]
                if name in self.loaded:
                    row["first_loaded"], row["loaded"] = self.loaded[name]
                row["first_total_ms"] = round(self.first[name].total_ms, 2)
                row["first_pause_ms"] = round(self.first[name].pause_ms, 2)
                row["commit_ms"] = round(statistics.median(commits), 2) if commits else None
                row["peak_mib"] = self.memory.get(name)
                row["first_peak_mib"] = self.first_memory.get(name)
                if phases := timings[0].phases:
                    row["phases_ms"] = {
                        phase: round(statistics.median(timing.phases.get(phase, 0.0) for timing in timings), 2)
                        for phase in phases
                    }
            if name in self.problems:
                row["problem"] = self.problems[name]
            rows.append(row)
        nbytes = self._trainer.nbytes
        return rows + [{"way": name, "right": True, **_row(times, nbytes, limit)} for name, times in raw.items()]


def _row(totals: list[float], nbytes: int, limit: float) -> dict[str, Any]:
    total = statistics.median(totals)
    return {
        "total_ms": round(total, 2),
        "gb_per_s": round(nbytes / total / 1e6, 3),
        "of_raw_link": round(limit / total, 3),
        "all_total_ms": [round(one, 2) for one in totals],
    }


def results(rows: list[dict[str, Any]], trainer: TrainerModel, options: argparse.Namespace) -> dict[str, Any]:
    """Return the results as JSON."""
    facts = {"bytes": trainer.nbytes, "tensors": trainer.tensors, "dtype": str(options.dtype), "load": options.load}
    return {**facts, "rows": rows, "compared": compared(rows)}


def compared(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return how many times faster ours is than each other right way, in total and in its pause."""
    by_name = {row["way"]: row for row in rows if row["right"] and "pause_ms" in row}
    if (ours := next((row for name, row in by_name.items() if name.startswith("ours")), None)) is None:
        return {}
    return {
        f"{what}, {name} / ours": round(row[f"{what}_ms"] / ours[f"{what}_ms"], 2)
        for name, row in by_name.items()
        if not name.startswith("ours")
        for what in ("total", "pause")
    }


def contest(server: Server, trainer: TrainerModel, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let the ways take turns."""
    rounds, warm_up = options.rounds, options.warm_up
    with contextlib.ExitStack() as stack:
        groups = connected(server, stack, options)
        link = join(server)
        weights = trainer.weights()
        raw = {f"raw {name}": raw_link(name, server, trainer, link, options) for name in options.transport}
        ways, native = ways_of(server, groups, link, weights, options)
        running = Contest(server, trainer)
        # These ways take all their turns in a row: only one of vLLM's transfers can be open at a time, and buffers are kept
        # only for the next update of the same way.
        apart: list[Way] = [*(kept_ways(groups, options) if options.keep_buffers else []), *native]
        sittings: list[list[Way]] = [ways, *([way] for way in apart)]
        busy = load(server.url, server.model, options.engines, options.load, options.tokens)
        with busy:
            for together in sittings:
                opened = next((way for way in together if isinstance(way, Native)), None)
                if opened is not None:
                    try:
                        opened.open(weights)
                    except Exception as error:
                        running.problems[opened.name] = f"failed: {type(error).__name__}: {str(error)[:500]}"
                        continue
                for number in range(warm_up + rounds):
                    for way in together:
                        running.turn(way, counts=number >= warm_up, check=number in {0, warm_up + rounds - 1})
                if opened is not None:
                    opened.close()
                # Save now, because a later way may hang.
                save(results(running.rows(raw), trainer, options), options.out)
        # A last update of ours, without load: it must be right whatever the other ways did to the model.
        ours = (kept_ways(groups, options) if options.keep_buffers else ways)[0]
        assert isinstance(ours, Ours)
        for _ in range(2):
            running.turn(ours, counts=False, check=False)
        ours.trace = options.trace
        running.turn(ours, counts=False, check=True)
        return running.rows(raw)


def raw_link(
    transport: str, server: Server, trainer: TrainerModel, link: Link | None, options: argparse.Namespace
) -> list[float]:
    """Send the same bytes by the bare transport."""
    if transport == "broadcast":
        assert link is not None
        return raw_broadcast(server, link, trainer.nbytes, options.rounds + 1)[1:]
    apart = int(not server.place.colocated)
    target = torch.device("cuda", apart) if transport == "ipc" else torch.device("cpu")
    return raw_copy(trainer.weights(), target, options.rounds)


def connected(server: Server, stack: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, EngineGroup]:
    """Connect a client for each transport, because one client would reconnect whenever the transport changes."""
    groups = {transport: stack.enter_context(server.connect()) for transport in options.transport}
    for group in groups.values():
        group.wait_ready(engines=options.engines, timeout=60)
    return groups


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of our updates."""
    settings = {"staging": options.staging, "kv": options.kv, "timeout": 300}
    return settings | ({"bucket_mib": options.bucket_mib} if options.bucket_mib else {})


def kept_ways(groups: dict[str, EngineGroup], options: argparse.Namespace) -> list[Way]:
    """Return our ways whose workers keep their staging from one update to the next."""
    settings = settings_of(options) | {"keep_buffers": True}
    return [
        Ours(group, f"ours, {transport}, buffers kept", transport=transport, **settings)
        for transport, group in groups.items()
    ]


def ways_of(
    server: Server, groups: dict[str, EngineGroup], link: Link | None, weights: Weights, options: argparse.Namespace
) -> tuple[list[Way], list[Native]]:
    """Return the ways that can take turns, ours first, and vLLM's ways, of which one can be open at a time."""
    settings = settings_of(options)
    # On CPU, single tensors cannot be loaded into a live model, because its parameters are packed and gone.
    forms = (True,) if options.device == "cpu" else (False, True)
    ways: list[Way] = [
        Ours(group, f"ours, {transport}", transport=transport, **settings) for transport, group in groups.items()
    ]
    if link is not None:
        ways += [PerTensor(server, link, layerwise=form) for form in forms]
    packings = (False, True) if options.native else ()
    return ways, [Native(server, options.native, packed=packed, weights=weights) for packed in packings]


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Place]:
    """Parse the command line, with the options that all benchmarks of updates share."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--transport", type=lambda text: text.split(","), default=["broadcast"], help="broadcast, ipc, shared_memory"
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--dtype", help="default: float32 on CPU, bfloat16 on GPUs")
    parser.add_argument("--engines", type=int, default=1, help="data-parallel engines")
    parser.add_argument("--tp", type=int, default=1, help="workers of each engine")
    parser.add_argument("--colocated", action="store_true", help="CUDA: engines on the trainer's GPU too")
    parser.add_argument("--load", type=int, default=4, help="requests at a time on each engine")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of each request")
    parser.add_argument("--staging", default="auto")
    parser.add_argument(
        "--kv", default="recompute", help="keep: frozen requests keep their keys and values, as in the other ways"
    )
    parser.add_argument("--bucket-mib", type=int, default=0, help="default: the package's")
    parser.add_argument("--keep-buffers", action="store_true", help="ours also with keep_buffers")
    parser.add_argument("--quantization", help="how the engines quantize, for example fp8")
    parser.add_argument("--eager", action="store_true", help="CUDA: engines without CUDA graphs")
    parser.add_argument(
        "--fresh-oracle",
        action="store_true",
        help="compare with the engine's own output at its start; always so where Hugging Face's is no oracle",
    )
    parser.add_argument("--no-native", action="store_true", help="leave vLLM's own transfer out")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--logs", type=Path, help="keep the engines' logs here")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    cuda = options.device == "cuda"
    # vLLM's own transfers need GPUs.
    options.native = "" if options.no_native or not cuda else "ipc" if options.colocated else "nccl"
    place = Place(
        options.device,
        two_nodes=not cuda and "shared_memory" not in options.transport,
        colocated=cuda and options.colocated,
        engines=options.engines,
        tp=options.tp,
        quantization=options.quantization,
        eager=options.eager,
        # In bf16, a rounding decides which expert a token is given to.
        fresh=options.fresh_oracle
        or bool(options.quantization or ("experts" in SIZES[options.size] and options.dtype != torch.float32)),
    )
    return options, place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument(
        "--trace",
        type=Path,
        help="write the trace of one more update of ours, without load",
    )
    options, place = parsed(parser)
    trainer = TrainerModel(options.size, options.dtype, place.trainer_device)
    print(f"{options.size}: {trainer.tensors} tensors, {trainer.nbytes / 1e6:.1f} MB", flush=True)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(trainer, place, options.logs, native=options.native))
        rows = contest(server, trainer, options)
    columns = [
        "way",
        "right",
        "total_ms",
        "pause_ms",
        "loaded",
        "first_pause_ms",
        "commit_ms",
        "gb_per_s",
        "of_raw_link",
        "peak_mib",
        "first_peak_mib",
    ]
    print(table(rows, columns))
    for row in rows:
        if "phases_ms" in row:
            print(f"{row['way']}, medians: {', '.join(f'{phase} {ms} ms' for phase, ms in row['phases_ms'].items())}")
    finish(results(rows, trainer, options), options.out)
    return 0 if all(row["right"] for row in rows if row["way"].startswith("ours")) else 1


if __name__ == "__main__":
    sys.exit(main())
