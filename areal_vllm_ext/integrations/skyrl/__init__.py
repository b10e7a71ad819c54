"""SkyRL's weight syncs as updates of this package: see docs/skyrl.md. Tested on SkyRL 0.4.0, which is not imported here."""

from __future__ import annotations

from typing import Any

from ..ray_workers import with_setup
from ..when_imported import when_imported

_MODULE = "skyrl.backends.skyrl_train.weight_sync.weight_senders"


def use_areal(**settings: Any) -> None:
    """Let the trainer ranks of this process sync weights by this package.

    Args:
        settings: see ``ArealTrainerInitInfo``; by default the environment's.
    """

    def change(module: Any) -> None:
        from .senders import builder

        module.build_trainer_engine = builder(settings)

    when_imported(_MODULE, change)


def runtime_env(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Make ``use_areal`` run in every process of a Ray job: RAY_RUNTIME_ENV_HOOK names this function."""
    return with_setup(runtime_env, f"{__name__}.use_areal")
