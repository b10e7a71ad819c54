"""Whom a command reaches, when the directory's answers are known."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import msgspec
import pytest
from engine_infos import engine_info

from areal_vllm_ext.control.command import Commander, Target
from areal_vllm_ext.control.link import Link
from areal_vllm_ext.engine_core.participant import Participant
from areal_vllm_ext.engine_core.status import status_of
from areal_vllm_ext.errors import EnginesMissing, EngineUnreachable
from areal_vllm_ext.protocol import (
    Abort,
    Ack,
    AcquireLease,
    AdoptEpoch,
    Answer,
    Commit,
    Discover,
    EngineInfo,
    Engines,
    Fence,
    Lease,
    Message,
    Resume,
    Status,
)

FIRST, SECOND = engine_info(0), engine_info(1, address="tcp://127.0.0.1:2")
DIRECTORY = "tcp://127.0.0.1:3"


class Played(Link):
    """The real link's calls, answered by a directory and by two engines.

    Attributes:
        engines: what the directory says in its next answers; the last one stays.
        silent: the engines that do not answer.
        statuses: what each engine says when it is fenced, by address.
        sent: what was asked of each engine, by DP rank.
    """

    def __init__(self, *engines: Engines) -> None:
        super().__init__(lambda _: None, 1 << 20)  # type: ignore[arg-type, return-value]
        self.engines = list(engines)
        self.silent: set[str] = set()
        self.statuses = {one.address: status(one) for one in (FIRST, SECOND)}
        self.sent: list[tuple[int, Message]] = []

    async def request(self, address: str, message: Message, timeout: float) -> Answer:
        assert address == DIRECTORY
        if not isinstance(message, AcquireLease | Discover):
            return Ack()
        engines = self.engines.pop(0) if len(self.engines) > 1 else self.engines[0]
        return Lease(epoch=2, seconds=10, engines=engines) if isinstance(message, AcquireLease) else engines

    async def request_all(  # type: ignore[override]
        self, requests: Mapping[str, tuple[str, Message]], timeout: float
    ) -> dict[str, Answer | EngineUnreachable]:
        return {name: self._answer(address, message) for name, (address, message) in requests.items()}

    def _answer(self, address: str, message: Message) -> Answer | EngineUnreachable:
        if address in self.silent:
            return EngineUnreachable("it does not answer")
        before = self.statuses[address]
        self.sent.append((before.engine.dp_rank, message))
        if isinstance(message, Fence):
            return before
        if isinstance(message, Commit):
            changes = {"version": "new", "last_update": "u", "committed_epoch": 1}
            self.statuses[address] = msgspec.structs.replace(before, update_phase="idle", update="", **changes)
        elif isinstance(message, Abort):
            self.statuses[address] = msgspec.structs.replace(before, update_phase="idle", update="")
        elif isinstance(message, Resume):
            self.statuses[address] = msgspec.structs.replace(before, generation="running", paused_for="")
        return Ack()


def status(engine: EngineInfo, **changes: object) -> Status:
    return msgspec.structs.replace(status_of(Participant("old", frozenset((0,))), engine), **changes)


def commanded(link: Played, *, dropped: tuple[EngineInfo, ...] = (), seconds: float = 10.0) -> list[int]:
    """Return the DP ranks that a command reaches."""

    async def run() -> list[int]:
        commander = Commander(link, DIRECTORY)
        commander.drop(dropped)
        async with commander.command("update", seconds) as targets:
            return [target.engine.dp_rank for target in targets.values()]

    return asyncio.run(run())


def test_recovery_waits_for_engines_that_are_joining() -> None:
    """After a restart of the directory they may serve what an engine in doubt must commit."""
    joining = Engines(alive=(FIRST,), joining=(SECOND,))
    link = Played(joining, joining, Engines(alive=(FIRST, SECOND)))  # the lease, who is there, and a heartbeat later
    link.statuses[FIRST.address] = status(
        FIRST, update_phase="prepared", generation="paused", update="u", paused_for="u"
    )
    link.statuses[SECOND.address] = status(SECOND, version="new", last_update="u", committed_epoch=1)
    asyncio.run(Commander(link, DIRECTORY).recover(10, resume=True))
    decided = [(rank, type(message)) for rank, message in link.sent if not isinstance(message, Fence)]
    assert decided == [(0, Commit), (0, Resume)]
    assert {rank for rank, _ in link.sent} == {0, 1}, "both were fenced"


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_forgotten_engine_may_have_committed_what_the_others_abort(forgotten: bool) -> None:
    """So they adopt the new epoch, and it is stale should it come back."""
    gone = ((SECOND.replica, SECOND.dp_rank),) if forgotten else ()
    link = Played(Engines(alive=(FIRST,) if forgotten else (FIRST, SECOND), forgotten=gone))
    for engine in (FIRST, SECOND):
        link.statuses[engine.address] = status(engine, update_phase="prepared", generation="paused", update="u")
    asyncio.run(Commander(link, DIRECTORY).recover(10, resume=True))
    assert any(isinstance(message, AdoptEpoch) for _, message in link.sent) == forgotten


def test_a_command_does_not_go_on_without_a_lost_engine() -> None:
    link = Played(Engines(alive=(FIRST,), lost=((SECOND, 6.0),)))
    with pytest.raises(EnginesMissing, match=r"DP rank 1 .* is lost"):
        commanded(link, seconds=0.5)
    assert link.sent == []


def test_a_command_goes_on_without_a_dropped_engine_that_the_directory_does_not_hear() -> None:
    assert commanded(Played(Engines(alive=(FIRST,), lost=((SECOND, 6.0),))), dropped=(SECOND,)) == [0]


def test_a_command_does_not_go_on_without_a_dropped_engine_that_the_directory_hears() -> None:
    """Another client, or the directory, may have resumed it."""
    link = Played(Engines(alive=(FIRST, SECOND)))
    link.silent = {SECOND.address}
    with pytest.raises(EngineUnreachable, match=r"DP rank 1 .* does not answer"):
        commanded(link, dropped=(SECOND,))


def test_a_command_does_not_go_on_without_a_dropped_engine_that_was_back() -> None:
    """A directory that has restarted since does not know of it, so it cannot say when it was heard."""
    link = Played(Engines(alive=(FIRST, SECOND)))

    async def run() -> None:
        commander = Commander(link, DIRECTORY)
        commander.drop((SECOND,))
        async with commander.command("update", 10.0) as targets:
            assert len(targets) == 2
        link.engines = [Engines(alive=(FIRST,))]
        async with commander.command("update", 0.5):
            pass

    with pytest.raises(EnginesMissing, match="DP rank 1"):
        asyncio.run(run())


@pytest.mark.parametrize(("paused_for", "resumes"), [("", False), ("u", True), ("stale", True)])
def test_what_was_paused_for_an_update_or_its_weights_runs_after_an_update(paused_for: str, resumes: bool) -> None:
    assert Target(FIRST, 2, status(FIRST, generation="paused", paused_for=paused_for)).resumes == resumes
