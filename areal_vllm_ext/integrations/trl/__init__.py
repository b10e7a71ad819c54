"""TRL's weight syncs as updates of this package: see docs/trl.md. Checked on TRL 1.16.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import use_areal
    from .weight_transfer import ArealWeightTransfer

__all__ = ["ArealWeightTransfer", "use_areal"]


def __getattr__(name: str) -> Any:
    if name == "use_areal":
        from .client import use_areal

        return use_areal
    if name == "ArealWeightTransfer":
        from .weight_transfer import ArealWeightTransfer

        return ArealWeightTransfer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
