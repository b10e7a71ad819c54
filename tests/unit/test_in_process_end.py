"""A program with an in-process engine ends as it wishes, whatever the engine's endpoint asks meanwhile."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import atexit, threading
from areal_vllm_ext.engine_core.between_steps import calls_between_steps

run = calls_between_steps(threading.RLock())
done = threading.Event()
run(done.set)
assert done.wait(10)
# Such handlers run when Python takes no more work for the threads of pools.
atexit.register(run, lambda: print("ran"))
print("ends")
"""


def test_a_call_at_the_end_of_the_program_is_left_out() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ends\n")
    assert "atexit" not in done.stderr
