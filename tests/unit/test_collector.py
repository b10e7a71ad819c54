"""The garbage collector does not run in an update's short stretches, and is as it was after them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from areal_vllm_ext.process.collector import no_collection


def test_it_is_off_within_the_block_and_on_after_it() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError), no_collection():
        fail()
    assert gc.isenabled()


def test_it_stays_off_where_the_user_has_switched_it_off() -> None:
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_last_of_several_blocks_switches_it_on() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with no_collection():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with no_collection():
        thread.start()
        assert inside.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


FORKED = """
import gc, os
from areal_vllm_ext.process.collector import no_collection
with no_collection():
    if not (child := os.fork()):
        with no_collection():
            within = gc.isenabled()
        os._exit(10 * within + gc.isenabled())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_is_forked_within_a_block_collects() -> None:
    """In a process of one thread: another's locks could stop the child."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "1\n"
