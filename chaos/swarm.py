"""Swarm rounds: each seed draws which faults happen and how often; then everything is healed, and all must work again.

For some time, trainers update and users pause and resume while faults strike at random. A seed switches each kind of fault on
or off and draws its rate, so that rounds differ as much as possible. Then every fault ends: dead processes start again,
links are joined, memory is free, calls return. Within bounds all engines must serve, and an update must succeed.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable

from areal_vllm_ext.client.options import UpdateOptions
from areal_vllm_ext.protocol import WeightsMismatch
from areal_vllm_ext.protocol.timing import LOST_AFTER_SECONDS

from .simulated_faults import KINDS, WORLDS_HAND, Fault, Round, some
from .simulation import Call, Clock, Coverage, Trainer, World

TIMEOUTS = (1.0, 3.0, 8.0, 20.0)
# Mean seconds between two faults of a kind, and of a fault.
INTERVALS = (2.0, 8.0, 30.0)
DURATIONS = (0.2, 2.0, 8.0, 25.0)
Strike = Callable[[World, random.Random], Fault]


def one_way(world: World, dice: random.Random) -> Fault:
    """Lose all messages from one place to another."""
    places = ["directory", *(engine.place for engine in world.engines), *(one.place for one in world.trainers[-2:])]
    source, target = dice.sample(places, 2)

    def strike() -> None:
        world.log("fault", f"nothing passes from {source} to {target}")
        world.network.blocked.add((source, target))

    def heal() -> None:
        world.log("fault", f"all passes from {source} to {target}")
        world.network.blocked.discard((source, target))
        world.network.joined = world.now

    return Fault(strike, heal)


def stuck(world: World, dice: random.Random) -> Fault:
    """Let calls on some engines not return; some of these engines have to be killed in the end."""
    what = frozenset(dice.sample(["calls", "pause", "workers"], dice.choice([1, 1, 2])))
    ranks, killed = some(world, dice), dice.random() < 0.3

    def strike() -> None:
        for rank in ranks:
            world.engines[rank].get_stuck(what)

    def heal() -> None:
        for rank in ranks:
            if killed and world.engines[rank].alive:
                world.crash_engine(rank)
                world.restart_engine(rank)
            world.engines[rank].unstick()

    return Fault(strike, heal)


def full_memory(world: World, dice: random.Random) -> Fault:
    """Let workers of some engines have no memory for an update."""
    ranks = some(world, dice)

    def strike() -> None:
        for rank in ranks:
            world.engines[rank].full = True

    return Fault(strike, lambda: [world.engines[rank].unstick() for rank in ranks] and None)


def slow_disk(world: World, dice: random.Random) -> Fault:
    """Let every step on some engines take up to seconds."""
    ranks, seconds = some(world, dice), dice.choice([0.05, 0.5, 3.0])

    def strike() -> None:
        for rank in ranks:
            world.engines[rank].slowness = seconds

    return Fault(strike, lambda: [world.engines[rank].unstick() for rank in ranks] and None)


def trainer_crash(world: World, dice: random.Random) -> Fault:
    """Kill a trainer."""
    living = [trainer for trainer in world.trainers if trainer.alive]
    return Fault(dice.choice(living).kill if living else lambda: None)


def trainer_asleep(world: World, dice: random.Random) -> Fault:
    """Freeze a trainer."""
    living = [trainer for trainer in world.trainers if trainer.alive]
    if not living:
        return Fault(lambda: None)
    trainer = dice.choice(living)
    return Fault(trainer.sleep, trainer.wake)


def directory_asleep(world: World, dice: random.Random) -> Fault:
    """Freeze the directory, sometimes with engine 0, in whose process it may live."""
    processes = [world.directory, *([world.engines[0]] if dice.random() < 0.5 else [])]

    def each(what: str) -> None:
        for process in processes:
            getattr(process, what)()

    return Fault(lambda: each("sleep"), lambda: each("wake"))


def messages_late(world: World, dice: random.Random) -> Fault:
    """Let some messages come seconds late, or so late that leases have run out."""
    network, share, seconds = world.network, dice.uniform(0.05, 0.5), dice.choice([2.0, 2.0, 20.0])

    def strike() -> None:
        network.late, network.late_seconds = share, seconds

    def heal() -> None:
        network.late = 0.0

    return Fault(strike, heal)


def trainer_interrupted(world: World, dice: random.Random) -> Fault:
    """Cancel a trainer's update."""
    living = [trainer for trainer in world.trainers if trainer.alive and trainer.calls]
    return Fault(dice.choice(living).interrupt if living else lambda: None)


