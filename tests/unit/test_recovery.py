"""What a client does about an update that its predecessor left behind."""

from __future__ import annotations

from typing import Any

import msgspec

from areal_vllm_ext.client import recovery
from areal_vllm_ext.protocol import Abort, Commit, EngineInfo, Resume, Status

ENGINE = EngineInfo(
    replica="r",
    dp_rank=0,
    dp_size=2,
    headless=False,
    node="n",
    pid=1,
    incarnation="i",
    address="tcp://127.0.0.1:1",
    model="m",
    dtype="float32",
    device="cpu",
    vllm_version="0.32.0",
    package_version="0",
)
IDLE = Status(
    engine=ENGINE,
    version=1,
    phase="idle",
    flow="running",
    pause_mode=None,
    paused_for="",
    epoch=3,
    update="",
    update_version=None,
    last_update="",
    requests_running=0,
    requests_waiting=0,
    waiting_for_engine=0.0,
)


def status(**changes: Any) -> Status:
    return msgspec.structs.replace(IDLE, **changes)


def plan(**statuses: Status) -> recovery.Recovery:
    return recovery.plan(statuses, dict.fromkeys(statuses, 3), timeout=5.0)


def test_nothing_to_do_for_engines_that_serve() -> None:
    found = plan(a=IDLE, b=status(version=2))
    assert (found.settle, found.resume, found.wait) == ({}, {}, False)


def test_an_update_that_nobody_committed_is_aborted_everywhere() -> None:
    prepared = status(phase="prepared", flow="paused", update="u", paused_for="u")
    found = plan(a=prepared, b=status(phase="receiving", update="u"))
    assert {name: type(request) for name, request in found.settle.items()} == {"a": Abort, "b": Abort}
    assert isinstance(found.resume["a"], Resume)
    assert "b" not in found.resume


def test_an_update_that_one_engine_committed_is_committed_everywhere() -> None:
    prepared = status(phase="prepared", flow="paused", update="u", paused_for="u")
    committed = status(flow="paused", last_update="u", version=2, paused_for="u")
    found = plan(a=prepared, b=committed)
    assert found.settle == {"a": Commit(epoch=3, update="u")}
    assert set(found.resume) == {"a", "b"}


def test_a_users_own_pause_stays() -> None:
    found = plan(a=status(flow="paused"), b=status(flow="paused", paused_for="u"))
    assert set(found.resume) == {"b"}


def test_a_tainted_engine_is_not_resumed() -> None:
    assert plan(a=status(phase="tainted", flow="paused", paused_for="u")).resume == {}


def test_an_engine_that_is_switching_is_waited_for() -> None:
    assert plan(a=status(phase="committing", flow="paused", update="u", paused_for="u")).wait


def test_an_update_that_one_engine_is_switching_to_is_not_aborted_elsewhere() -> None:
    prepared = status(phase="prepared", flow="paused", update="u", paused_for="u")
    switching = status(phase="committing", flow="paused", update="u", paused_for="u")
    assert not any(isinstance(request, Abort) for request in plan(a=prepared, b=switching).settle.values())
