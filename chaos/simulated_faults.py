"""Rounds of the simulation: an update, a fault in the middle of it, and the promises that must hold.

The seed of a round decides everything. A trainer updates the engines, and at one phase of the update the fault strikes.
A second trainer comes, and updates until it succeeds; the fault ends. Then every engine must serve the second trainer's
version within bounds, and nothing may be left behind.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Iterable
from typing import Any

from areal_vllm_ext.client.state import UpdateResult
from areal_vllm_ext.errors import ArealError, UpdateAborted
from areal_vllm_ext.protocol import PauseMode

from .simulation import Call, Clock, Coverage, Engine, UsersCall, World, require

PHASES = ("begin", "receiving", "prepare", "pause", "commit", "resume")
# Longest recovery: two leases that run out (10 s each), an engine that registers again (1 s), a request that times out.
RECOVERY_SECONDS = 40.0
OVERRUN_SECONDS = 1.0
# Longest time until abandoned engines serve again without a new trainer: a lease that runs out, and a take-over.
# The lease of a user's own pause is longer.
SERVES_AGAIN_SECONDS = 15.0
PAUSE_SECONDS = 45.0
FETCH_SECONDS = 20.0


@dataclasses.dataclass
class Fault:
    """A fault: what happens when it strikes, and what ends it."""

    strike: Callable[[], None]
    heal: Callable[[], None] = lambda: None


def each(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()


Draw = Callable[[World, random.Random], Fault]


def shares(name: str, low: float, high: float) -> Draw:
    """Return the fault that sets the network's share ``name``."""

    def draw(world: World, dice: random.Random) -> Fault:
        share = dice.uniform(low, high)
        return Fault(lambda: setattr(world.network, name, share), lambda: setattr(world.network, name, 0.0))

    return draw


def trainer_crash(world: World, dice: random.Random) -> Fault:
    return Fault(world.trainers[0].kill)


def trainer_asleep(world: World, dice: random.Random) -> Fault:
    """Freeze the trainer, often for longer than its lease."""
    return Fault(world.trainers[0].sleep, world.trainers[0].wake)


def some(world: World, dice: random.Random) -> list[int]:
    """Draw a few engines, most often one."""
    count = dice.choice([1, 1, 1, 2, len(world.engines)])
    return dice.sample(range(len(world.engines)), min(count, len(world.engines)))


def engine_crash(world: World, dice: random.Random) -> Fault:
    ranks = some(world, dice)
    return Fault(
        lambda: each(functools.partial(world.crash_engine, rank) for rank in ranks),
        lambda: each(functools.partial(world.restart_engine, rank) for rank in ranks),
    )


def engine_asleep(world: World, dice: random.Random) -> Fault:
    engines = [world.engines[rank] for rank in some(world, dice)]
    return Fault(lambda: each(engine.sleep for engine in engines), lambda: each(engine.wake for engine in engines))


def engine_fails(world: World, dice: random.Random) -> Fault:
    """Let the next calls or workers' steps on some engines fail."""
    ranks, count = some(world, dice), dice.choice([1, 1, 2, 4])

    def fail(count: int) -> None:
        for rank in ranks:
            world.engines[rank].failing = count

    return Fault(lambda: fail(count), lambda: fail(0))


def directory_crash(world: World, dice: random.Random) -> Fault:
    return Fault(world.crash_directory, world.start_directory)


def head_crash(world: World, dice: random.Random) -> Fault:
    """Kill the process of engine 0 and the directory."""

    def strike() -> None:
        world.crash_directory()
        world.crash_engine(0)

    def heal() -> None:
        world.start_directory()
        world.restart_engine(0)

    return Fault(strike, heal)


def partition(world: World, dice: random.Random) -> Fault:
    """Cut some engines, sometimes the directory too, off from the others."""
    ranks = some(world, dice)
    names = {world.engines[rank].place for rank in ranks}
    if dice.random() < 0.3:
        names.add("directory")
    return Fault(lambda: world.cut_off(names), world.join_links)


