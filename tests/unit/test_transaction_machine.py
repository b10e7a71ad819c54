"""The transaction under a bad network: hypothesis drives real participants, the real coordinator and the real recovery, and
looks for a mixture.

Three engines, their clients, and everything between them simulated: messages are lost, delayed, doubled and reordered, time
passes, clients die or only sleep while a successor with a higher epoch comes, engines crash and come back with the weights
that they were started with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from collections.abc import Generator

from hypothesis import Phase, event, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from areal_vllm_ext.client.coordinator import Coordinator, Member
from areal_vllm_ext.control import recovery
from areal_vllm_ext.protocol import (
    Ack,
    Answer,
    Commit,
    Disk,
    EngineRequest,
    Fence,
    Pause,
    Prepare,
    Resume,
    Sender,
    Sleep,
    SleepLevel,
    SleepTag,
    Status,
    Version,
    WakeUp,
)
from areal_vllm_ext.protocol.server import ReplyTo
from chaos.simulation import Engine, brief
from examples import NIGHTLY

NAMES = ("a", "b", "c")
DEADLINE = 60.0
IDS = itertools.count()
RARE = st.sampled_from(
    [False, False, False, True]
)  # a step of what would end most runs too early; others go on instead
PURPOSES = ["update", "update", "update", "pause", "resume", "sleep", "wake weights", "wake"]


@dataclasses.dataclass(frozen=True)
class Packet:
    """A message on its way, to an engine or back to the trainer."""

    engine: str
    caller: ReplyTo
    message: EngineRequest | Answer
    back: bool


Answers = dict[str, Answer | None]  # None: no answer in time
Script = Generator[dict[str, EngineRequest], Answers, dict[str, Status] | None]


class Client:
    """Whoever holds the lease: takes over (as ``Commander._take_over``), then updates (as ``AsyncUpdate._drive``),
    pauses or resumes.

    Attributes:
        waiting: the requests whose outcome it waits for.
        asleep: a successor has taken over, and it does not know.
    """

    def __init__(self, epoch: int, purpose: str, version: Version) -> None:
        self.epoch = epoch
        self.purpose = purpose
        self.version = version
        self.waiting: dict[ReplyTo, tuple[str, EngineRequest]] = {}
        self.asleep = False
        self.coordinator: Coordinator | None = None
        self.found: dict[str, Status] = {}
        # Started anew since the client came: no longer what it found.
        self.crashed: set[str] = set()
        self.voted: set[str] = set()
        self.paused: set[str] = set()
        self.script: Script | None = self.take_over() if purpose == "update" else self.command()
        self.answers: Answers = {}
        self.done = False

    def take_over(self) -> Script:
        while True:
            answers = yield {name: Fence(epoch=self.epoch) for name in NAMES}
            statuses = {name: answer for name, answer in answers.items() if isinstance(answer, Status)}
            if len(statuses) < len(NAMES):
                return None
            plan = recovery.plan(statuses, self.epoch)
            if not (plan.resolve or plan.resume or plan.wait):
                return statuses
            event("something was left to settle")
            for requests in (plan.resolve, plan.resume if not plan.wait else {}):
                if requests:
                    answers = yield requests
                    if not all(isinstance(answer, Ack) for answer in answers.values()):
                        return None

    def command(self) -> Script:
        """A user's own pause or resume, or steps of sleep."""
        if (yield from self.take_over()) is None:
            return None
        resume: dict[str, EngineRequest] = {name: Resume(epoch=self.epoch) for name in NAMES}
        if self.purpose == "resume":
            yield resume
            return None
        if self.purpose in ("wake weights", "wake"):
            tags: tuple[SleepTag, ...] = ("weights",) if self.purpose == "wake weights" else ()
            answers = yield {name: WakeUp(epoch=self.epoch, tags=tags, timeout=DEADLINE) for name in NAMES}
            if not tags and all(isinstance(answer, Ack) for answer in answers.values()):
                yield resume
            return None
        pause = Pause(epoch=self.epoch, mode="abort", kv="keep", timeout=DEADLINE, to_sleep=self.purpose == "sleep")
        answers = yield dict.fromkeys(NAMES, pause)
        if not all(isinstance(answer, Ack) for answer in answers.values()):
            yield resume
        elif self.purpose == "sleep":
            level: SleepLevel = 2 if self.epoch % 3 == 0 else 1
            yield {name: Sleep(epoch=self.epoch, level=level, timeout=DEADLINE) for name in NAMES}
        return None

    def start(self) -> dict[str, EngineRequest]:
        assert self.script is not None
        return next(self.script)

    def outcome(self, caller: ReplyTo, answer: Answer | None) -> dict[str, EngineRequest]:
        """The answer to a request, or that there was none; returns what to ask next."""
        name, asked = self.waiting.pop(caller)
        if self.coordinator is not None:
            return self.drive(name, asked, answer)
        assert self.script is not None
        self.answers[name] = answer
        if self.waiting:
            return {}
        answers, self.answers = self.answers, {}
        try:
            return self.script.send(answers)
        except StopIteration as end:
            if self.purpose == "update" and end.value is not None:
                return self.begin(end.value)
            self.done = True
            return {}

    def begin(self, statuses: dict[str, Status]) -> dict[str, EngineRequest]:
        self.found = statuses
        members = {
            name: Member(self.epoch, running=status.generation == "running" or status.paused_for != "")
            for name, status in statuses.items()
        }
        self.coordinator = Coordinator(f"u{next(IDS)}", self.version, members)
        return self.coordinator.begin({name: {0: Sender(transfer=Disk(path="/"))} for name in NAMES}, timeout=DEADLINE)

    def drive(self, name: str, asked: EngineRequest, answer: Answer | None) -> dict[str, EngineRequest]:
        coordinator = self.coordinator
        assert coordinator is not None
        if isinstance(answer, Ack) and isinstance(asked, Prepare):
            self.voted.add(name)
        if isinstance(answer, Ack) and isinstance(asked, Pause):
            self.paused.add(name)
        phase = coordinator.phase
        requests = (
            coordinator.silent(name, "silent", DEADLINE)
            if answer is None
            else coordinator.answered(name, answer, DEADLINE)
        )
        if coordinator.phase != phase:
            self.waiting.clear()
        if coordinator.phase == "send":
            requests = coordinator.sent(buckets={0: 0}, hold=self.epoch % 2 == 0)
        elif coordinator.phase == "prepared":  # held after the votes, of every second client
            requests = coordinator.commit(DEADLINE)
        for request in requests.values():
            if isinstance(request, Commit):
                assert self.voted == set(NAMES), "a commit without all votes"
                assert self.paused == set(NAMES), "a commit before all had paused"
        self.done = coordinator.phase == "done"
        return requests


