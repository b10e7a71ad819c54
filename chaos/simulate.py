"""Plays many simulated rounds, on several cores, and adds up what they broke and what they met."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gc
import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from .simulated_faults import KINDS, Round
from .simulation import Coverage, Violation, simulated_time
from .swarm import FAULTS, SwarmRound

CHUNK = 100
# What may break where something is not promised; see World.received.
EXCUSED = ("mixed versions", "history", "rule", "untrue outcome")


@dataclasses.dataclass
class Tally:
    """What rounds came to.

    Attributes:
        rounds, broken, recovery: by kind of round; the slowest recovery is in simulated seconds.
        violations: by kind of promise.
        found: by seed, the kind of round and what it broke.
        not_promised: violations that do not count, by what happened; ``excused`` has their seeds.
    """

    rounds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    broken: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    violations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    recovery: dict[str, float] = dataclasses.field(default_factory=dict)
    found: dict[int, tuple[str, str]] = dataclasses.field(default_factory=dict)
    not_promised: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    excused: list[int] = dataclasses.field(default_factory=list)
    coverage: Coverage = dataclasses.field(default_factory=Coverage)
    overrun: float = 0.0
    events: int = 0

    def add(self, other: Tally) -> None:
        """Add the rounds of another tally."""
        self.rounds.update(other.rounds)
        self.broken.update(other.broken)
        self.violations.update(other.violations)
        self.found |= other.found
        self.not_promised.update(other.not_promised)
        self.excused += other.excused
        self.coverage.update(other.coverage)
        self.overrun = max(self.overrun, other.overrun)
        self.events += other.events
        for kind, seconds in other.recovery.items():
            self.recovery[kind] = max(self.recovery.get(kind, 0.0), seconds)


def play(one: Round) -> Violation | None:
    """Play one round; returns what it broke."""
    try:
        one.run()
    except Violation as violation:
        return violation
    except Exception as error:  # the other rounds of a long run still count
        traceback.print_exc()
        return Violation("rule", f"the round raised {type(error).__name__}: {error}")
    finally:
        for process in (*one.world.trainers, *one.world.engines, one.world.directory):
            process.kill()
    return None


def round_of(options: argparse.Namespace, seed: int, coverage: Coverage | None = None) -> Round:
    """Return the round of a seed."""
    if options.swarm:
        return SwarmRound(seed, options.engines, options.trace, coverage)
    kinds = [kind for kind in KINDS if options.only in kind]
    return Round(kinds[seed % len(kinds)], seed, options.engines or 3, options.trace, coverage)


@functools.cache
def collect_seldom() -> None:
    """Collect garbage in this process only when asked, and never look at what it has imported.

    The rounds' worlds are cycles, so a collection for several rounds is cheaper. Once in a process, because freezing again
    would keep the worlds of the last rounds for ever.
    """
    gc.disable()
    gc.freeze()


def play_some(options: argparse.Namespace, seeds: range) -> Tally:
    """Play the rounds of some seeds."""
    tally = Tally()
    collect_seldom()
    with simulated_time():
        for number, seed in enumerate(seeds):
            if number % 20 == 0:
                gc.collect()
            one = round_of(options, seed, tally.coverage)
            violation = play(one)
            tally.rounds[one.kind] += 1
            tally.events += one.world.events
            tally.recovery[one.kind] = max(tally.recovery.get(one.kind, 0.0), one.recovery)
            if one.world.lines:
                print(*one.world.lines, sep="\n")
            if violation and one.world.not_promised and violation.kind in EXCUSED:
                tally.not_promised[one.world.not_promised] += 1
                tally.excused.append(seed)
            elif violation and violation.kind not in options.ignore:
                tally.violations[violation.kind] += 1
                tally.broken[one.kind] += 1
                tally.found[seed] = (one.kind, str(violation))
                if options.first:
                    break
            else:
                tally.overrun = max(tally.overrun, one.overrun)
    return tally


def _tallies(options: argparse.Namespace) -> Iterator[Tally]:
    seeds = range(options.seed, options.seed + options.rounds)
    chunks = [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
    jobs = options.jobs or len(os.sched_getaffinity(0))
    if jobs == 1:
        for chunk in chunks:
            yield play_some(options, chunk)
    else:
        with ProcessPoolExecutor(jobs) as pool:
            yield from pool.map(play_some, [options] * len(chunks), chunks)


def simulate(options: argparse.Namespace) -> dict[str, object]:
    """Play rounds, print each violation and a table, and return the totals."""
    started, total = time.perf_counter(), Tally()
    for tally in _tallies(options):
        total.add(tally)
        for seed, (kind, what) in tally.found.items():
            print(f"{kind}, seed {seed}: {what}\n  again: {replay(options, seed)}", flush=True)
        if (options.first and tally.found) or time.perf_counter() - started > options.seconds:
            break
    seconds = time.perf_counter() - started
    print(f"\n{'fault':18s} {'rounds':>7s} {'violations':>11s} {'slowest recovery (simulated s)':>31s}")
    for kind in total.rounds:
        print(f"{kind:18s} {total.rounds[kind]:7d} {total.broken[kind]:11d} {total.recovery[kind]:31.1f}")
    coverage = total.coverage.report(FAULTS if options.swarm else [])
    return {
        "rounds": total.rounds.total(),
        "engines": options.engines or ("2 to 4" if options.swarm else 3),
        "mixed_versions": total.violations["mixed versions"],
        "hangs": total.violations["hang"],
        "wrong_tokens": total.violations["wrong tokens"],
        "leftovers": total.violations["leftover"],
        "overruns": total.violations["overrun"],
        "untrue_outcomes": total.violations["untrue outcome"],
        "wrong_histories": total.violations["history"],
        "broken_rules": total.violations["rule"],
        "not_promised": dict(sorted(total.not_promised.items())),
        "max_overrun_s": round(total.overrun, 3),
        "slowest_recovery_s": round(max(total.recovery.values()), 1),
        "events": total.events,
        "seconds": round(seconds, 1),
        "rounds_per_second": round(total.rounds.total() / seconds, 1),
        "coverage": coverage,
    }


def replay(options: argparse.Namespace, seed: int) -> str:
    """Return the command that plays one round again and prints its messages."""
    only = f" --only {options.only!r}" if options.only else ""
    which = "--swarm" if options.swarm else f"--simulated{only}"
    engines = f" --engines {options.engines}" if options.engines else ""
    return f"python -m chaos {which} --rounds 1 --seed {seed}{engines} --trace"
