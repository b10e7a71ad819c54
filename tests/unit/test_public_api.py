"""What is exported, what a type checker sees of it, and what it imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import areal_vllm_ext

HEAVY = ("torch", "numpy", "vllm", "rich", "transformers")


def heavy_imports_of(code: str) -> set[str]:
    """The heavy packages that a new interpreter has imported after ``code``."""
    show = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import areal_vllm_ext",
        "from areal_vllm_ext import EngineGroup; EngineGroup.connect().close()",
        "from areal_vllm_ext import AsyncEngineGroup, EngineInfo, EngineState, UpdateOptions, UpdateResult, ArealError",
        "import areal_vllm_ext.control.directory_server",
        "import areal_vllm_ext.plugin",
    ],
)
def test_the_control_plane_never_imports_torch(code: str) -> None:
    assert heavy_imports_of(code) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "--timeout", "0.2"],
        ["status", "--engines", "2", "--timeout", "0.2"],
        ["pause", "--timeout", "0.2"],
        ["resume", "--timeout", "0.2"],
        ["keygen", "/proc/nowhere/cluster.key"],
        ["--help"],
    ],
)
def test_commands_of_the_control_plane_never_import_torch(arguments: list[str]) -> None:
    code = f"""
import contextlib
from areal_vllm_ext import cli
with contextlib.suppress(SystemExit):
    cli.main({arguments!r})
"""
    assert heavy_imports_of(code) == set()


def test_every_exported_name_is_there() -> None:
    assert dir(areal_vllm_ext) == sorted(areal_vllm_ext.__all__)
    for name in areal_vllm_ext.__all__:
        assert getattr(areal_vllm_ext, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        areal_vllm_ext.Nonsense  # noqa: B018
