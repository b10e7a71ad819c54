"""Broken promises, and what every part of the simulation shares."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from areal_vllm_ext.engine_core.effects import (
    CallCancelPause,
    CallCommit,
    CallCommitFetched,
    CallPause,
    CallReadPacked,
    CallResume,
    CallSleep,
    CallWakeUp,
    Guard,
)
from areal_vllm_ext.protocol import Message, Register, Status

FIRST_VERSION = "v0"
DIRECTORY = "tcp://directory:29700"
TICK_SECONDS = 0.2
STEP_SECONDS = 0.003
WATCH_SECONDS = 0.2
# While nothing needs recovery, the directory only has to read its clock.
IDLE_WATCH_SECONDS = 0.9
RECOVERY_SECONDS = 10.0
GONE_SECONDS = 5.0
REPEAT_SECONDS = 1.0
BUCKETS = 2

Kind = Literal["mixed versions", "hang", "wrong tokens", "leftover", "overrun", "rule", "untrue outcome", "history"]


@dataclasses.dataclass(frozen=True)
class UsersCall:
    """A call of vLLM's own that another user makes; it waits for the engine's loop like ours."""

    name: str


EngineCall = (
    CallPause
    | CallResume
    | CallCancelPause
    | CallCommit
    | CallCommitFetched
    | CallReadPacked
    | CallSleep
    | CallWakeUp
    | Guard
    | UsersCall
)
IDS = itertools.count()


class Violation(AssertionError):
    """A promise was broken."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind: Kind = kind


def require(condition: object, kind: Kind, message: str) -> None:
    if not condition:
        raise Violation(kind, message)


def nothing(*_: object) -> None:
    """Do nothing with what is heard."""


def brief(message: Message) -> str:
    """Return a message as one short line of the trace."""
    if isinstance(message, Status):
        return f"Status({message.version}, {message.update_phase}, {message.generation} {message.paused_for}, {message.update})"
    if isinstance(message, Register):
        return f"Register({message.engine.dp_rank}, epoch={message.epoch})"
    fields = {name: value for name in message.__struct_fields__ if (value := getattr(message, name)) not in ("", 0, ())}
    return f"{type(message).__name__}({', '.join(f'{name}={value}' for name, value in fields.items())})"[:160]
