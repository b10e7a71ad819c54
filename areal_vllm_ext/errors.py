"""The errors of this package. Each message names what failed, the cause, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def join(problems: Mapping[str, str]) -> str:
    """Return the problems of several engines as one line."""
    return "; ".join(f"{name}: {problem}" for name, problem in sorted(problems.items()))


# The way out where bytes changed in transit: the update was refused, so only the hardware is in question.
SEND_AGAIN = "nothing was applied; send again, and if it happens again check that node's memory and network"


class ArealError(RuntimeError):
    """Base of every error that this package raises on purpose."""


class SettingsError(ArealError):
    """A setting is missing or wrong; the message names it and says what to write instead."""


class HookError(ArealError):
    """This vLLM cannot be hooked, so the engine must not start."""


class RequestError(ArealError):
    """An engine or the directory refused a request.

    Attributes:
        kind: the machine-readable cause, one of ``protocol.ErrorKind``.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class EngineUnreachable(ArealError):
    """An engine or the directory did not answer in time."""


class EnginesMissing(ArealError):
    """An expected engine is lost or never registered."""


class NotACheckpoint(ArealError):
    """The directory holds no complete safetensors checkpoint; the message says what is missing."""


class InvalidWeights(ArealError):
    """The weights do not fit the model that the engines serve. No engine was touched."""


class UpdateAborted(ArealError):
    """The update was given up. Every engine still serves the version that it served before."""


class WeightsTainted(ArealError):
    """The commit failed on an engine, which now holds a partially loaded set of weights.

    The engine stays paused and serves nothing until an update succeeds.
    """


class UpdateInDoubt(ArealError):
    """Every engine was told to commit and none answered. All of them commit, or none."""


class PauseFailed(ArealError):
    """An engine did not pause (or resume) in time; the message names it."""


class SleepFailed(ArealError):
    """An engine did not fall asleep or wake up; the message names it, and what the engines do now."""


class LaunchError(ArealError):
    """What was launched did not come up, or has ended. The first line is the cause; lines of logs may follow."""
