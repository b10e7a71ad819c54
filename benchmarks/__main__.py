"""Run the CPU benchmarks one after the other, into ``results/``: ``python -m benchmarks`` (``make bench``).

Arguments choose benchmarks by name: ``python -m benchmarks fanout update``. All of them take an hour on two cores, on
which nothing else may run.
"""

from __future__ import annotations

import subprocess
import sys

from harness.network import missing

from .plot import RESULTS

_WIRE = ["--transport", "shared_memory" if missing() else "broadcast"]
# By the name of its result, each benchmark's module and arguments.
RUNS = {
    "fanout": ["fanout", "--rounds", "40"],
    "update_cpu_300mb": ["update", "--size", "300mb", "--load", "1", "--keep-buffers", *_WIRE],
    "update_cpu_300mb_idle": ["update", "--size", "300mb", "--load", "0", "--keep-buffers", *_WIRE],
    "update_cpu_1000_tensors": ["update", "--size", "1000-tensors", "--load", "0", *_WIRE],
    "update_cpu_moe": ["update", "--size", "tiny-moe", "--load", "1", *_WIRE],
    "bubble_cpu": ["bubble", "--size", "tiny", "--load", "1", *_WIRE],
    "overhead_cpu": ["overhead", "--size", "tiny"],
}


def main() -> int:
    failed = []
    for name, (module, *arguments) in RUNS.items():
        if sys.argv[1:] and not any(word in name for word in sys.argv[1:]):
            continue
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--out", str(RESULTS / f"{name}.json")]
        print(f"--- {name}: {' '.join(command[1:])}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    subprocess.run([sys.executable, "-m", "benchmarks.plot"], check=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