def damaged_weights(world: World, dice: random.Random) -> Fault:
    """Let workers find that they serve other weights than were sent, as the look after a commit can."""
    ranks = some(world, dice)

    def strike() -> None:
        for rank in ranks:
            process = world.engines[rank]
            participant = process.engine.participant
            if process.alive and not process.asleep and participant.last_update:
                participant.weights_mismatch(
                    WeightsMismatch(update=participant.last_update, rank=0, reason="a digest differs")
                )
                process.engine.carry_out([])
                process.flush()

    return Fault(strike)


def given_up(world: World, dice: random.Random) -> Fault:
    """Kill an engine; a user gives it up once the directory has lost it; it comes back all the same."""
    rank = dice.randrange(len(world.engines))
    user, info = world.trainer(), world.engines[rank].engine.info

    def strike() -> None:
        world.crash_engine(rank)
        user.after(LOST_AFTER_SECONDS + 1.0, lambda: user.forget(info.replica, info.dp_rank))

    return Fault(strike, lambda: world.restart_engine(rank))


def replays(world: World, dice: random.Random) -> Fault:
    """Let copies of earlier requests come, long after they were answered."""
    count = dice.choice([1, 5, 20])

    def strike() -> None:
        for _ in range(count):
            world.replay(dice.expovariate(1.0))

    return Fault(strike)


def a_look(world: World, dice: random.Random) -> Fault:
    """Let a user ask for every engine's status, several times."""
    user, times = world.trainer(), dice.choice([1, 5, 20])

    def strike() -> None:
        for count in range(times):
            user.after(0.01 * count, user.look)

    return Fault(strike)


def a_long_pause(world: World, dice: random.Random) -> Fault:
    """Let a user pause all engines and resume them when the fault ends, or never; the lease may run out before."""
    user, mode, lease = world.trainer(), dice.choice(["keep", "wait", "abort"]), dice.choice([2.0, 8.0, 30.0, None])
    resumes = dice.random() < 0.7

    def heal() -> None:
        if resumes:
            user.command("resume", timeout=10.0, resumes=5)

    return Fault(lambda: user.command("pause", timeout=10.0, mode=mode, lease=lease), heal)


def a_sleep(world: World, dice: random.Random) -> Fault:
    """Let a user put all engines to sleep, and wake them up when the fault ends, sometimes the weights before."""
    user, mode = world.trainer(), dice.choice(["keep", "wait", "abort"])
    steps = (dice.choice(["sleep", "sleep", "sleep 2"]), *(("wake weights",) if dice.random() < 0.5 else ()))

    def heal() -> None:
        (user if user.alive else world.trainer()).command("wake up", timeout=10.0, resumes=10)

    return Fault(lambda: user.command(*steps, timeout=10.0, mode=mode), heal)


FAULTS: dict[str, Strike] = {
    **{name: KINDS[name] for name in ("message lost", "message doubled", "reordered bursts")},
    **{name: KINDS[name] for name in ("engine crash", "engine asleep", "engine fails")},
    **{name: KINDS[name] for name in ("directory crash", "head crash", "partition", "a pause", "another user")},
    "message late": messages_late,
    "trainer crash": trainer_crash,
    "trainer asleep": trainer_asleep,
    "trainer interrupted": trainer_interrupted,
    "directory asleep": directory_asleep,
    "damaged weights": damaged_weights,
    "engine given up": given_up,
    "replays": replays,
    "a look": a_look,
    "a long pause": a_long_pause,
    "a sleep": a_sleep,
    "one-way cut": one_way,
    "stuck calls": stuck,
    "full memory": full_memory,
    "slow disk": slow_disk,
}


@dataclasses.dataclass
class Rate:
    """How often a kind of fault strikes in this round, and for how long: mean seconds."""

    interval: float
    duration: float


