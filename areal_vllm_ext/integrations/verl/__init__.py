"""verl's weight syncs as updates of this package: see docs/verl.md. Tested on verl 0.9.1.

``checkpoint_engine.custom_backend_module`` names this package: importing it registers the backend ``areal``.
"""

from __future__ import annotations

from .engine import ArealCheckpointEngine
from .manager import ArealCheckpointEngineManager

__all__ = ["ArealCheckpointEngine", "ArealCheckpointEngineManager"]
