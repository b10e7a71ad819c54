"""The errors that users meet. Each message names the engine or the setting, the cause, and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def join(problems: Mapping[str, str]) -> str:
    """Problems of several engines, as one line."""
    return "; ".join(f"{name}: {problem}" for name, problem in sorted(problems.items()))


# What to do about bytes that changed on their way: they are not in doubt, their carrier is.
SEND_AGAIN = "nothing was applied; send again, and if it happens again look at that node's memory and network"


class ArealError(RuntimeError):
    """Base of every error that this package raises on purpose."""


class SettingsError(ArealError):
    """A setting is missing or wrong; the message says which one and what to write instead."""


class HookError(ArealError):
    """The hook could not be put into this vLLM, so the engine must not start."""


class RequestError(ArealError):
    """An engine or the directory refused a request.

    Attributes:
        kind: the machine-readable cause, one of ``protocol.ErrorKind``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class EngineUnreachable(ArealError):
    """An engine or the directory did not answer before the deadline."""


class EnginesMissing(ArealError):
    """Not every expected engine registered before the deadline."""


class InvalidWeights(ArealError):
    """The weights to send do not fit the model that the engines serve. No engine was touched."""


class UpdateAborted(ArealError):
    """The update was given up: every engine still serves the version that it served before."""


class WeightsTainted(ArealError):
    """An update without staging failed: the engines' weights are nobody's. They stay paused until an update succeeds."""


class UpdateInDoubt(ArealError):
    """Every engine had agreed to switch and was told to, but none answered. All of them will have switched, or none."""


class PauseFailed(ArealError):
    """Not every engine paused (or resumed) before the deadline; the message names those that did not."""


class LaunchError(ArealError):
    """What was to be launched did not come up, or has ended. The first line is the cause; lines of logs may follow."""