class SwarmRound(Round):
    """One round, decided by its seed."""

    def __init__(self, seed: int, engines: int = 0, trace: bool = False, coverage: Coverage | None = None) -> None:
        dice = random.Random(seed)
        self.world = World(
            engines or dice.choice([2, 3, 3, 4]),
            dice,
            trace,
            coverage,
            replicas=dice.choice([1, 1, 2]),
            resume_orphans=dice.random() < 0.9,
        )
        self.dice = dice
        self.kind = "swarm"
        self.overrun = self.recovery = 0.0
        self.rates = {
            name: Rate(dice.choice(INTERVALS), dice.choice(DURATIONS)) for name in FAULTS if dice.random() < 0.25
        }
        if "replays" in self.rates:
            self.world.sent = collections.deque(maxlen=500)
        # How often an update begins, and how often a fault strikes in a phase of an update instead of at some time.
        self._pace, self._aim = dice.choice([0.2, 1.0, 5.0]), dice.choice([0.0, 0.05, 0.3])
        # How long an update's bytes take, and how often an update goes on without lost engines.
        self._seconds, self._drops = dice.choice([0.0, 0.0, 0.3, 2.0]), dice.choice([0.0, 0.0, 0.0, 0.5])
        self._versions = itertools.count(1)
        self._phase = "none"
        self._heals = 0.0
        self._faults: list[Fault] = []

    def run(self) -> None:
        """Play the round.

        Raises:
            Violation: a promise was broken.
        """
        world, dice = self.world, self.dice
        if dice.random() < 0.25:
            for process in (*world.engines, world.directory):
                process.clock = Clock(process.clock.offset, dice.uniform(0.8, 1.25))
        world.run(until=6.0)  # all have joined
        world.log("seed", self.rates)
        self._heals = world.now + dice.choice([dice.uniform(2.0, 10.0), dice.uniform(5.0, 40.0)])
        for _ in range(dice.choice([1, 1, 2])):
            self.keep_updating()
        for name in self.rates:
            self.schedule(name)
        world.run(until=self._heals)
        self.heal()
        if dice.random() < 0.5 and world.resume_orphans and not self._pauses_for_ever:
            self.wait_until_all_serve(world.now)
        self.update_until_it_succeeds(self._heals)
        world.run(until=world.now + 3.0)
        self.check_end()

    @property
    def _pauses_for_ever(self) -> bool:
        """Whether a user may have paused engines without a lease, or put them to sleep."""
        return any(name in self.rates for name in ("another user", "a long pause", "a sleep"))

    def keep_updating(self, trainer: Trainer | None = None) -> None:
        """Let a trainer update again and again; a dead trainer has a successor."""
        world, dice = self.world, self.dice
        trainer = trainer if trainer and trainer.alive else world.trainer()
        call: list[Call] = []

        def go_on() -> None:
            if world.now >= self._heals:
                return
            if call and call[0].outcome is None and trainer.alive:
                world.at(world.now + 0.4, WORLDS_HAND, go_on)
            else:
                self._phase = "none"
                world.at(world.now + dice.expovariate(1 / self._pace), WORLDS_HAND, lambda: self.keep_updating(trainer))

        if world.now < self._heals and not trainer.asleep:
            version = f"v{next(self._versions)}"
            seconds = self._seconds * dice.random()
            options: UpdateOptions = {
                "mode": dice.choice(["keep", "keep", "wait", "abort"]),
                "kv": dice.choice(["recompute", "recompute", "keep"]),
                "drop_lost": dice.random() < self._drops,
            }
            call.append(trainer.update(version, dice.choice(TIMEOUTS), self.on_phase, seconds, **options))
        world.at(world.now + 0.2, WORLDS_HAND, go_on)

    def on_phase(self, phase: str) -> None:
        """Note the phase of an update, and sometimes let a fault strike in it."""
        self._phase = phase
        world, dice = self.world, self.dice
        if self.rates and world.now < self._heals and dice.random() < self._aim:
            name = dice.choice(list(self.rates))
            after = dice.choice([0.0, 0.003, 0.03]) * dice.random()
            world.at(world.now + after, WORLDS_HAND, lambda: self.strike(name))

    def schedule(self, name: str) -> None:
        """Let a fault strike after a random time, and again later."""
        world = self.world
        strikes = world.now + self.dice.expovariate(1 / self.rates[name].interval)
        if strikes >= self._heals:
            return

        def strike() -> None:
            self.strike(name)
            self.schedule(name)

        world.at(strikes, WORLDS_HAND, strike)

    def strike(self, name: str) -> None:
        """Let a fault strike now, and end some time later."""
        world, dice = self.world, self.dice
        if world.now >= self._heals:
            return
        fault = FAULTS[name](world, dice)
        self._faults.append(fault)
        world.coverage.fault(self._phase, name)
        world.log("fault", name)
        fault.strike()
        ends = world.now + dice.expovariate(1 / self.rates[name].duration)
        world.at(ends, WORLDS_HAND, lambda: self.end(fault))

    def end(self, fault: Fault) -> None:
        """End a fault, unless it has ended."""
        if fault in self._faults:
            self._faults.remove(fault)
            self.world.log("fault", "ends")
            fault.heal()

    def heal(self) -> None:
        """End every fault, and start what is dead."""
        world = self.world
        world.log("fault", "all end")
        for fault in self._faults:
            fault.heal()
        self._faults.clear()
        world.join_links()
        world.start_directory()
        for process in (*world.trainers, *world.engines, world.directory):
            if process.asleep:
                process.wake()
        for rank in range(len(world.engines)):
            world.restart_engine(rank)
            world.engines[rank].failing = 0
            world.engines[rank].unstick()
