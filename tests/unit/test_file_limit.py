"""The limit on open files is raised where strangers may hold connections open."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, {before})
{call}
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
RAISE = """
from areal_vllm_ext.process import file_limit
file_limit.WANTED_FILES = {wanted}
file_limit.raise_file_limit()
"""
REGISTER = """
import contextlib, sys
sys.modules["vllm"] = None  # its import takes seconds, and the limit is raised before
from areal_vllm_ext import plugin
with contextlib.suppress(ImportError):
    plugin.register()
"""


def limits(call: str, before: tuple[int, int]) -> tuple[int, ...]:
    script = LIMIT.format(before=before, call=call)
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return tuple(map(int, answer.stdout.split()))


@pytest.mark.parametrize(
    ("before", "wanted", "after"),
    [
        ((1024, 4096), 65_536, (4096, 4096)),
        ((1024, 4096), 2000, (2000, 4096)),
        ((3000, 4096), 2000, (3000, 4096)),
        ((256, 256), 65_536, (256, 256)),
    ],
)
def test_the_soft_limit_is_raised_within_the_hard_one(
    before: tuple[int, int], wanted: int, after: tuple[int, int]
) -> None:
    assert limits(RAISE.format(wanted=wanted), before) == after


def test_the_plugin_raises_it_in_every_process_of_vllm() -> None:
    assert limits(REGISTER, (1024, 4096)) == (4096, 4096)
