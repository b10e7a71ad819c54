"""A run of the tests says what it left out, and in CI a test that is skipped fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILE = """
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("dtype", "ab")
def test_of_a_gpu(dtype):
    pytest.skip("needs a CUDA device")

def test_of_a_tool():
    pytest.skip("needs iproute2")

def test_that_runs():
    pass

def test_that_is_not_selected():
    pass
"""


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    """A folder of tests with the real ``tests/conftest.py``."""
    folder = tmp_path / "tests"
    for name in ("unit", "integration"):
        (folder / name).mkdir(parents=True)
        (folder / name / "conftest.py").touch()
    shutil.copy(Path(__file__).parent.parent / "conftest.py", folder)
    (folder / "unit" / "test_some.py").write_text(FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests/unit tests/integration\nmarkers = gpu")
    return folder


def run(tests: Path, *arguments: str, ci: bool = False) -> tuple[int, list[str]]:
    """Run pytest there; returns its exit code and the last lines of its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "CI"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=tests.parent,
        env={**environment, "CI": "true"} if ci else environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_a_run_says_what_it_left_out(tests: Path) -> None:
    code, lines = run(tests, "tests/unit", "-n", "1", "-k", "not selected")
    assert code == 0
    assert [line for line in lines if line.startswith("left out:")] == [
        "left out: 2 tests: needs a CUDA device",
        "left out: 1 test: needs iproute2",
        "left out: 1 test: not selected by -k not selected",
        "left out: all of tests/integration: not named on the command line",
    ]
    assert lines[-1].startswith("1 passed, 3 skipped")


def test_a_run_that_leaves_nothing_out_says_so(tests: Path) -> None:
    code, lines = run(tests, "tests/unit/test_some.py::test_that_runs", "tests/integration")
    assert (code, [line for line in lines if "left out:" in line]) == (0, ["left out: nothing"])


def test_only_a_gpu_may_be_missing_in_ci(tests: Path) -> None:
    code, lines = run(tests, "-n", "0", ci=True)
    assert code == 1
    assert lines[-1].startswith("1 failed, 2 passed, 2 skipped")
    assert any("test_of_a_tool" in line and "skipped in CI" in line and "needs iproute2" in line for line in lines)


def test_a_file_that_imports_a_large_module_when_it_is_collected_fails(tests: Path) -> None:
    (tests / "unit" / "vllm.py").touch()  # stands in for it: that one takes seconds
    (tests / "unit" / "test_slow.py").write_text("import vllm\n\ndef test_it():\n    pass\n")
    code, lines = run(tests, "tests/unit/test_slow.py")
    assert code == 2
    assert "imports vllm when it is collected: use lazily.Lazily" in lines
