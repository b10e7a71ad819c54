"""Faults in the middle of updates: what breaks?

    python -m chaos --simulated --rounds 10000 [--engines 3] [--seed 0]   # in memory: simulated_faults.py
    python -m chaos --swarm --rounds 10000 [--jobs 2]                     # in memory, faults at random: swarm.py
    python -m chaos --rounds 60 [--moe] [--only "kill trainer"]            # a real vLLM: real_faults.py

The last line is JSON. Exits with 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from harness.report import described


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults in the middle of updates.")
    parser.add_argument(
        "--simulated", action="store_true", help="in memory, with simulated time: one update, one fault"
    )
    parser.add_argument(
        "--swarm", action="store_true", help="in memory: many updates, with faults and rates of the seed"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes for the simulation; 0: one for each core (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more rounds after this time")
    parser.add_argument(
        "--update",
        choices=("weights", "adapter", "draft", "asleep"),
        default="weights",
        help="a real vLLM: what updates are, or when they come: while the engines sleep (default: %(default)s)",
    )
    parser.add_argument("--moe", action="store_true", help="a MoE model in the real vLLM")
    parser.add_argument("--engines", type=int, default=0, help="of the simulation (default: 3; of a swarm 2 to 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each round has the next")
    parser.add_argument("--only", default="", help="only faults with this in their name")
    parser.add_argument("--phase", default="", help="a real vLLM: only faults in phases with this in their name")
    parser.add_argument("--ignore", action="append", default=[], help='a kind of violation, such as "overrun"')
    parser.add_argument("--first", action="store_true", help="end at the first violation")
    parser.add_argument("--trace", action="store_true", help="tell every message of the simulation")
    parser.add_argument("--out", type=Path, help="write the totals here (a real vLLM: the table of rounds)")
    options = parser.parse_args()

    in_memory = options.simulated or options.swarm
    if in_memory:
        from .simulate import simulate as play
    else:
        from .real_faults import play
    totals = play(options)
    if in_memory and options.out:
        options.out.write_text(json.dumps(described({"totals": totals}), indent=1) + "\n")
    print(json.dumps(totals))
    kinds = (
        "mixed_versions",
        "hangs",
        "wrong_tokens",
        "leftovers",
        "overruns",
        "untrue_outcomes",
        "broken_rules",
        "wrong_histories",
    )
    return int(any(totals.get(kind) for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
