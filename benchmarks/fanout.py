"""Measure how the time to command all engines grows with their number: the real client and real endpoints, without models.

    python -m benchmarks.fanout [--engines 1024] [--rounds 100] [--profile]

For 1, 4, 16, ... engines, up to ``--engines``: p50 and p99 of pause-all, of resume-all, and of a transaction without bytes
(begin, votes, pause, commit, resume). Endpoints, directory, client, CURVE and msgpack are real; each engine is simulated and
pauses at once. There is a process of endpoints for each core, and at most 64 endpoints share one. The client competes with
them for the cores, whereas in a cluster each engine has its own cores. Each pause takes CPU time: ``server_ms`` of all
endpoints, ``client_ms`` of the client, and ``loop_ms`` of the client's event loop. The rest of ``client_ms`` is ZeroMQ's
thread, with CURVE and the sockets. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - a trainer has imported it; else the first transaction would, for 2 s

from areal_vllm_ext import AsyncEngineGroup, UpdateAborted
from areal_vllm_ext.protocol import security
from harness.report import finish, spread, table

ENGINES = Path(__file__).parent.parent / "harness" / "simulated_engine.py"
COUNTS = (1, 4, 16, 64, 256, 1024)
WARM_UP = 3
DEADLINE = 20.0
# Endpoints of one process share one interpreter, so their number per process is bounded.
MOST_TOGETHER = 64


@contextlib.contextmanager
def deployed(count: int, key_file: Path) -> Iterator[tuple[str, list[int]]]:
    """Run ``count`` engines and their directory in processes; yields the directory's address and all process ids."""
    processes: list[subprocess.Popen[str]] = []

    def start(*command: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        processes.append(process)
        return process

    def first_line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise RuntimeError(f"a process of engines ended with {process.wait()}")
        return line.strip()

    keys = ["--key-file", str(key_file)]
    try:
        # The directory lives with the first engine, as it does in engine 0 of a real deployment.
        directory = first_line(start(str(ENGINES), *keys, "--dp-size", str(count)))
        rest, places = count - 1, max(min(os.cpu_count() or 1, count - 1), -(-(count - 1) // MOST_TOGETHER), 1)
        first, started = 1, []
        for place in range(places if rest else 0):
            engines = rest // places + (place < rest % places)
            ranks = ["--engines", str(engines), "--first-rank", str(first), "--dp-size", str(count)]
            started.append(start(str(ENGINES), *keys, *ranks, "--directory", directory))
            first += engines
        for process in started:
            first_line(process)
        yield directory, [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU seconds that these processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def measure(count: int, rounds: int, directory: str, key_file: Path, pids: list[int]) -> dict[str, Any]:
    """Time ``rounds`` calls of each kind on ``count`` engines, in milliseconds."""
    times: dict[str, list[float]] = {"pause": [], "resume": [], "transaction": []}
    async with AsyncEngineGroup.connect(directory, key_file=key_file) as group:
        await group.wait_ready(engines=count, timeout=120)

        async def timed(what: str, call: Any) -> None:
            started = time.perf_counter()
            await call
            times[what].append((time.perf_counter() - started) * 1e3)

        async def transaction(version: int) -> None:
            # No file is read: simulated workers vote for any path.
            async with group.update(version, timeout=DEADLINE) as update:
                await update.send("/nothing")

        async def idle_share() -> float:
            before, started = cpu_seconds(pids), time.perf_counter()
            await asyncio.sleep(2.0)
            return (cpu_seconds(pids) - before) / (time.perf_counter() - started)

        for _ in range(WARM_UP):
            await group.pause(timeout=DEADLINE)
            await group.resume(timeout=DEADLINE)
        idle = await idle_share()
        server, client, loop = cpu_seconds(pids), time.process_time(), time.thread_time()
        started = time.perf_counter()
        for _ in range(rounds):
            await timed("pause", group.pause(timeout=DEADLINE))
            await timed("resume", group.resume(timeout=DEADLINE))
        client, loop = time.process_time() - client, time.thread_time() - loop
        seconds = time.perf_counter() - started
        server = cpu_seconds(pids) - server - idle * seconds
        aborted, version = [], 0
        while version < rounds and len(aborted) <= rounds // 10:
            try:
                await timed("transaction", transaction(version + 1))
                version += 1
            except UpdateAborted as error:  # the machine is too slow for this many engines; none has committed
                aborted.append(str(error))
        states = await group.status(timeout=30)
        if {(state.version, state.generation) for state in states} != {(version, "running")} or len(states) != count:
            raise RuntimeError(f"not every engine runs on version {version}")
    return {
        "engines": count,
        "rounds": rounds,
        **{f"{what}_ms": spread(values) for what, values in times.items() if values},
        "aborted": aborted,
        # Of one call: a pause and a resume both discover, take the lease, fence all engines and command all of them.
        "client_ms": round(client / rounds / 2 * 1e3, 2),
        "loop_ms": round(loop / rounds / 2 * 1e3, 2),
        "server_ms": round(max(server, 0.0) / rounds / 2 * 1e3, 2),
        "idle_cores": round(idle, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=1024, help="largest number of engines")
    parser.add_argument("--only", action="store_true", help="leave the smaller numbers out")
    parser.add_argument("--rounds", type=int, default=100, help="a quarter of these for more than 64 engines")
    parser.add_argument("--profile", action="store_true", help="print where the client spends its time")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, most)
    )  # inherited by the endpoints' processes; an endpoint needs about 25
    counts = [options.engines] if options.only else [count for count in COUNTS if count <= options.engines]
    rows = []
    with tempfile.TemporaryDirectory(prefix="areal-fanout-") as folder:
        key_file = Path(folder) / "cluster.key"
        security.write_key(key_file)
        for count in counts:
            # Fewer rounds for many engines, which take minutes; p99 is then the slowest round.
            rounds = options.rounds if count <= 64 else max(options.rounds // 4, 5)
            with deployed(count, key_file) as (directory, pids):
                profile = cProfile.Profile()
                if options.profile:
                    profile.enable()
                rows.append(asyncio.run(measure(count, rounds, directory, key_file, pids)))
                if options.profile:
                    profile.disable()
                    pstats.Stats(profile).sort_stats("tottime").print_stats(30)
            print(f"{count} engines measured", flush=True)
    flat = [
        {"engines": row["engines"]}
        | {
            f"{what} {share}": row.get(f"{what}_ms", {}).get(share)
            for what in ("pause", "transaction")
            for share in ("p50", "p99")
        }
        | {name: row[name] for name in ("client_ms", "loop_ms", "server_ms", "idle_cores")}
        for row in rows
    ]
    print(table(flat, list(flat[0])))
    finish({"rows": rows}, options.out)


if __name__ == "__main__":
    main()