class Transaction(RuleBasedStateMachine):
    """The world. ``exempt`` are the engines that crashed (and run on their first weights), until all are on one version
    again. One that was merely lost is not: it must stay paused until it is on the others' version.
    """

    @initialize(running=st.lists(st.booleans(), min_size=len(NAMES), max_size=len(NAMES)))
    def start(self, running: list[bool]) -> None:
        self.now = 0.0
        self.epoch = 0
        self.network: list[Packet] = []
        self.engines = {name: Engine(log=note) for name in NAMES}
        self.exempt: set[str] = set()
        self.versions = itertools.count(1)
        self.clients: list[Client] = []
        for name, runs in zip(NAMES, running, strict=True):
            if not runs:  # a user's own pause, before
                engine = self.engines[name]
                engine.receive(self.caller(), Pause(epoch=0, mode="keep", kv="keep", timeout=1e9), self.now)
                while engine.busy:
                    engine.go_on()
                engine.replies.clear()
        self.next_client("update", dead=False)

    def caller(self) -> ReplyTo:
        return ReplyTo(b"client", next(IDS).to_bytes(16, "big"))

    # The clients

    @rule(purpose=st.sampled_from(PURPOSES), dead=st.booleans(), rare=RARE)
    def next_client(self, purpose: str, dead: bool, rare: bool = True) -> None:
        """Takes the lease with a higher epoch: its predecessor has ended, or has died, or only sleeps."""
        if self.clients and not rare:
            self.go_on(20)
            return
        if self.clients:
            coordinator = self.clients[-1].coordinator
            event(f"client {'dies' if dead else 'sleeps'} in {coordinator.phase if coordinator else 'take-over'}")
        if dead:
            self.clients.clear()
        for client in self.clients:
            client.asleep = True
        self.epoch += 1
        note(f"client {self.epoch} comes: {purpose}")
        client = Client(self.epoch, purpose, f"v{next(self.versions)}")
        self.clients.append(client)
        self.ask(client, client.start())

    def ask(self, client: Client, requests: dict[str, EngineRequest]) -> None:
        for name, message in requests.items():
            caller = self.caller()
            client.waiting[caller] = (name, message)
            self.network.append(Packet(name, caller, message, back=False))

    def outcome(self, client: Client, caller: ReplyTo, answer: Answer | None) -> None:
        self.ask(client, client.outcome(caller, answer))
        if client.done:
            self.clients.remove(client)
            if client.coordinator is not None and not client.asleep:
                self.check_end(client, client.coordinator)

    def check_end(self, client: Client, coordinator: Coordinator) -> None:
        event("aborted" if coordinator.reason else "committed with losses" if coordinator.lost else "committed")
        if coordinator.reason:
            assert coordinator.committed == []
        for name, engine in self.engines.items():
            if name not in self.exempt | client.crashed and name not in coordinator.lost:
                expected = client.found[name].version if coordinator.reason else coordinator.version
                assert engine.version == expected, f"{name} is on {engine.version}, not on {expected}"

    def waiting(self) -> list[tuple[Client, ReplyTo]]:
        return [(client, caller) for client in self.clients for caller in client.waiting]

    @rule(data=st.data())
    def give_up_waiting(self, data: st.DataObject) -> None:
        """The answer to a request does not come in time."""
        if not self.waiting():
            return
        place = data.draw(st.integers(0, len(self.waiting()) - 1))
        client, caller = self.waiting()[place]
        self.outcome(client, caller, None)

    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """A request is repeated under its id."""
        if not self.waiting():
            return
        place = data.draw(st.integers(0, len(self.waiting()) - 1))
        client, caller = self.waiting()[place]
        name, message = client.waiting[caller]
        self.network.append(Packet(name, caller, message, back=False))

    # The network

    def deliver(self, packet: Packet) -> None:
        note(f"{'from' if packet.back else 'to'} {packet.engine}: {brief(packet.message)}")
        if not packet.back:
            assert not isinstance(packet.message, Answer)
            self.engines[packet.engine].receive(packet.caller, packet.message, self.now)
            return
        for client in self.clients:
            if packet.caller in client.waiting:
                self.outcome(client, packet.caller, packet.message)  # type: ignore[arg-type]
                return

    def collect(self) -> None:
        """What the engines answered is on the wire now."""
        for name, engine in self.engines.items():
            for caller, answer in engine.replies:
                self.network.append(Packet(name, caller, answer, back=True))
            engine.replies.clear()

    @rule(steps=st.integers(1, 30))
    def go_on(self, steps: int) -> None:
        """Everything takes its course for a while."""
        for _ in range(steps):
            if busy := [engine for engine in self.engines.values() if engine.busy]:
                busy[0].go_on()
            elif self.network:
                self.deliver(self.network.pop(0))
            self.collect()
            self.no_mixture()

    @rule(seed=st.integers(0, 2**32 - 1), steps=st.sampled_from([20, 100, 200, 400]))
    def storm(self, seed: int, steps: int) -> None:
        """Many faults in a row, drawn from ``seed``: a hundred times as fast as one rule each."""
        dice = random.Random(seed)
        for _ in range(steps):
            roll = dice.random()
            if self.critical() and dice.random() < 0.04:
                if dice.random() < 0.5:
                    self.next_client(dice.choice(PURPOSES), dead=dice.random() < 0.5)
                else:
                    self.pass_time(DEADLINE + 1)
            elif roll < 0.70:
                self.go_on(1)
            elif roll < 0.80:
                what = dice.choice(["call", "idle", "report", "worker", "word"])
                self.move(dice.choice(NAMES), what, fails=dice.random() < 0.02)
            elif roll < 0.95 and self.network:
                fate = dice.choices(["next", "lost", "doubled"], [6, 1, 2])[0]
                self.disturb_at(dice.randrange(len(self.network)), fate)
            elif roll < 0.97 and (waiting := self.waiting()):
                client, caller = dice.choice(waiting)
                name, message = client.waiting[caller]
                self.network.append(Packet(name, caller, message, back=False))
            elif roll < 0.975 and (waiting := self.waiting()):
                client, caller = dice.choice(waiting)
                self.outcome(client, caller, None)
            elif roll < 0.98:
                self.pass_time(dice.choice([1.0, DEADLINE / 2, DEADLINE + 1]))
            elif roll < 0.9815:
                self.crash_engine(dice.choice(NAMES), rare=True)
            elif roll < 0.994 or not self.clients:
                self.somebody_comes(dice)
            self.no_mixture()

    def somebody_comes(self, dice: random.Random) -> None:
        """The next client, or another user of the engines."""
        if self.clients and dice.random() < 0.4:
            names = NAMES if dice.random() < 0.5 else (dice.choice(NAMES),)
            self.another_user_calls(names, dice.choice(["pause", "resume", "resume", "reload"]))
        else:
            self.next_client(dice.choice(PURPOSES), dead=dice.random() < 0.5)

    def critical(self) -> bool:
        """Whether some engines may have switched and others not: when faults hurt most."""
        coordinator = self.clients[-1].coordinator if self.clients else None
        return coordinator is not None and coordinator.phase in ("pause", "commit")

    @rule(moment=st.sampled_from(["prepare", "pause", "commit", "switching", "switched", "resume", "abort", "end"]))
    def go_on_until(self, moment: str) -> None:
        """Everything takes its course, to the moment at which a fault would hurt."""
        if not self.clients:
            return
        client = self.clients[-1]
        for _ in range(300):
            phases = [engine.participant.update_phase for engine in self.engines.values()]
            switched = [engine.participant.last_update for engine in self.engines.values()]
            coordinator = client.coordinator
            if (
                client.done
                or (coordinator is not None and coordinator.phase == moment)
                or (moment == "switching" and "committing" in phases)
                or (moment == "switched" and coordinator is not None and coordinator.update in switched)
            ):
                return
            self.go_on(1)

    @rule(data=st.data(), fate=st.sampled_from(["next", "lost", "doubled"]))
    def disturb(self, data: st.DataObject, fate: str) -> None:
        """A message overtakes all others, is lost, or comes twice."""
        if not self.network:
            return
        self.disturb_at(data.draw(st.integers(0, len(self.network) - 1)), fate)

    def disturb_at(self, place: int, fate: str) -> None:
        if fate == "lost":
            del self.network[place]
        elif fate == "next":
            self.deliver(self.network.pop(place))
        else:
            self.network.append(self.network[place])
        self.collect()

    @rule(name=st.sampled_from(NAMES))
    def cut(self, name: str) -> None:
        """A link loses all that is on it."""
        self.network = [packet for packet in self.network if packet.engine != name]

    # The engines

    @rule(
        name=st.sampled_from(NAMES),
        what=st.sampled_from(["call", "idle", "report", "worker", "word"]),
        fails=st.booleans(),
    )
    def move(self, name: str, what: str, fails: bool) -> None:
        """One engine's process goes on, in any order of its parts, and something in it may fail."""
        engine = self.engines[name]
        if what == "call" and engine.calls:
            engine.step(fails)
        elif what == "idle" and engine.pausing is not None:
            engine.become_idle()
        elif what == "report" and engine.outcomes:
            engine.report()
        elif what == "worker":
            for rank, orders in enumerate(engine.orders):
                if orders:
                    engine.work(rank, fails)
                    break
        elif what == "word" and engine.reports:
            engine.hear_worker()
        self.collect()

    @rule(seconds=st.sampled_from([1.0, DEADLINE / 2, DEADLINE + 1]))
    def pass_time(self, seconds: float) -> None:
        note(f"{seconds} s pass")
        self.now += seconds
        for engine in self.engines.values():
            engine.carry_out(engine.participant.tick(self.now))
        self.collect()

    @rule(name=st.sampled_from(NAMES), rare=RARE)
    def crash_engine(self, name: str, rare: bool) -> None:
        """It comes back with the weights that it was started with, and without a memory."""
        if not rare:
            self.go_on(20)
            return
        note(f"{name} crashes")
        self.engines[name] = Engine(log=note)
        self.network = [packet for packet in self.network if packet.engine != name]
        self.exempt.add(name)
        for client in self.clients:
            client.crashed.add(name)
        event("engine crashed")

    @rule(
        names=st.sampled_from([NAMES, *((name,) for name in NAMES)]),
        call=st.sampled_from(["pause", "resume", "resume", "reload"]),
    )
    def another_user_calls(self, names: tuple[str, ...], call: str) -> None:
        """A front end or a person calls vLLM's own interface."""
        note(f"{names}: somebody calls {call}")
        for name in names:
            vllm = self.engines[name].vllm
            if call == "reload":
                vllm.collective_rpc("reload_weights")
            elif call == "pause":
                vllm.pause_scheduler()
            else:
                with contextlib.suppress(RuntimeError):
                    vllm.resume_scheduler()

    # What must hold

    @invariant()
    def no_mixture(self) -> None:
        """No two running engines are on different versions, whoever died or slept or was late."""
        for engine in self.engines.values():
            assert engine.participant.version == engine.version or engine.outcomes, (
                "it says another version than it serves"
            )
            assert engine.reloaded == bool(engine.participant.foreign) or engine.outcomes, "a reload was not noticed"
            if engine.foreign.paused:
                assert not engine.running, "a user's own pause was undone"
            if engine.tainted:
                assert not engine.running, "an engine runs on weights that nobody can vouch for"
        if len({engine.version for engine in self.engines.values()}) == 1 and not any(
            engine.participant.update or engine.participant.tainted for engine in self.engines.values()
        ):
            self.exempt.clear()
        running = {
            engine.version for name, engine in self.engines.items() if engine.running and name not in self.exempt
        }
        assert len(running) <= 1, f"engines run on {running}"

    def teardown(self) -> None:
        """Network and processes heal: every client comes to its end, and nobody is left paused for an update."""
        if not hasattr(self, "engines"):
            return
        self.settle()
        # Whatever was left behind, the next client's take-over ends it.
        for purpose in ("wake", "resume"):
            self.next_client(purpose, dead=True)
            self.settle()
        for name, engine in self.engines.items():
            assert engine.participant.update is None, f"{name} still has an update that is over"
            assert engine.running or engine.tainted, (
                f"{name} is {engine.participant.generation} and nobody will resume it"
            )

    def settle(self) -> None:
        for _ in range(5_000):
            if not (self.network or any(engine.busy for engine in self.engines.values())):
                if not self.clients:
                    return
                for client, caller in self.waiting():  # what was lost is asked again, and answered
                    name, message = client.waiting[caller]
                    self.network.append(Packet(name, caller, message, back=False))
                self.pass_time(1.0)
            self.go_on(1)
        phases = [client.coordinator.phase if client.coordinator else "take-over" for client in self.clients]
        raise AssertionError(f"clients hang in {phases}")


TestTransaction = Transaction.TestCase
TestTransaction.settings = settings(
    settings(),
    stateful_step_count=40 if NIGHTLY else 8,
    # Shrinking takes minutes and does little for a storm; the notes say what happened.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, *([Phase.shrink] if NIGHTLY else [])],
    report_multiple_bugs=False,
)
