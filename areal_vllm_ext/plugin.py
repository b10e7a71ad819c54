"""Entry point ``vllm.general_plugins``: vLLM calls ``register`` in its front end, in every EngineCore and in every worker."""

from __future__ import annotations


def register() -> None:
    """Put the hooks in place. Inert unless an engine was started with our ``--worker-extension-cls``."""
    from .engine_core import hooks
    from .process.file_limit import raise_file_limit

    raise_file_limit()
    hooks.install()
