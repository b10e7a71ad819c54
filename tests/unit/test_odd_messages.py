"""Every request meets an engine in every state, late and out of order: the engine still recovers, and takes the next update.

The states and requests are those that the simulation's coverage counts. So a pair that its rounds have not met is met here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from areal_vllm_ext.control import recovery
from areal_vllm_ext.protocol import (
    Abort,
    Ack,
    AdoptEpoch,
    Answer,
    Begin,
    Bucket,
    Commit,
    Disk,
    EngineRequest,
    Error,
    Fence,
    GetStatus,
    KeepPaused,
    Pause,
    Prepare,
    Resume,
    Sender,
    Sleep,
    Status,
    WakeUp,
    WeightsMismatch,
)
from areal_vllm_ext.protocol.peer_messages import EndOffer, OfferWeights
from areal_vllm_ext.protocol.server import ReplyTo
from chaos.simulation import Engine
from chaos.simulation.coverage import GENERATIONS, IMPOSSIBLE, MESSAGES, UPDATE_PHASES, Coverage

EPOCH = 3  # of what has happened so far
SENDERS = {0: Sender(transfer=Disk(path="/"))}

STATES = [state for state in itertools.product(UPDATE_PHASES, GENERATIONS) if state not in IMPOSSIBLE]


class Rig:
    """An engine whose queues this test moves on."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.coverage = Coverage()
        self._ids = itertools.count()

    @property
    def state(self) -> tuple[str, str]:
        p = self.engine.participant
        phase: str = p.update_phase
        if phase == "idle":
            phase = "tainted" if p.tainted else "stale" if p.stale else phase
        return phase, p.generation

    def ask(self, *messages: EngineRequest) -> ReplyTo:
        for message in messages:
            self.coverage.message(self.engine.participant, message)
            caller = ReplyTo(b"client", next(self._ids).to_bytes(16, "big"))
            self.engine.receive(caller, message, 0.0)
            self.tick()
        return caller

    def tick(self) -> None:
        """Let the engine look at its state, as the endpoint does after each message."""
        self.engine.carry_out(self.engine.participant.tick(0.0))

    def drain(self) -> None:
        """Let everything happen that can."""
        while self.engine.busy:
            self.engine.go_on()
            self.tick()

    def done(self, *messages: EngineRequest) -> Answer | None:
        for message in messages:
            caller = self.ask(message)
            self.drain()
        return self.engine.answers[caller]

    def step(self) -> None:
        """Let the loop begin its next call of ours, past the guard's."""
        while type(self.engine.calls[0]).__name__ == "Guard":
            self.engine.step()
        self.engine.step()


def way(update: str, epoch: int) -> Iterator[EngineRequest]:
    """Yield the requests of an update until its vote."""
    yield Begin(epoch=epoch, update=update, version=update, senders=SENDERS, timeout=60.0)
    yield Bucket(epoch=epoch, update=update, index=0, nbytes=0, segments=())
    yield Prepare(epoch=epoch, update=update, buckets={0: 1})


def pause(update: str = "", epoch: int = EPOCH) -> Pause:
    return Pause(epoch=epoch, mode="keep", kv="keep", timeout=60.0, update=update)


def damage(rig: Rig) -> None:
    """Let a worker find that the weights of the last update are damaged."""
    rig.engine.participant.weights_mismatch(WeightsMismatch(update="first", rank=0, reason="a digest differs"))
    rig.tick()


