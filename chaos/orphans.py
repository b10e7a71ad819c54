"""End a replica on Ray in every way, and count what outlives it.

    python -m chaos.orphans [--rounds 10] [--real 1] [--ways NAME ...] [--resume]        # as root

The Ray cluster is real and has two nodes, for a head and a headless engine. ``--real`` rounds of each way launch real vLLM.
The other rounds launch a process tree that is cheaper and harder to end: it ignores SIGTERM, and its grandchild has a session
of its own (``stubborn_server.py``). A round is clean when no process, port, shared memory or folder of the replica is left on
either node. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from areal_vllm_ext.demo.model import make_model
from harness.leftovers import Footprint
from harness.ray_cluster import ray_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from harness.ray_cluster import RayCluster

RESULTS = Path(__file__).parent / "results" / "orphans.json"
LIMIT_SECONDS = 15.0
GIVE_UP_SECONDS = 60.0
STUBBORN = Path(__file__).with_name("stubborn_server.py")
# A lock file, where other programs of this machine start vLLM too.
LOCK = os.environ.get("AREAL_BENCHMARK_LOCK")
OTHER_RAYLET = "raylet of the other node gets SIGKILL"
HEAD_RAYLET = "raylet of the driver's node, Ray's head, gets SIGKILL"


class Round:
    """A replica, launched by a driver process on node ``a``."""

    def __init__(self, cluster: RayCluster, model: str) -> None:
        """Launch.

        Args:
            cluster: the Ray cluster.
            model: a checkpoint for real vLLM; empty for the stubborn tree.
        """
        self.cluster = cluster
        command = [
            *cluster.namespaces.prefix("a"),
            sys.executable,
            "-m",
            "chaos.orphans_driver",
            cluster.address,
            model,
        ]
        self.log = cluster.folder / f"driver-{threading.get_ident()}.log"
        with self.log.open("w") as log:
            self.driver = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.driver.stdout is not None
        line = next((line for line in self.driver.stdout if line.startswith("{")), "")  # Ray prints there, too
        if not line:
            raise RuntimeError(f"nothing was launched:\n{self.log.read_text()[-3000:]}")
        self.facts: dict[str, Any] = json.loads(line)
        self.footprint = Footprint.of(self.facts["name"])

    def order(self, order: str) -> None:
        """Send an order to the driver."""
        assert self.driver.stdin is not None
        self.driver.stdin.write(f"{order}\n")
        self.driver.stdin.flush()

    def signal_launcher(self, number: int) -> None:
        """Signal the process of the headless node's launcher."""
        os.kill(self.facts["launchers"][1], number)

    def kill_raylet(self, node: str) -> None:
        os.kill(self.cluster.raylet(node), signal.SIGKILL)

    def seconds_to_clean(self) -> tuple[float, list[str]]:
        """Wait until nothing is left; returns the seconds, and what is left after ``GIVE_UP_SECONDS``."""
        started = time.monotonic()
        while left := self.footprint.left(self.cluster.namespaces):
            if time.monotonic() - started > GIVE_UP_SECONDS:
                return GIVE_UP_SECONDS, left
            time.sleep(0.1)
        return time.monotonic() - started, []

    def close(self) -> None:
        self.driver.kill()
        self.driver.communicate()


WAYS: dict[str, Callable[[Round], None]] = {
    "shutdown": lambda one: one.order("shutdown"),
    "handle dropped": lambda one: one.order("drop"),
    "launcher ended by __ray_shutdown__": lambda one: one.order("terminate headless"),
    "ray.kill of the owner": lambda one: one.order("kill owner"),
    "ray.kill of the head's launcher": lambda one: one.order("kill head"),
    "ray.kill of the headless launcher": lambda one: one.order("kill headless"),
    "driver gets SIGTERM": lambda one: one.driver.terminate(),
    "driver gets SIGKILL": lambda one: one.driver.kill(),
    "launcher gets SIGTERM": lambda one: one.signal_launcher(signal.SIGTERM),
    "launcher gets SIGKILL": lambda one: one.signal_launcher(signal.SIGKILL),
    OTHER_RAYLET: lambda one: one.kill_raylet("b"),
    HEAD_RAYLET: lambda one: one.kill_raylet("a"),
}


@contextlib.contextmanager
def one_at_a_time(real: bool) -> Iterator[None]:
    """Hold ``LOCK``, if it is set, while a real vLLM runs."""
    if not (real and LOCK):
        yield
        return
    with Path(LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(cluster: RayCluster, way: str, model: str) -> tuple[float, list[str]]:
    """Play one round; returns the seconds until all was gone, and what was left."""
    with one_at_a_time(bool(model)):
        one = Round(cluster, model)
        try:
            WAYS[way](one)
            seconds, left = one.seconds_to_clean()
        finally:
            one.close()
    if way == OTHER_RAYLET:
        cluster.restart("b")
        cluster.wait()
    return seconds, left


def write(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the results so far; returns their summary."""
    times = [time for seen in results.values() for kind in ("stubborn", "vllm") for time in seen[kind]]
    summary = {
        "rounds": len(times),
        "real_vllm_rounds": sum(len(seen["vllm"]) for seen in results.values()),
        "orphans": sum(time > LIMIT_SECONDS for time in times),
        "max_seconds_to_clean": max(times),
    }
    machine = {"ray": ray.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    record = {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        **machine,
        **summary,
        "ways": results,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=10, help="of each way (default: %(default)s)")
    parser.add_argument("--real", type=int, default=1, help="rounds of each way with real vLLM (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="play only the rounds that the results still lack")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at once (default: %(default)s)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS), metavar="NAME")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {way: {"stubborn": [], "vllm": [], "left": []} for way in options.ways}
    if options.resume:
        results |= json.loads(RESULTS.read_text())["ways"]
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", moe=False)

        def play(cluster: RayCluster, way: str) -> None:
            real = (
                len(results[way]["stubborn"]) >= options.rounds - options.real
            )  # last, because real rounds wait for LOCK
            seconds, left = run(cluster, way, f"{folder}/model" if real else "")
            results[way]["vllm" if real else "stubborn"].append(round(seconds, 2))
            results[way]["left"] += left
            write(results)
            kind = "vLLM" if real else "stubborn tree"
            print(f"{way:54} {kind:14} {seconds:5.1f} s  {'; '.join(left) or 'clean'}", flush=True)

        def missing(way: str) -> int:
            seen = results.get(way, {"stubborn": [], "vllm": []}) if way in options.ways else None
            return options.rounds - len(seen["stubborn"] + seen["vllm"]) if seen else 0

        with ray_cluster(devices=options.jobs, connect=False) as cluster:
            with ThreadPoolExecutor(options.jobs) as pool:
                played = [
                    pool.submit(play, cluster, way) for way in WAYS if "raylet" not in way for _ in range(missing(way))
                ]
                for one in played:
                    one.result()
            for _ in range(missing(OTHER_RAYLET)):  # alone, because it ends other rounds too
                play(cluster, OTHER_RAYLET)
        for _ in range(missing(HEAD_RAYLET)):  # each on a cluster of its own, because it ends the cluster
            with ray_cluster(connect=False) as cluster:
                play(cluster, HEAD_RAYLET)
    summary = write(results)
    print(json.dumps(summary))
    return 1 if summary["orphans"] else 0


if __name__ == "__main__":
    sys.exit(main())