def clock_drift(world: World, dice: random.Random) -> Fault:
    """Let every clock run up to a fifth fast or slow."""
    for process in (*world.engines, world.directory):
        process.clock = Clock(process.clock.offset, dice.uniform(0.8, 1.25))
    return dice.choice([trainer_crash, trainer_asleep, engine_asleep, partition])(world, dice)


def two_trainers(world: World, dice: random.Random) -> Fault:
    """Let another trainer update at the same time."""
    rival = world.trainer()
    timeout = dice.uniform(2.0, 20.0)

    def strike() -> None:
        rival.update("v-rival", timeout)

    return Fault(strike)


def a_pause(world: World, dice: random.Random) -> Fault:
    """Let a user pause and resume all engines, or only resume them."""
    rival, pauses, timeout = world.trainer(), dice.random() < 0.5, dice.uniform(2.0, 20.0)
    steps = ("pause", "resume") if pauses else ("resume",)
    mode: PauseMode = dice.choice(["keep", "wait", "abort"])
    return Fault(lambda: rival.command(*steps, timeout=timeout, resumes=10, mode=mode))


def another_user(world: World, dice: random.Random) -> Fault:
    """Let somebody pause, resume or reload some engines by vLLM's own calls, past this package."""
    ranks = some(world, dice) if dice.random() < 0.5 else list(range(len(world.engines)))
    kinds = ["pause_scheduler", "resume_scheduler", "reload_weights", "sleep", "sleep level 2", "wake_up"]
    calls = dice.choices(kinds, [3, 3, 3, 1, 1, 2], k=dice.choice([1, 1, 2]))

    def call(rank: int, name: str) -> None:
        process = world.engines[rank]

        def called() -> None:
            process.engine.calls.append(UsersCall(name))
            process.flush()

        world.at(world.now, process, called)  # an engine that is frozen reads it when it goes on

    return Fault(
        lambda: each(functools.partial(call, rank, name) for name in calls for rank in ranks),
        lambda: each(functools.partial(call, rank, name) for rank in ranks for name in ("wake_up", "resume_scheduler")),
    )


def two_faults(world: World, dice: random.Random) -> Fault:
    kinds = [draw for draw in KINDS.values() if draw not in (two_faults, clock_drift)]
    one, other = (draw(world, dice) for draw in dice.sample(kinds, 2))

    def strike() -> None:
        one.strike()
        other.strike()

    def heal() -> None:
        one.heal()
        other.heal()

    return Fault(strike, heal)


KINDS: dict[str, Draw] = {
    "message lost": shares("lost", 0.02, 0.4),
    "message late": shares("late", 0.05, 0.5),
    "message doubled": shares("doubled", 0.1, 0.9),
    "reordered bursts": shares("bursts", 0.2, 0.9),
    "trainer crash": trainer_crash,
    "trainer asleep": trainer_asleep,
    "engine crash": engine_crash,
    "engine asleep": engine_asleep,
    "engine fails": engine_fails,
    "directory crash": directory_crash,
    "head crash": head_crash,
    "partition": partition,
    "clock drift": clock_drift,
    "two trainers": two_trainers,
    "a pause": a_pause,
    "another user": another_user,
    "two faults": two_faults,
}


