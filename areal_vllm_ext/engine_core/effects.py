"""What a participant wants done: the effects that ``endpoint.py`` carries out, in order."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..protocol import Answer, PauseMode, Version, WorkerOrder
    from ..protocol.server import ReplyTo


@dataclasses.dataclass(frozen=True)
class Reply:
    """Answer a request."""

    caller: ReplyTo
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Order:
    """Send ``message`` to every worker of the engine."""

    message: WorkerOrder


@dataclasses.dataclass(frozen=True)
class CallPause:
    """Pause the engine; report to ``pause_done`` with ``call``."""

    call: int
    mode: PauseMode
    clear_cache: bool


@dataclasses.dataclass(frozen=True)
class CallResume:
    """Resume the engine, also from a pause that has not completed; report to ``resume_done`` with ``call``."""

    call: int


@dataclasses.dataclass(frozen=True)
class CallCancelPause:
    """Cancel a pause unless it has completed meanwhile; report to ``cancel_done`` with ``call``."""

    call: int


@dataclasses.dataclass(frozen=True)
class CallCommit:
    """Load the staged weights in every worker and set the engine's version; report to ``commit_done``."""

    update: str
    version: Version


Effect = Reply | Order | CallPause | CallResume | CallCancelPause | CallCommit
