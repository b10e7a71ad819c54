"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in its front end, in every EngineCore and in every worker."""

from __future__ import annotations

import contextlib

from .vllm_versions import load_endpoint_plugins


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
    register_backends()
    load_endpoint_plugins()
    if vllm_patching.is_enabled():
        vllm_patching.require(())


def register_backends() -> None:
    """Name the backend ``areal`` of vLLM's weight transfer, where this vLLM has it. Nothing of it is imported here."""
    try:
        from vllm.distributed.weight_transfer import factory
    except ImportError:
        return
    if not hasattr(factory, "WeightTransferTrainerFactory"):  # its worker engines are of another kind
        return
    for registry, module, engine in (
        (factory.WeightTransferEngineFactory, "worker_engine", "ArealWeightTransferEngine"),
        (factory.WeightTransferTrainerFactory, "trainer", "ArealTrainerEngine"),
    ):
        with contextlib.suppress(ValueError):  # vLLM loads plugins more than once in some processes
            registry.register_engine("areal", f"areal_vllm_ext.integrations.vllm.{module}", engine)
