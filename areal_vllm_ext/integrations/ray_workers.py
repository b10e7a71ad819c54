"""``with_setup``: a Ray job in whose every process a function runs first.

A trainer calls ``ray.init`` with a runtime environment of its own. Ray gives that to the function that RAY_RUNTIME_ENV_HOOK
names. Nothing here imports Ray.
"""

from __future__ import annotations

import os
from typing import Any

from ..errors import SettingsError

_KEY = "worker_process_setup_hook"


def with_setup(runtime_env: dict[str, Any] | None, function: str) -> dict[str, Any]:
    """Return ``runtime_env`` with ``function``, and with this package's variables of the driver.

    Args:
        runtime_env: what the trainer gives to ``ray.init``.
        function: as ``package.module.name``; without arguments.

    Raises:
        SettingsError: the trainer has such a function already.
    """
    found = dict(runtime_env or {})
    if (other := found.get(_KEY)) not in (None, function):
        raise SettingsError(
            f"ray.init: the runtime environment has a {_KEY} already ({other}); call {function}() in it, and unset "
            "RAY_RUNTIME_ENV_HOOK"
        )
    ours = {name: value for name, value in os.environ.items() if name.startswith("AREAL_VLLM_")}
    return {**found, _KEY: function, "env_vars": {**ours, **(found.get("env_vars") or {})}}
