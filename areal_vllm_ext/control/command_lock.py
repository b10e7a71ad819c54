"""``CommandLock``: the commands of one group run one after the other, and none waits past its deadline."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# The thread that waits for this task. Set by a client whose event loop runs in another thread than its caller.
calling_thread: contextvars.ContextVar[object | None] = contextvars.ContextVar("calling_thread", default=None)


class CommandLock:
    """Held by one command at a time, first come, first served."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._caller: object | None = None
        self._what = ""
        self._since = 0.0

    @contextlib.asynccontextmanager
    async def held(self, what: str, ends: float) -> AsyncIterator[None]:
        """Hold the lock for the command ``what``.

        Raises:
            RequestError: ``busy``. Another command of the group held the lock until ``ends``; or this caller holds it
                itself, as inside an update's block, so that waiting would never end.
        """
        caller = calling_thread.get() or asyncio.current_task()
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._loop, self._lock = (
                loop,
                asyncio.Lock(),
            )  # a lock cannot leave the loop in which a command waited for it
        if self._caller is not None and self._caller is caller:
            raise RequestError(
                "busy", f"{what} inside the block of this group's {self._what} would wait for itself: call it outside"
            )
        try:
            await asyncio.wait_for(self._lock.acquire(), max(ends - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            seconds = time.monotonic() - self._since
            raise RequestError(
                "busy",
                f"{what} was not started in time: this group's {self._what} is running (for {seconds:.1f} s so far); "
                "wait for it, or raise the timeout",
            ) from None
        self._caller, self._what, self._since = caller, what, time.monotonic()
        try:
            yield
        finally:
            self._caller = None
            self._lock.release()
