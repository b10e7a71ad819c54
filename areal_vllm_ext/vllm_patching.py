"""How vLLM is patched: once each, only for engines of ours, and an engine without its patches does not start.

The patches themselves are in ``engine_core/hooks.py`` (front end and EngineCore) and ``worker/hooks.py`` (workers).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .errors import HookError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm.config import VllmConfig

_EXTENSION = "areal_vllm_ext.worker.extension.WorkerExtension"
ENABLE_VARIABLE = "AREAL_VLLM_ENABLE"

# Why the hook is not in place in this process; empty once it is.
missing_because = "vLLM did not load the plugin areal_vllm_ext (is VLLM_PLUGINS set without it?)"


def is_enabled() -> bool:
    """Return whether AREAL_VLLM_ENABLE switches every engine of this process on, whatever its extension is.

    Raises:
        SettingsError: the variable is neither 1 nor 0.
    """
    value = os.environ.get(ENABLE_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise SettingsError(f"{ENABLE_VARIABLE}: {value!r} is neither 1 nor 0; write one of them")
    return value == "1"


def is_ours(config: VllmConfig) -> bool:
    """Return whether AREAL_VLLM_ENABLE is 1, or ``--worker-extension-cls`` names our extension or a subclass of it."""
    if is_enabled():
        return True
    name = config.parallel_config.worker_extension_cls
    if not name:
        return False
    if name.startswith("areal_vllm_ext."):
        return True
    from vllm.utils.import_utils import resolve_obj_by_qualname

    # Compared by name, because this module lies below the worker's.
    return any(f"{base.__module__}.{base.__qualname__}" == _EXTENSION for base in resolve_obj_by_qualname(name).__mro__)


def patch_once(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``make(original)`` unless that was done before."""
    original = owner.__dict__[name]
    if getattr(original, "_areal_patch", False):
        return
    patched = make(original)
    patched._areal_patch = True
    setattr(owner, name, patched)


def install_patches(patches: Iterable[Callable[[], None]]) -> None:
    """Apply ``patches``. A failure is kept, for ``require`` to raise where it matters."""
    global missing_because  # noqa: PLW0603 - one process, one hook
    missing_because = _apply(patches)


def require(patches: Iterable[Callable[[], None]]) -> None:
    """Apply a worker's ``patches``, and refuse to go on unless these and the installed ones are in place.

    Raises:
        HookError: with the vLLM version, the patch and what to do.
    """
    if problem := missing_because or _apply(patches):
        raise HookError(f"areal_vllm_ext: {problem}")


def _apply(patches: Iterable[Callable[[], None]]) -> str:
    """Apply ``patches``; return why one could not be applied and what to do, or an empty string."""
    from vllm.version import __version__ as vllm_version

    for patch in patches:
        try:
            patch()
        except Exception as error:
            return (
                f"vLLM {vllm_version} cannot be hooked: patch {patch.__name__} failed ({type(error).__name__}: {error}); "
                "use a vLLM that docs/compatibility.md lists, or an areal-vllm-ext made for yours"
            )
    return ""
