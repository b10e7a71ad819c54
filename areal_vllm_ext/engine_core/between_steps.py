"""How calls of ours run between two steps of an in-process engine, whose loop is the user's own."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

logger = logging.getLogger("vllm.areal_vllm_ext")


def calls_between_steps(lock: threading.RLock) -> Callable[[Callable[[], None]], None]:
    """Return what runs a call on a thread of our own while ``lock``, which each step holds, is free."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="areal-calls")

    def locked_call(call: Callable[[], None]) -> None:
        with lock:
            call()

    def run(call: Callable[[], None]) -> None:
        try:
            pool.submit(locked_call, call)
        except RuntimeError:
            # The user's program ends without shutting its LLM down: Python takes no more work for threads, and no step follows.
            # Raised on the endpoint's thread, this would end the program with a failure.
            logger.debug("a call to the engine is left out, because the program ends")

    return run
