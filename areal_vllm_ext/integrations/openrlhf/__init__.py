"""OpenRLHF's weight syncs as updates of this package: see docs/openrlhf.md. Tested on OpenRLHF 0.11.2, not imported here."""

from __future__ import annotations

from typing import Any

from ..ray_workers import with_setup
from ..when_imported import when_imported

_MODULE = "openrlhf.trainer.ray.ppo_actor"


def use_areal(**settings: Any) -> None:
    """Let the actor's ranks in this process sync weights by this package.

    Args:
        settings: see ``SyncSettings``; by default the environment's.
    """

    def change(module: Any) -> None:
        from .actor import replace

        replace(module.ActorPPOTrainer, settings)

    when_imported(_MODULE, change)


def runtime_env(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Make ``use_areal`` run in every process of a Ray job: RAY_RUNTIME_ENV_HOOK names this function."""
    return with_setup(runtime_env, f"{__name__}.use_areal")
