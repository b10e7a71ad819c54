"""A cluster in memory: the real participant, coordinator, recovery, directory and trainer's client, and around them
simulated processes, clocks and network. No sockets, no threads, no waiting: an hour of a thousand engines is a loop over
a heap of events.

``Engine`` is one engine without time: queues that somebody moves on (hypothesis in ``tests/unit/test_transaction_machine.py``,
time in ``World``). ``World`` holds the processes, each with a clock of its own that may run fast or slow, that can be
killed, or put to sleep and woken. Trainers are the real ``AsyncEngineGroup`` on an event loop whose time is simulated.
"""

from __future__ import annotations

from .base import FIRST_VERSION, Violation, brief, require
from .client import Call, Trainer, simulated_time
from .engine import Engine, engine_info
from .process import Clock
from .world import World

__all__ = [
    "FIRST_VERSION",
    "Call",
    "Clock",
    "Engine",
    "Trainer",
    "Violation",
    "World",
    "brief",
    "engine_info",
    "require",
    "simulated_time",
]