class Round:
    """One round, decided by its seed."""

    def __init__(
        self, kind: str, seed: int, engines: int, trace: bool = False, coverage: Coverage | None = None
    ) -> None:
        self.world = World(engines, random.Random(seed), trace, coverage)
        self.dice = self.world.dice
        self.kind = kind
        self.struck = 0.0
        self.overrun = 0.0
        self.recovery = 0.0

    def run(self) -> None:
        """Play the round.

        Raises:
            Violation: a promise was broken.
        """
        world, dice = self.world, self.dice
        world.run(until=6.0)  # all have joined
        first = world.trainer()
        fault = KINDS[self.kind](world, dice)
        phase, after = dice.choice(PHASES), dice.choice([0.0, 0.003, 0.03]) * dice.random()

        def on_phase(name: str) -> None:
            if name == phase and not self.struck:
                self.struck = world.now + after
                world.log("fault", f"{self.kind} in {after:.4f} s")
                world.at(self.struck, WORLDS_HAND, fault.strike)

        if dice.random() < 0.1:
            world.at(world.now, WORLDS_HAND, fault.strike)
            self.struck = world.now
        call = first.update("v1", timeout=dice.choice([1.0, 5.0, 20.0]), on_phase=on_phase)
        world.run(until=world.now + 5.0, done=lambda: bool(self.struck) or call.outcome is not None)

        # The next trainer comes while the fault lasts, or after it.
        started = self.struck = max(world.now, self.struck) + 1e-6
        heals = started + dice.choice([0.0, dice.uniform(0.0, 3.0), dice.uniform(3.0, 25.0)])
        comes = started + dice.choice([0.0, dice.uniform(0.0, 3.0), dice.uniform(3.0, 25.0)])
        world.at(heals, WORLDS_HAND, fault.heal)
        if dice.random() < 0.5:
            self.wait_until_all_serve(heals)
        world.run(until=comes)
        self.update_until_it_succeeds(max(heals, comes))
        world.run(until=max(world.now, heals) + 3.0)
        self.check_end()

    def wait_until_all_serve(self, healed: float) -> None:
        """Wait until all serve again, with no help but the directory's."""
        world = self.world
        world.run(until=healed)
        calls = [call for trainer in world.trainers if trainer.alive for call in trainer.calls]
        world.run(until=world.now + 60.0, done=lambda: all(call.outcome is not None for call in calls))
        states = [process.engine.participant for process in world.engines]
        paused_by_user = any(state.generation != "running" and not state.pauses.paused_for for state in states)
        slowest = min(process.clock.rate for process in (*world.engines, world.directory))
        seconds = PAUSE_SECONDS if paused_by_user else SERVES_AGAIN_SECONDS
        # A restarted engine may hear of newer weights only when the lease of a lost client has ended. Then it fetches them.
        fetches = any(state.stale or not state.joined for state in states)
        seconds = (seconds + FETCH_SECONDS * fetches) / min(slowest, 1.0)
        world.run(until=world.now + seconds, done=self.serve)
        require(self.serve(), "hang", f"engines do not serve {seconds} s after the fault")

    def serve(self) -> bool:
        """Return whether all engines serve; tainted ones, and stale ones without a peer, wait for the next update."""
        return all(
            process.alive and process.joined and (process.engine.running or self._waits_for_update(process.engine))
            for process in self.world.engines
        )

    def _waits_for_update(self, engine: Engine) -> bool:
        p = engine.participant
        if p.tainted or not p.stale:
            return bool(p.tainted)
        others = [one.engine.participant for one in self.world.engines if one.engine is not engine]
        return not any(
            one.committed_epoch >= p.group_epoch
            and not (one.tainted or one.stale or one.foreign)
            and one.update is None
            and one.sleep.is_awake
            for one in others
        )

    def resume_what_users_paused(self) -> None:
        """Let the leases of users' own pauses run out; a user resumes what has no lease."""
        world = self.world
        if self.serve():
            return
        slowest = min(process.clock.rate for process in (*world.engines, world.directory))
        if world.resume_orphans:
            world.run(until=world.now + PAUSE_SECONDS / min(slowest, 1.0), done=self.serve)
        if not self.serve():
            world.trainer().command("wake up", "resume", timeout=20.0, resumes=5)
            world.run(until=world.now + RECOVERY_SECONDS, done=self.serve)
        world.run(until=world.now + 3.0)

    def update_until_it_succeeds(self, healed: float, name: str = "v2") -> None:
        world = self.world
        next_trainer = world.trainer()
        if self.dice.random() < 0.3:  # a user resumes the engines first
            next_trainer.command("resume", timeout=5.0)
        attempt = 0
        while True:
            attempt += 1
            if any(process.engine.asleep for process in world.engines):  # somebody who puts engines to sleep is gone
                next_trainer.command("wake up", timeout=5.0)
            call = next_trainer.update(f"{name}.{attempt}", timeout=self.dice.uniform(5.0, 20.0))
            self.run_until_ended(call, healed + 2 * RECOVERY_SECONDS)
            require(call.outcome is not None, "hang", f"the update to {call.version} does not end")
            # A forgotten engine that is just starting again is not in the update, and it is not lost either.
            everywhere = isinstance(call.outcome, UpdateResult) and len(call.outcome.engines) == len(world.engines)
            if everywhere and world.now >= healed and not call.outcome.lost:
                self.recovery = world.now - healed
                return
            require(
                world.now - healed < RECOVERY_SECONDS,
                "hang",
                f"no update succeeds for {RECOVERY_SECONDS} s after the fault; last: {call.outcome}",
            )
            world.run(until=world.now + 0.5)

    def run_until_ended(self, call: Call, until: float) -> None:
        self.world.run(until, done=lambda: call.outcome is not None)

    def check_end(self) -> None:
        world = self.world
        self.resume_what_users_paused()
        if any("sleep level 2" in process.engine.participant.tainted for process in world.engines):
            self.update_until_it_succeeds(world.now, "v3")  # a user's sleep came after the last update
            self.resume_what_users_paused()
        calls = [(trainer, call) for trainer in world.trainers for call in trainer.calls]
        world.run(until=world.now + 60.0, done=lambda: all(c.outcome is not None or not t.alive for t, c in calls))
        for trainer, call in calls:
            if trainer.alive:
                self.check_outcome(call)
        serving = calls[-1][1].version
        for rank, process in enumerate(world.engines):
            engine, p = process.engine, process.engine.participant
            require(
                engine.version == p.version, "wrong tokens", f"engine {rank} says {p.version}, has {engine.version}"
            )
            claimed, held = (p.adapters, p.draft_version), (engine.adapters, engine.drafted)
            require(engine.tells_the_truth, "wrong tokens", f"engine {rank} says {claimed}, has {held}")
            require(p.update is None, "leftover", f"engine {rank} still has an update, {p.update_phase}")
            require(engine.running, "hang", f"engine {rank} is {p.generation} and nobody will resume it")
            require(not any(engine.orders), "leftover", f"engine {rank}'s workers have orders left")
            unanswered = [caller for caller, answer in engine.answers.items() if answer is None]
            require(not unanswered, "leftover", f"engine {rank} never answered {len(unanswered)} requests")
        versions = {(process.engine.version, process.engine.units) for process in world.engines}
        require(
            len(versions) == 1, "mixed versions", f"at the end engines serve {versions}, the last update was {serving}"
        )
        world.check_history()
        for trainer, call in calls:  # last, because a deadline is the least of these promises
            if trainer.alive and not trainer.slept:  # a process that was stopped keeps no deadline
                self.check_deadline(call)

    def check_outcome(self, call: Call) -> None:
        require(call.outcome is not None, "hang", f"the update to {call.version} does not end")
        switched = self.world.switched.get(call.version, set())
        if isinstance(call.outcome, UpdateResult):
            require(switched, "untrue outcome", f"the update to {call.version} succeeded, but nobody switched")
        elif isinstance(call.outcome, UpdateAborted):
            require(not switched, "untrue outcome", f"engines {switched} switched, but: {call.outcome}")
        else:
            expected = (ArealError, asyncio.CancelledError)
            require(isinstance(call.outcome, expected), "rule", f"the update ended with {call.outcome!r}")

    def check_deadline(self, call: Call) -> None:
        self.overrun = max(self.overrun, call.seconds - call.timeout)
        late = f"the update to {call.version} took {call.seconds:.2f} s of {call.timeout:.2f} s: {call.outcome!r}"
        require(call.seconds - call.timeout <= OVERRUN_SECONDS, "overrun", late)


class _Hand:
    """The cause of the faults; it is no process and is never dead or asleep."""

    alive, asleep = True, False

    def __init__(self) -> None:
        self.ready: collections.deque[asyncio.Handle] = collections.deque()  # always empty


WORLDS_HAND: Any = _Hand()
