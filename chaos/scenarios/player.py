"""Play a scenario: a text file of commands, each with what happened.

A file has blocks, separated by empty lines. A block that starts with ``#`` is prose. Every other block has commands, a line
``----``, and what they led to: messages, outcomes, and at last what each engine serves. The simulation plays the commands
with fixed delays, so the same code always gives the same text. The text leaves out heartbeats, repeated requests and
renewals of a lease.

    engines N                                     start N engines and their directory
    update V [by T] [without lost engines] [within S s] [until MOMENT]
                                                  the trainer T (``trainer``) updates to version V
    continue [by T] [until MOMENT]                let that update go on, to its end
    pause | resume [by T]                         the trainer T calls ``group.pause()`` or ``group.resume()``
    crash | restart | freeze | thaw PLACE         PLACE: ``engine 1``, ``trainer``, ``directory``
    cut PLACE | cut PLACE from PLACE              lose all messages to and from a place, or between two places
    cut PLACE to PLACE                            lose the messages from the first place to the second
    join                                          end all cuts
    fail PLACE                                    the next call of vLLM on this engine fails
    wait S s | wait until engines serve           let time pass
    wait until engine N has V                     wait until its weights are version V

MOMENT is a phase of the update whose requests have just been sent (``begin``, ``receiving``, ``prepare``, ``pause``,
``commit``, ``resume``), or a state of an engine: ``engine 0 has committed``, ``engine 0 is paused``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from areal_vllm_ext.client.state import UpdateResult
from areal_vllm_ext.protocol import (
    Begin,
    Bucket,
    DirectoryRequest,
    Discover,
    EngineRequest,
    Error,
    Hello,
    KeepPaused,
    Message,
    Register,
    RenewLease,
    Status,
)
from areal_vllm_ext.protocol.server import ReplyTo
from chaos.simulation import Call, Trainer, World
from chaos.simulation.process import Process

RULE = "----"
TRAINER = "trainer"
PHASES = ("begin", "receiving", "prepare", "pause", "commit", "resume")
QUIET = (Register, RenewLease, KeepPaused, Discover, Hello)
JOIN_SECONDS = 6.0
LONGEST_WAIT = 90.0
T = TypeVar("T")


class Even(random.Random):
    """Dice that always fall on the middle, so that a scenario has a single outcome."""

    def random(self) -> float:
        return 0.5

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2

    def choice(self, seq: Sequence[T]) -> T:
        return seq[0]


class Player:
    """Carries out commands and writes down what happens.

    Attributes:
        calls: by trainer, its latest update.
    """

    def __init__(self) -> None:
        self.world: World | None = None
        self.calls: dict[str, Call] = {}
        self._pending: list[tuple[str, str, str]] = []  # source, target, message
        self._lines: list[str] = []
        self._fates: dict[ReplyTo, bool] = {}  # of each request: whether it arrives
        self._quiet: set[ReplyTo] = set()

    def play(self, commands: Iterable[str]) -> list[str]:
        """Carry out the commands of one block; returns the lines to show."""
        self._lines = []
        for command in commands:
            self._do(command)
        self._flush()
        return [*self._lines, *self._states()]

    def close(self) -> None:
        """End every process of the simulation."""
        if self.world:
            for process in (*self.world.trainers, *self.world.engines, self.world.directory):
                process.kill()

    # Commands

    def _do(self, command: str) -> None:
        for pattern, carry_out in self.COMMANDS.items():
            if found := re.fullmatch(pattern, command):
                carry_out(self, *found.groups())
                return
        raise ValueError(f"no such command: {command}")

    @property
    def _world(self) -> World:
        if self.world is None:
            raise ValueError("a scenario begins with: engines N")
        return self.world

    def _engines(self, count: str) -> None:
        self.world = World(int(count), Even())
        self.world.run(until=JOIN_SECONDS)
        self.world.on_send = self._on_send

    def _update(self, version: str, by: str | None, drops: str | None, seconds: str | None, moment: str | None) -> None:
        phases: list[str] = []
        trainer = self._trainer(by)
        timeout = float(seconds or 20)
        self.calls[trainer.name] = trainer.update(version, timeout, phases.append, drop_lost=bool(drops))
        self._run_update(trainer.name, moment, phases)

    def _continue(self, by: str | None, moment: str | None) -> None:
        self._run_update(by or TRAINER, moment, [])

    def _run_update(self, trainer: str, moment: str | None, phases: list[str]) -> None:
        call, world = self.calls[trainer], self._world
        reached = self._moment(moment, phases, call) if moment else lambda: False
        world.run(until=world.now + LONGEST_WAIT, done=lambda: call.outcome is not None or reached())
        if call.outcome is not None:
            self._say(f"the update to {call.version} {ending(call.outcome)}")

    def _moment(self, moment: str, phases: list[str], call: Call) -> Callable[[], bool]:
        if moment in PHASES:
            return lambda: moment in phases
        rank, what = re.fullmatch(r"engine (\d+) (has committed|is paused)", moment).groups()  # type: ignore[union-attr]
        process = self._world.engines[int(rank)]
        if what == "is paused":
            return lambda: not process.engine.running
        return lambda: process.engine.version == call.version

    def _command(self, what: str, by: str | None) -> None:
        trainer, world = self._trainer(by), self._world
        done: list[object] = []
        trainer.command(what, timeout=20.0, done=done.append)
        world.run(until=world.now + LONGEST_WAIT, done=lambda: bool(done))
        self._say(f"{what} {ending(done[0]) if done else 'does not end'}")

    def _trainer(self, name: str | None) -> Trainer:
        found = [trainer for trainer in self._world.trainers if trainer.name == (name or TRAINER) and trainer.alive]
        return found[0] if found else self._world.trainer(name or TRAINER)

    def _happen(self, what: str, place: str) -> None:
        world, process = self._world, self._process(place)
        rank = int(place.split()[1]) if place.startswith("engine ") else -1
        match what:
            case "crash" if rank >= 0:
                world.crash_engine(rank)
            case "crash" if place == "directory":
                world.crash_directory()
            case "crash":
                process.kill()
            case "restart" if rank >= 0:
                world.restart_engine(rank)
            case "restart":
                world.start_directory()
            case "freeze":
                process.sleep()
            case "thaw":
                process.wake()
            case "fail":
                world.engines[rank].failing = 1

    def _cut(self, place: str) -> None:
        self._world.network.cut.add(self._process(place).place)

    def _block(self, source: str, way: str, target: str) -> None:
        one, two = self._process(source).place, self._process(target).place
        self._world.network.blocked |= {(one, two)} if way == "to" else {(one, two), (two, one)}

    def _join(self) -> None:
        self._world.join_links()

    def _wait(self, seconds: str) -> None:
        world = self._world
        world.run(until=world.now + float(seconds))

    def _wait_until_serving(self) -> None:
        world, started = self._world, self._world.now
        world.run(
            until=started + LONGEST_WAIT,
            done=lambda: all(one.engine.running and one.joined for one in world.engines if one.alive),
        )
        self._say(f"{world.now - started:.1f} s later")

    def _wait_until_fetched(self, rank: str, version: str) -> None:
        world, process = self._world, self._world.engines[int(rank)]
        world.run(until=world.now + LONGEST_WAIT, done=lambda: process.engine.version == version)

    def _process(self, place: str) -> Process:
        world = self._world
        if place == "directory":
            return world.directory
        if place.startswith("engine "):
            return world.engines[int(place.split()[1])]
        return self._trainer(place)

    COMMANDS: dict[str, Callable[..., None]] = {  # noqa: RUF012, the methods above, not shared state
        r"engines (\d+)": _engines,
        r"update (\S+)(?: by (\S+))?( without lost engines)?(?: within (\S+) s)?(?: until (.+))?": _update,
        r"continue(?: by (\S+))?(?: until (.+))?": _continue,
        r"(pause|resume)(?: by (\S+))?": _command,
        r"(crash|restart|freeze|thaw|fail) (.+)": _happen,
        r"cut (.+) (to|from) (.+)": _block,
        r"cut (.+)": _cut,
        r"join": _join,
        r"wait (\S+) s": _wait,
        r"wait until engines serve": _wait_until_serving,
        r"wait until engine (\d+) has (\S+)": _wait_until_fetched,
    }

    # Output

    def _on_send(self, source: Process, target: Process, caller: ReplyTo, message: Message, arrives: bool) -> None:
        if isinstance(message, EngineRequest | DirectoryRequest):
            if isinstance(message, QUIET):
                self._quiet.add(caller)
            if caller in self._fates and self._fates[caller] >= arrives:
                return  # a repeated request that meets the same fate
            self._fates[caller] = arrives
        if caller in self._quiet:
            return
        entry = (source.place, target.place, describe(message) + ("" if arrives else " (lost)"))
        if self._pending and not self._merges(entry):
            self._flush()
        self._pending.append(entry)

    def _merges(self, entry: tuple[str, str, str]) -> bool:
        source, target, text = self._pending[-1]
        return text == entry[2] and (source == entry[0] or target == entry[1])

    def _say(self, line: str) -> None:
        self._flush()
        self._lines.append(line)

    def _flush(self) -> None:
        if self._pending:
            sources, targets = ([entry[side] for entry in self._pending] for side in (0, 1))
            self._lines.append(f"{places(sources)} -> {places(targets)}: {self._pending[0][2]}")
            self._pending.clear()
        if self._lines[-4:-2] == self._lines[-2:]:  # a request that was repeated and answered as before
            del self._lines[-2:]

    def _states(self) -> list[str]:
        """Return what each engine serves; engines in the same state share a line."""
        by_state: dict[str, list[str]] = {}
        for rank, process in enumerate(self._world.engines):
            engine, p = process.engine, process.engine.participant
            held = f", prepared {p.update.begin.version}" if p.update and p.update_phase == "prepared" else ""
            held = f", receives {p.update.begin.version}" if p.update and p.update_phase == "receiving" else held
            why = "tainted" if p.tainted else "stale" if p.stale else ""
            if not process.alive:
                state = "down"
            elif process.asleep:
                state = "frozen"
            elif not process.joined:
                state = f"waiting for the directory, with {engine.version}"
            elif engine.running:
                state = f"serving {engine.version}{held}"
            else:
                state = f"paused with {engine.version}{held}{f', {why}' if why else ''}"
            by_state.setdefault(state, []).append(f"engine-{rank}")
        return [f"{places(who)}: {what}" for what, who in by_state.items()]


def describe(message: Message) -> str:
    """Return a message as a scenario shows it."""
    fields: list[str] = []
    match message:
        case Begin():
            fields = [str(message.version)]
        case Bucket():
            fields = [str(message.index)]
        case Error():
            fields = [message.kind]
        case Status():
            fields = [str(message.version), message.update_phase, message.generation]
    epoch: Any = getattr(message, "epoch", None)
    if epoch and not isinstance(message, Error | Status):
        fields.append(f"epoch {epoch}")
    return type(message).__name__ + (f"({', '.join(fields)})" if fields else "")


def ending(outcome: object) -> str:
    """Return how a call ended."""
    if isinstance(outcome, UpdateResult):
        lost = f" without {', '.join(outcome.lost)}" if outcome.lost else ""
        return f"is committed{lost}"
    return f"raises {type(outcome).__name__}" if isinstance(outcome, Exception) else "is done"


def places(names: Iterable[str]) -> str:
    """Join names of places; engines are shown as ``engines 0-2``."""
    unique = list(dict.fromkeys(names))
    ranks = sorted(int(name.removeprefix("engine-")) for name in unique if name.startswith("engine-"))
    parts = [name for name in unique if not name.startswith("engine-")]
    if ranks:
        run = len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1))
        text = f"{ranks[0]}-{ranks[-1]}" if run else ", ".join(map(str, ranks))
        parts.append(f"{'engine' if len(ranks) == 1 else 'engines'} {text}")
    return ", ".join(parts)


def played(text: str) -> str:
    """Return the text of a scenario with what its commands lead to now."""
    player = Player()
    try:
        blocks = []
        for block in re.split(r"\n\s*\n", text.strip()):
            lines = block.splitlines()
            if lines[0].startswith("#"):
                blocks.append(block)
                continue
            commands = lines[: lines.index(RULE)] if RULE in lines else lines
            blocks.append("\n".join([*commands, RULE, *player.play(commands)]))
        return "\n\n".join(blocks) + "\n"
    finally:
        player.close()
