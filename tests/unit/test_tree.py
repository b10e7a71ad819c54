"""The checks of ``make lint`` that are not ruff's or mypy's: they are red where they should be."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
_spec = importlib.util.spec_from_file_location("check_tree", ROOT / "tools" / "check_tree.py")
assert _spec is not None
assert _spec.loader is not None
check_tree = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_tree)


def test_a_long_file_gives_its_reason(tmp_path: Path) -> None:
    limit = check_tree.MOST_LINES
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "long.py").write_text("x = 1\n" * (limit + 1))
    (tmp_path / "reasoned.py").write_text(
        '"""A machine.\n\nOver 450 lines: it is one machine."""\n' + "x = 1\n" * limit
    )
    (tmp_path / "short.py").write_text("x = 1\n" * limit)
    (problem,) = check_tree.long_files(tmp_path)
    assert "folder/long.py: 451 lines" in problem


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    for subject in (
        "core: a commit from before the rules",
        "Refuse a second pause: two clients took it for theirs",
        "core: refuse a second pause",
        "make bench: fan-out as its result was made",
        "R" + "e" * 72,
    ):
        git(tmp_path, "commit", "-q", "--allow-empty", "-m", subject)
    return tmp_path


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=repository, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def test_subjects_are_short_and_have_no_prefix(repository: Path) -> None:
    too_long, words, prefixed = check_tree.bad_subjects(
        repository, since=git(repository, "rev-list", "--max-parents=0", "HEAD")
    )
    assert "has 73 characters, 72 at most" in too_long
    assert "has a prefix: make bench: fan-out" in words
    assert "has a prefix: core: refuse a second pause" in prefixed


def test_a_shallow_clone_checks_the_commits_that_it_has(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = git(repository, "rev-list", "--max-parents=0", "HEAD")
    clone = tmp_path_factory.mktemp("shallow") / "clone"
    git(repository, "clone", "-q", "--depth=1", f"file://{repository}", str(clone))
    (problem,) = check_tree.bad_subjects(clone, since=first)
    assert "has 73 characters" in problem


def test_an_archive_without_git_has_no_subjects(tmp_path: Path) -> None:
    assert check_tree.bad_subjects(tmp_path) == []


@pytest.mark.parametrize("line", ["from areal_vllm_ext import client", "from ..client.group import AsyncEngineGroup"])
def test_an_upward_import_breaks_the_contracts(tmp_path: Path, line: str) -> None:
    package = tmp_path / "areal_vllm_ext"
    shutil.copytree(ROOT / "areal_vllm_ext", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    module = package / "transport" / "slots.py"
    module.write_text(f"{module.read_text()}\n{line}\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "areal_vllm_ext.transport is not allowed to import areal_vllm_ext.client" in done.stdout