def bring_to(phase: str, generation: str) -> Rig:
    """Return an engine in a state; its update is ``u``, and ``first`` is committed."""
    rig = Rig()
    rig.done(*way("first", 1), pause("first", 1), Commit(epoch=1, update="first"), Resume(epoch=1, update="first"))
    for_update = "u" if phase in ("prepared", "committing") else ""
    if phase in ("receiving", "prepared", "committing"):
        begin, *others = way("u", EPOCH)
        rig.done(begin, *(others if phase != "receiving" else []))
    if generation != "running" and not (phase in ("tainted", "stale") and generation != "resuming"):
        rig.ask(pause(for_update))
        if generation == "pausing":
            rig.step()
        else:
            rig.drain()
    if generation == "resuming":
        rig.ask(Resume(epoch=EPOCH))
    match phase:
        case "committing":
            rig.ask(Commit(epoch=EPOCH, update="u"))
        case "tainted":
            damage(rig)
        case "stale":
            rig.engine.carry_out(rig.engine.participant.on_group_epoch("newer", 2))
    if phase in ("tainted", "stale") and generation == "paused":
        rig.drain()
    assert rig.state == (phase, generation)
    return rig


REQUESTS: dict[str, Callable[[str, int], EngineRequest]] = {
    "AdoptEpoch": lambda _, epoch: AdoptEpoch(epoch=epoch),
    "Abort": lambda update, epoch: Abort(epoch=epoch, update=update, reason="its client is gone"),
    "Begin": lambda update, epoch: next(way(update, epoch)),
    "Bucket": lambda update, epoch: Bucket(epoch=epoch, update=update, index=0, nbytes=0, segments=()),
    "Commit": lambda update, epoch: Commit(epoch=epoch, update=update),
    "EndOffer": lambda _, __: EndOffer(fetch="f"),
    "Fence": lambda _, epoch: Fence(epoch=epoch),
    "GetStatus": lambda _, __: GetStatus(),
    "KeepPaused": lambda _, __: KeepPaused(holder="somebody", lease=10.0),
    "OfferWeights": lambda _, epoch: OfferWeights(fetch="f", committed_epoch=epoch, timeout=5.0),
    "Pause": pause,
    "Prepare": lambda update, epoch: Prepare(epoch=epoch, update=update, buckets={0: 1}),
    "Resume": lambda update, epoch: Resume(epoch=epoch, update=update),
    "Sleep": lambda _, epoch: Sleep(epoch=epoch, level=1, timeout=60.0),
    "WakeUp": lambda _, epoch: WakeUp(epoch=epoch, timeout=60.0),
}


def recover(rig: Rig, epoch: int) -> None:
    """Do what a successor does, for a group of this one engine."""
    for _ in range(5):
        status = rig.done(Fence(epoch=epoch))
        assert isinstance(status, Status)
        plan = recovery.plan({"engine": status}, epoch)
        for requests in (plan.resolve, plan.adopt, plan.resume):
            for request in requests.values():
                answer = rig.done(request)
                assert not isinstance(answer, Error), answer
        if not (plan.resolve or plan.adopt or plan.resume or plan.wait):
            return
    pytest.fail(f"a successor does not come to an end: {rig.state}")


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("state", STATES, ids=" ".join)
def test_an_engine_recovers_from_every_request_in_every_state(state: tuple[str, str], message: str) -> None:
    for update, epoch in (("u", EPOCH), ("first", EPOCH), ("another", EPOCH), ("u", EPOCH + 1), ("u", EPOCH - 1)):
        rig = bring_to(*state)
        caller = rig.ask(REQUESTS[message](update, epoch))
        rig.drain()
        assert rig.coverage.messages[(*state, message)] >= 1
        assert rig.engine.answers[caller] is not None, "every request is answered"
        if message == "Sleep":
            assert isinstance(rig.done(WakeUp(epoch=EPOCH + 2, timeout=60.0)), Ack)
        recover(rig, EPOCH + 2)
        versions = {"first", "u"} if state[0] == "committing" or message == "Commit" else {"first"}
        assert rig.engine.version in versions
        new = EPOCH + 3
        for request in (*way("new", new), pause("new", new), Commit(epoch=new, update="new"), Resume(epoch=new)):
            assert isinstance(answer := rig.done(request), Ack), (request, answer)
        assert (rig.engine.version, rig.engine.participant.version) == ("new", "new")
        assert rig.engine.running
        assert rig.state == ("idle", "running")
