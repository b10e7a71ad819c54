"""A cluster in memory: real state machines and a real client in simulated processes.

Participant, coordinator, recovery, directory and the trainer's client are the shipped code. Processes, clocks and the
network are simulated, without sockets, threads or waiting, so an hour of a thousand engines is a loop over a heap of events.

``Engine`` is one engine without time. Its queues are moved on by hypothesis (``tests/unit/test_transaction_machine.py``) or,
with time, by ``World``. ``World`` holds the processes. Each has a clock of its own and can be killed, frozen and thawed.
A trainer is the real ``AsyncEngineGroup`` on an event loop whose time is simulated.
"""

from __future__ import annotations

from .base import FIRST_VERSION, UsersCall, Violation, brief, require
from .client import Call, Trainer, simulated_time
from .coverage import Coverage
from .engine import Engine, engine_info
from .process import Clock
from .world import World

__all__ = [
    "FIRST_VERSION",
    "Call",
    "Clock",
    "Coverage",
    "Engine",
    "Trainer",
    "UsersCall",
    "Violation",
    "World",
    "brief",
    "engine_info",
    "require",
    "simulated_time",
]
