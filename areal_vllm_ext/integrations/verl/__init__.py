"""verl's weight syncs as updates of this package: see docs/verl.md. Tested on verl 0.9.1.

``checkpoint_engine.custom_backend_module`` names this package: importing it registers the backend ``areal``.
"""

from __future__ import annotations

from verl.checkpoint_engine import CheckpointEngineManager

from . import manager
from .engine import BACKEND, ArealCheckpointEngine

__all__ = ["ArealCheckpointEngine"]

manager.replace(CheckpointEngineManager, BACKEND)
