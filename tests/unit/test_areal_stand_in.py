"""A server of ours takes the place of AReaL's, whose module name is written in AReaL's code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from areal_vllm_ext.integrations.areal import server, stand_in

AREAL = "areal.engine.vllm_ext.vllm_worker_extension.VLLMWorkerExtension"
OURS = "areal_vllm_ext.worker.WorkerExtension"


@pytest.fixture
def areal(tmp_path: Path) -> Path:
    """A package with a server of AReaL's name, which says that it was imported."""
    folder = tmp_path / "areal" / "engine" / "vllm_ext"
    folder.mkdir(parents=True)
    for package in (tmp_path / "areal", tmp_path / "areal" / "engine"):
        (package / "__init__.py").touch()
    (folder / "areal_vllm_server.py").write_text("print('upstream')\n")
    return tmp_path


@pytest.mark.parametrize(("value", "expected"), [("1", "ours"), ("0", "upstream"), (None, "upstream")])
def test_the_servers_name_finds_ours_where_it_is_switched_on(areal: Path, value: str | None, expected: str) -> None:
    site = areal / "site"
    site.mkdir()
    stand_in.install(site)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(areal), str(Path.cwd())])}
    env |= {} if value is None else {stand_in.VARIABLE: value}
    # What Python does with a .pth file in its site-packages; the interpreter's own are not touched here.
    start = f"import site; site.addsitedir({str(site)!r})"

    def run(code: str) -> str:
        command = [sys.executable, "-c", f"{start}; {code}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
        assert done.stderr == ""
        return done.stdout.strip()

    upstream = str(areal / "areal/engine/vllm_ext/areal_vllm_server.py")
    found = run(f"import importlib.util; print(importlib.util.find_spec({stand_in.REPLACED!r}).origin)")
    assert found == (server.__file__ if expected == "ours" else upstream)
    # As AReaL starts it, but for the name under which vLLM would be started.
    ran = run(f"import runpy; runpy.run_module({stand_in.REPLACED!r}, run_name='other')")
    assert ran == ("" if expected == "ours" else "upstream")


def test_python_starts_where_the_package_is_gone(tmp_path: Path) -> None:
    stand_in.install(tmp_path)
    env = {**os.environ, "PYTHONPATH": "", stand_in.VARIABLE: "1"}
    start = f"import site; site.addsitedir({str(tmp_path)!r}); print('started')"
    command = [sys.executable, "-S", "-c", start]  # without site-packages
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "started\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model", "m"], ["--model", "m", "--worker-extension-cls", OURS, "--api-server-count", "1"]),
        (
            ["--dist-init-addr", "10.0.0.1:5000", "--worker-extension-cls", AREAL, "--seed", "1"],
            ["--worker-extension-cls", OURS, "--seed", "1", "--api-server-count", "1"],
        ),
        (
            ["--dist-init-addr=h:1", f"--worker_extension_cls={AREAL}"],
            [f"--worker_extension_cls={OURS}", "--api-server-count", "1"],
        ),
        (["--headless", "--worker-extension-cls", "my.Own"], ["--headless", "--worker-extension-cls", "my.Own"]),
        (
            ["--api-server-count", "2", "--worker-extension-cls", OURS],
            ["--api-server-count", "2", "--worker-extension-cls", OURS],
        ),
    ],
)
def test_areals_arguments_become_those_of_vllm_serve(given: list[str], expected: list[str]) -> None:
    assert server.serve_arguments(given) == expected


def test_the_routes_are_added_to_the_plugins_that_are_on() -> None:
    assert server.plugin_names("a,areal_routes") == "a,areal_routes,areal_vllm_ext"
    every = server.plugin_names(None).split(",")
    assert {"areal_vllm_ext", "areal_routes"} <= set(every)
    assert len(every) == len(set(every))
