"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in its front end, in every EngineCore and in every worker."""

from __future__ import annotations


def register() -> None:
    """Put the hooks in place. Inert unless an engine has our ``--worker-extension-cls``, or AREAL_VLLM_ENABLE is 1.

    Raises:
        HookError: AREAL_VLLM_ENABLE is 1 and vLLM cannot be hooked, so this process must not go on.
        SettingsError: AREAL_VLLM_ENABLE is neither 1 nor 0.
    """
    from . import vllm_patching
    from .engine_core import hooks
    from .process.file_limit import raise_file_limit
    from .worker.hooks import PLUGIN_PATCHES

    raise_file_limit()
    vllm_patching.install_patches((*hooks.ENGINE_PATCHES, *PLUGIN_PATCHES))
    if vllm_patching.is_enabled():
        vllm_patching.require(())
