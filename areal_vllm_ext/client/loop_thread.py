"""``LoopThread``: an event loop in a thread of its own, so that blocking code can run coroutines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from ..control.command_lock import calling_thread
from ..errors import ArealError

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")
logger = logging.getLogger("vllm.areal_vllm_ext")

# Time after Ctrl-C for the clean-up of what was interrupted.
_INTERRUPTED_SECONDS = 2.0


class LoopThread:
    """An event loop and its thread."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        # The thread must not refer to this object, whose end is the thread's.
        self._thread = threading.Thread(target=_run, args=(self.loop,), name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the loop still runs."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the loop and wait for it.

        An interrupt (Ctrl-C) cancels ``work`` and waits up to 2 s for its clean-up. Another interrupt ends that wait.
        """
        caller = threading.current_thread()
        if caller is self._thread:
            work.close()
            raise ArealError(
                "a group cannot be asked in its own event loop's thread, as in on_phase, because that thread would wait for "
                "itself: ask in another thread"
            )
        if not self.is_alive:
            work.close()
            raise ArealError(
                "this group is closed, or this process was forked from the one that connected: connect again"
            )
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        task: asyncio.Task[None] | None = None

        async def run_to_the_end() -> None:
            calling_thread.set(caller)
            try:
                outcome.set_result(await work)
            except BaseException as error:
                outcome.set_exception(error)

        def start() -> None:
            nonlocal task
            task = task or self.loop.create_task(run_to_the_end())

        def cancel() -> None:
            # Start the task even now: the interrupt may have come first, and only a started task runs its clean-up.
            start()
            assert task is not None
            self.loop.call_soon(task.cancel)

        try:
            self.loop.call_soon_threadsafe(start)
            return outcome.result()
        except KeyboardInterrupt:
            self.loop.call_soon_threadsafe(cancel)
            concurrent.futures.wait([outcome], timeout=_INTERRUPTED_SECONDS)
            raise

    def close(self) -> None:
        """Stop the loop and end the thread."""
        if self.is_alive:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()

    def __del__(self) -> None:
        if self.is_alive:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                self.loop.call_soon_threadsafe(self.loop.stop)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        while True:
            try:
                loop.run_forever()
                break
            except (KeyboardInterrupt, SystemExit):
                # Raised by the user's own code in a task, which has it as its outcome. Others still wait for this loop.
                logger.warning(
                    "areal_vllm_ext: a group's event loop goes on after an exit of the process", exc_info=True
                )
    finally:
        loop.close()
