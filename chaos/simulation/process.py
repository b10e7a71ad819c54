"""Processes of the simulation, each with a clock and an event loop of its own."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from areal_vllm_ext.protocol.server import ReplyTo

from .base import IDS

if TYPE_CHECKING:
    from .world import World


@dataclasses.dataclass(frozen=True)
class Clock:
    """A process's clock: it shows ``offset + rate * t`` at the true time ``t``."""

    offset: float = 0.0
    rate: float = 1.0


class Process(asyncio.AbstractEventLoop):
    """A process and its event loop, whose time is that of the process's clock.

    Attributes:
        place: the part of the name that every incarnation shares.
        asleep: whether the process is frozen; slept: whether it ever was.
        woke: the true time of the last thaw.
        waiting: events that came while the process was frozen.
        ready: callbacks that run after the event that made them ready.
    """

    def __init__(self, world: World, name: str, clock: Clock) -> None:
        self.world = world
        self.name = name
        self.place = name.partition(".")[0]
        self.clock = clock
        self.alive = True
        self.asleep = self.slept = False
        self.woke = float("-inf")
        self.waiting: list[tuple[int, Any]] = []
        self.ready: collections.deque[asyncio.Handle] = collections.deque()

    def hear(self, caller: ReplyTo, message: Any) -> None:
        """Handle a message."""
        raise NotImplementedError

    def kill(self) -> None:
        """End the process as SIGKILL does: none of its later messages is sent."""
        self.alive = False
        for task in asyncio.all_tasks(self):
            task.cancel()
        self.run(lambda: None)

    def sleep(self) -> None:
        """Freeze the process as SIGSTOP does: messages and timers wait."""
        self.asleep = self.slept = True

    def wake(self) -> None:
        """Thaw the process as SIGCONT does."""
        self.asleep, self.woke = False, self.world.now
        for order, callback in self.waiting:
            self.world.at(self.world.now, self, callback, order)
        self.waiting.clear()

    def after(self, seconds: float, callback: Callable[[], object]) -> None:
        """Call ``callback`` after ``seconds`` of this process's clock."""
        self.world.at(self.world.now + seconds / self.clock.rate, self, callback)

    def run(self, callback: Callable[[], object]) -> None:
        """Run one event and all callbacks that it makes ready."""
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            callback()
            while self.ready:
                handle = self.ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(before)

    # The methods that asyncio calls on a loop

    def time(self) -> float:
        return self.clock.offset + self.clock.rate * self.world.now

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(0.0, callback, args, self, context)  # the world keeps the time
        self.world.at(self.world.now + max(delay, 0.0) / self.clock.rate, self, timer)
        return timer

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_later(when - self.time(), callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        pass  # a killed process leaves tasks whose exceptions are never retrieved


def new_caller(process: Process) -> ReplyTo:
    return ReplyTo(process.name.encode(), next(IDS).to_bytes(16, "big"))
