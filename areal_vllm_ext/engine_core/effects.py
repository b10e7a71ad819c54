"""What a participant wants done: the effects that ``endpoint.py`` carries out, in order."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..protocol import WEIGHTS_ONLY, Units

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..protocol import (
        Answer,
        Discover,
        GetStatus,
        PauseMode,
        ServedAdapter,
        SleepLevel,
        SleepTag,
        Version,
        WorkerOrder,
    )
    from ..protocol.peer_messages import EndOffer, OfferWeights, ReadPacked
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
    """Pause the engine; report to ``pause_done`` with ``call``.

    ``users``: the pause is a user's own, so it outlasts updates. ``clear_cache``: drop cached keys and values. ``root``: new
    requests find no keys and values that were cached under another root; empty: the root stays.
    """

    call: int
    mode: PauseMode
    clear_cache: bool
    users: bool = False
    root: str = ""


@dataclasses.dataclass(frozen=True)
class CallResume:
    """Resume the engine, also from a pause that has not completed; report to ``resume_done`` with ``call``.

    ``lifts``: a user's own pause ends too; otherwise it stands, and the report says so. ``asked``: a user asks for it, so it
    fails where the engine sleeps; otherwise the engine sleeps on, and the report says so.
    """

    call: int
    lifts: bool = False
    asked: bool = False


@dataclasses.dataclass(frozen=True)
class CallCancelPause:
    """Cancel a pause unless it has completed meanwhile; report to ``cancel_done`` with ``call``."""

    call: int


@dataclasses.dataclass(frozen=True)
class CallCommit:
    """Make the staged ``units`` live in every worker and set the engine's version; report to ``commit_done``."""

    update: str
    version: Version
    units: Units = WEIGHTS_ONLY


@dataclasses.dataclass(frozen=True)
class CallCommitFetched:
    """Make live what every worker has fetched from a peer, and set the engine's version; report to ``Returning.committed``.

    ``adapters``: all that the engine serves afterwards, by name.
    """

    fetch: str
    version: Version
    update: str
    adapters: Mapping[str, ServedAdapter] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class CallReadPacked:
    """Let a worker that offers its weights read columns of a packed weight. The worker itself waits for them."""

    order: ReadPacked


@dataclasses.dataclass(frozen=True)
class AskDirectory:
    """Ask the directory; report its answer to ``Returning.engines``."""

    message: Discover


@dataclasses.dataclass(frozen=True)
class AskPeer:
    """Ask another engine; report its answer to ``Returning.answered`` with ``number``."""

    number: int
    address: str
    message: GetStatus | OfferWeights | EndOffer


@dataclasses.dataclass(frozen=True)
class CallSleep:
    """Put a paused engine to sleep, unless it is later than ``ends``; report to ``sleep_done`` with ``call``."""

    call: int
    level: SleepLevel
    ends: float


@dataclasses.dataclass(frozen=True)
class CallWakeUp:
    """Bring back what ``tags`` name, unless it is later than ``ends``; report to ``sleep_done`` with ``call``."""

    call: int
    tags: tuple[SleepTag, ...]
    ends: float


@dataclasses.dataclass(frozen=True)
class CallMethod:
    """Call a user's method on every worker, unless it is later than ``ends``; report to ``UserCalls.done`` with ``call``.

    ``longest_answer``: bytes that the answer of one worker may have.
    """

    call: str
    method: str
    arguments: bytes
    ends: float
    longest_answer: int


@dataclasses.dataclass(frozen=True)
class Guard:
    """Why other users of the engine must leave it alone just now; empty if they need not.

    While there is an ``update``, vLLM's own calls that pause, resume, sleep or reload wait. Because of its ``weights``, an
    engine is resumed only by an update.
    """

    update: str = ""
    weights: str = ""


Effect = (
    Reply
    | Order
    | CallPause
    | CallResume
    | CallCancelPause
    | CallCommit
    | CallCommitFetched
    | CallReadPacked
    | AskDirectory
    | AskPeer
    | CallSleep
    | CallWakeUp
    | CallMethod
)
