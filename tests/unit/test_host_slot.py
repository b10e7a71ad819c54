"""Engines without a configured name get numbers: different while they live, the same after a restart."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator

import pytest

from areal_vllm_ext.process import host_slot
from areal_vllm_ext.process.host_slot import HostSlot

HOLD = """
import sys
from areal_vllm_ext.process.host_slot import HostSlot
slot = HostSlot(sys.argv[1])
print(slot.number, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def purpose() -> str:
    return uuid.uuid4().hex


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    """No socket is left to the garbage collector."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert not warned


def hold(purpose: str) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", HOLD, purpose]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, int(process.stdout.readline())


def test_several_of_one_process_differ_and_a_closed_one_is_free(purpose: str) -> None:
    slots = [HostSlot(purpose) for _ in range(3)]
    assert [slot.number for slot in slots] == [0, 1, 2]
    slots[1].close()
    slots[1].close()
    again = HostSlot(purpose)
    assert again.number == 1
    for slot in (*slots, again):
        slot.close()


def test_siblings_differ_and_a_killed_one_gets_its_number_again(purpose: str) -> None:
    first, second = hold(purpose), hold(purpose)
    assert [number for _, number in (first, second)] == [0, 1]
    first[0].kill()
    first[0].communicate()
    third = hold(purpose)
    assert third[1] == 0
    for process, _ in (second, third):
        process.communicate()


def test_a_child_does_not_hold_it(purpose: str) -> None:
    slot = HostSlot(purpose)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    slot.close()
    again = HostSlot(purpose)
    assert again.number == 0
    again.close()
    child.communicate()


def test_without_abstract_sockets_it_says_so(purpose: str) -> None:
    with nothing_left_open(), pytest.raises(OSError, match="too long"):
        HostSlot(purpose + "x" * 200)


def test_where_all_numbers_are_taken_it_says_so(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_slot, "_MAX_SLOTS", 2)
    slots = [HostSlot(purpose), HostSlot(purpose)]
    with nothing_left_open(), pytest.raises(OSError, match="all 2 slots of this host are taken"):
        HostSlot(purpose)
    for slot in slots:
        slot.close()
