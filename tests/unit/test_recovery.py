"""What a client does about an update that its predecessor left behind."""

from __future__ import annotations

from typing import Any

import msgspec
from engine_infos import engine_info

from areal_vllm_ext.control import recovery
from areal_vllm_ext.protocol import Abort, AdoptEpoch, Commit, Resume, Status

ENGINE = engine_info()
IDLE = Status(
    engine=ENGINE,
    version=1,
    update_phase="idle",
    generation="running",
    pause_mode=None,
    paused_for="",
    epoch=3,
    update="",
    last_update="",
    requests_running=0,
    requests_waiting=0,
    waiting_for_engine=0.0,
)


def status(**changes: Any) -> Status:
    return msgspec.structs.replace(IDLE, **changes)


def plan(**statuses: Status) -> recovery.Recovery:
    return recovery.plan(statuses, 3)


def test_nothing_to_do_for_engines_that_serve() -> None:
    found = plan(a=IDLE, b=status(version=2))
    assert (found.resolve, found.resume, found.wait) == ({}, {}, False)


def test_an_update_that_nobody_committed_is_aborted_everywhere() -> None:
    prepared = status(update_phase="prepared", generation="paused", update="u", paused_for="u")
    found = plan(a=prepared, b=status(update_phase="receiving", update="u"))
    assert {name: type(request) for name, request in found.resolve.items()} == {"a": Abort, "b": Abort}
    assert found.resume == {}, "only then an engine tells whether it is tainted or stale"
    aborted = status(generation="paused", paused_for="u")
    assert plan(a=aborted, b=IDLE).resume == {"a": Resume(epoch=3, update="u")}


def test_an_update_that_one_engine_committed_is_committed_everywhere() -> None:
    prepared = status(update_phase="prepared", generation="paused", update="u", paused_for="u")
    committed = status(generation="paused", last_update="u", version=2, paused_for="u")
    found = plan(a=prepared, b=committed)
    assert found.resolve == {"a": Commit(epoch=3, update="u")}
    assert found.resume == {}
    assert set(plan(a=committed, b=committed).resume) == {"a", "b"}


def test_a_users_own_pause_stays() -> None:
    found = plan(a=status(generation="paused"), b=status(generation="paused", paused_for="u"))
    assert set(found.resume) == {"b"}


def test_a_tainted_engine_is_not_resumed() -> None:
    assert plan(a=status(update_phase="tainted", generation="paused", paused_for="u")).resume == {}


def test_an_engine_that_is_switching_is_waited_for() -> None:
    assert plan(a=status(update_phase="committing", generation="paused", update="u", paused_for="u")).wait


def test_an_update_that_one_engine_is_switching_to_is_not_aborted_elsewhere() -> None:
    prepared = status(update_phase="prepared", generation="paused", update="u", paused_for="u")
    switching = status(update_phase="committing", generation="paused", update="u", paused_for="u")
    assert not any(isinstance(request, Abort) for request in plan(a=prepared, b=switching).resolve.values())


# Engines that are away, behind, or paused by somebody who is gone


def test_where_one_is_away_the_others_agree_anew_before_they_resume() -> None:
    prepared = status(update_phase="prepared", generation="paused", update="u", paused_for="u", committed_epoch=2)
    found = recovery.plan({"a": prepared, "b": prepared}, 3, all_here=False)
    assert found.adopt == {"a": AdoptEpoch(epoch=3), "b": AdoptEpoch(epoch=3)}
    assert found.resume == {}
    assert plan(a=prepared, b=prepared).adopt == {}
    committed = status(last_update="u", generation="paused", paused_for="u", committed_epoch=3)
    gone_forward = recovery.plan({"a": prepared, "b": committed}, 3, all_here=False)
    assert gone_forward.adopt == {}, "whoever is away has switched, or can"


def test_an_engine_that_is_behind_stays_paused() -> None:
    behind = status(update_phase="prepared", generation="paused", update="u", paused_for="u", committed_epoch=2)
    ahead = status(last_update="w", committed_epoch=3)
    found = plan(a=behind, b=ahead)
    assert isinstance(found.resolve["a"], Abort)
    assert found.resume == {}
    stale = status(update_phase="stale", generation="paused", paused_for="stale", committed_epoch=2)
    assert plan(a=stale, b=ahead) == recovery.Recovery({}, {}, {}, wait=False)


def test_what_recovery_resumes_after_an_update_leaves_a_users_own_pause_alone() -> None:
    assert plan(a=status(generation="paused", paused_for="u")).resume == {"a": Resume(epoch=3, update="u")}


def test_a_replica_in_which_one_sleeps_is_not_resumed() -> None:
    orphan = status(generation="paused", orphaned=True)
    assert plan(a=orphan, b=status(generation="paused", sleep="asleep_1")).resume == {}


def test_one_orphan_resumes_its_whole_replica() -> None:
    orphan = status(generation="paused", orphaned=True)
    paused = status(generation="paused")
    elsewhere = status(generation="paused", engine=msgspec.structs.replace(ENGINE, replica="other"))
    found = plan(a=orphan, b=paused, c=elsewhere).resume
    assert found == {name: Resume(epoch=3) for name in ("a", "b")}, "which ends a user's own pause"
    assert plan(b=paused, c=elsewhere).resume == {}
