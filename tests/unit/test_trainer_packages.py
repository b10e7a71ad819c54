"""What the integrations of trainers share: numbering, a module that is changed at its import, Ray's hook."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from areal_vllm_ext import SettingsError
from areal_vllm_ext.integrations import openrlhf, skyrl
from areal_vllm_ext.integrations.syncs import warn_unless_tested
from areal_vllm_ext.integrations.when_imported import when_imported

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a module that nobody has imported."""
    folder = tmp_path / "some_trainer"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "sync.py").write_text("made = ['theirs']\ndef send():\n    return 'theirs'\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_trainer.sync"
    for name in ("some_trainer", "some_trainer.sync"):
        sys.modules.pop(name, None)


def replace(module: object) -> None:
    module.made.append("ours")  # type: ignore[attr-defined]
    module.send = lambda: "ours"  # type: ignore[attr-defined]


def test_a_module_is_changed_once_when_it_is_imported(package: str) -> None:
    finders = len(sys.meta_path)
    when_imported(package, replace)
    module = importlib.import_module(package)
    assert (module.made, module.send()) == (["theirs", "ours"], "ours")
    assert len(sys.meta_path) == finders
    importlib.reload(module)
    assert module.made == ["theirs"], "a reload gives their module"


def test_a_module_that_is_imported_already_is_changed_at_once(package: str) -> None:
    module = importlib.import_module(package)
    when_imported(package, replace)
    assert module.send() == "ours"


@pytest.mark.parametrize("trainer", [skyrl, openrlhf])
def test_rays_hook_keeps_what_the_trainer_gave(trainer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_VLLM_DIRECTORY", "tcp://head:29700")
    monkeypatch.setenv("AREAL_VLLM_KEY_FILE", "driver.key")
    theirs = {"working_dir": None, "env_vars": {"THEIRS": "1", "AREAL_VLLM_KEY_FILE": "worker.key"}}
    found = trainer.runtime_env(theirs)  # type: ignore[attr-defined]
    assert found == {
        "working_dir": None,
        "worker_process_setup_hook": f"{trainer.__name__}.use_areal",  # type: ignore[attr-defined]
        "env_vars": {"THEIRS": "1", "AREAL_VLLM_KEY_FILE": "worker.key", "AREAL_VLLM_DIRECTORY": "tcp://head:29700"},
    }
    assert trainer.runtime_env(None)["worker_process_setup_hook"]  # type: ignore[attr-defined]
    with pytest.raises(SettingsError, match="worker_process_setup_hook already"):
        trainer.runtime_env({"worker_process_setup_hook": "their.hook"})  # type: ignore[attr-defined]


def test_another_version_than_was_tested_is_said_in_one_line() -> None:
    with pytest.warns(UserWarning, match=r"^pytest .*: the integration was tested on 0\.1\.0 only; .*first updates$"):
        warn_unless_tested("pytest", "0.1.0")
    with pytest.warns(UserWarning, match="of unknown version"):
        warn_unless_tested("some-trainer-that-runs-from-its-sources", "0.1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unless_tested("pytest", ".".join([*pytest.__version__.split(".")[:2], "999"]))
