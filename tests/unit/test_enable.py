"""AREAL_VLLM_ENABLE=1: engines of ours without the slot for a worker extension, and none that starts without the hook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lazily import Lazily

from areal_vllm_ext import HookError, SettingsError, plugin, vllm_patching
from areal_vllm_ext.engine_core import hooks
from areal_vllm_ext.worker import extension, user_methods
from areal_vllm_ext.worker.extension import WorkerExtension

base = Lazily("vllm.v1.worker.worker_base")


class Theirs:
    """An extension of another package, which takes the slot."""

    def theirs(self) -> str:
        return "theirs"


class Both(Theirs, WorkerExtension):
    """What a user writes instead of the variable."""


def worker_of(extension: str = "", *mixed: type) -> Any:
    """A worker as vLLM makes it, without a model; ``mixed``: classes that it also is."""
    return type("Worker", (base.WorkerBase, *mixed), {})(extension)


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_VLLM_ENABLE", "1")


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own initialiser would need a model; the patch is put around a small one."""

    def __init__(self: Any, extension: str) -> None:
        self.vllm_config = _config(extension)

    monkeypatch.setattr(base.WorkerBase, "__init__", __init__)
    monkeypatch.setattr(vllm_patching, "missing_because", "")
    plugin.register()


def _config(extension: str) -> Any:
    return SimpleNamespace(parallel_config=SimpleNamespace(worker_extension_cls=extension))


def test_a_worker_with_a_foreign_extension_gets_our_methods(enabled: None) -> None:
    worker = worker_of(f"{__name__}.Theirs")
    ours = [name for name in vars(WorkerExtension) if name.startswith("areal_")]
    assert len(ours) > 3
    assert all(callable(getattr(worker, name)) for name in ours)
    assert not hasattr(base.WorkerBase, "areal_attach"), (
        "so the extension of another engine in this process has no collision"
    )
    assert vllm_patching.is_ours(worker.vllm_config)


def test_without_the_variable_a_worker_is_left_alone() -> None:
    worker = worker_of(f"{__name__}.Theirs")
    assert not hasattr(worker, "areal_attach")
    assert not vllm_patching.is_ours(worker.vllm_config)


def test_a_class_of_both_needs_no_variable() -> None:
    assert vllm_patching.is_ours(_config(f"{__name__}.Both"))


def test_methods_of_the_foreign_extension_can_be_called(enabled: None) -> None:
    mixed = worker_of(f"{__name__}.Theirs", Theirs)
    assert user_methods.call(mixed, "theirs", b"\x90", 99)[1:] == ("", "")
    _, kind, message = user_methods.call(worker_of(), "theirs", b"\x90", 99)
    assert kind == "LookupError"
    assert "have no worker extension: define it in a class" in message


def test_no_process_goes_on_without_the_hook(enabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise AttributeError("vLLM has no such method")

    monkeypatch.setattr(hooks, "ENGINE_PATCHES", (absent,))
    with pytest.raises(HookError, match=r"cannot be hooked: patch absent failed .*; use a vLLM"):
        plugin.register()
    monkeypatch.delenv("AREAL_VLLM_ENABLE")
    plugin.register()  # it may be an engine that has nothing to do with this package


def test_a_worker_whose_process_is_not_hooked_is_not_made(enabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_patching, "missing_because", "vLLM 1.0 cannot be hooked")
    with pytest.raises(HookError, match="cannot be hooked"):
        worker_of()


@pytest.mark.parametrize("value", ["yes", "true", "2"])
def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AREAL_VLLM_ENABLE", value)
    with pytest.raises(SettingsError, match=f"AREAL_VLLM_ENABLE: '{value}' is neither 1 nor 0"):
        plugin.register()


def test_the_time_before_the_model_load_is_noted_with_the_extension() -> None:
    """A checkpoint that is written while vLLM loads it is found by that time."""
    assert "startup" in vars(extension)
