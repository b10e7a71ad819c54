"""``EngineGroup``: the blocking form of ``AsyncEngineGroup``, which it runs on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import ArealError
from .group import DISCOVER_SECONDS, PAUSE_LEASE_SECONDS, AsyncEngineGroup

if TYPE_CHECKING:
    import os
    from collections.abc import Coroutine

    from torch.distributed import ProcessGroup

    from ..integrity.verify import Verification
    from ..protocol import EngineInfo, KVPolicy, PauseMode, Version
    from ..protocol.security import ClusterKey
    from .group import EngineState
    from .update import AsyncUpdate, UpdateResult

T = TypeVar("T")
Senders = Literal["first", "parts", "colocated"]

# After Ctrl-C, engines get so long to be told.
_INTERRUPTED_SECONDS = 2.0


class Update:
    """The blocking form of ``AsyncUpdate``."""

    def __init__(self, group: EngineGroup, update: AsyncUpdate) -> None:
        self._group = group
        self._update = update

    @property
    def result(self) -> UpdateResult:
        """What it took; set when the block has been left."""
        return self._update.result

    def send(self, weights: Any, *, dtype: str | None = None) -> None:
        """See ``AsyncUpdate.send``. The tensors are handled in the caller's thread, on its current device and stream."""
        self._update.send_blocking(weights, dtype=dtype)

    def __enter__(self) -> Update:
        self._group.run(self._update.__aenter__())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._group.run(self._update.__aexit__(kind, error, trace))


class EngineGroup:
    """The blocking form of ``AsyncEngineGroup``, with the same methods."""

    def __init__(self, group: AsyncEngineGroup, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        self._group = group
        self._loop = loop
        self._thread = thread

    @classmethod
    def connect(
        cls,
        *addresses: str,
        key_file: str | os.PathLike[str] | None = None,
        key: ClusterKey | None = None,
    ) -> EngineGroup:
        """See ``AsyncEngineGroup.connect``."""
        group = AsyncEngineGroup.connect(*addresses, key_file=key_file, key=key)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="areal-engine-group", daemon=True)
        thread.start()
        return cls(group, loop, thread)

    def engines(self, timeout: float = DISCOVER_SECONDS) -> list[EngineInfo]:
        """See ``AsyncEngineGroup.engines``."""
        return self.run(self._group.engines(timeout))

    def wait_ready(self, engines: int | None = None, timeout: float = 600.0) -> list[EngineInfo]:
        """See ``AsyncEngineGroup.wait_ready``."""
        return self.run(self._group.wait_ready(engines, timeout))

    def status(self, timeout: float = DISCOVER_SECONDS) -> list[EngineState]:
        """See ``AsyncEngineGroup.status``."""
        return self.run(self._group.status(timeout))

    def pause(
        self,
        mode: PauseMode = "keep",
        *,
        kv: KVPolicy = "keep",
        deadline: float = 60.0,
        lease: float | None = PAUSE_LEASE_SECONDS,
    ) -> None:
        """See ``AsyncEngineGroup.pause``."""
        self.run(self._group.pause(mode, kv=kv, deadline=deadline, lease=lease))

    def resume(self, *, deadline: float = 60.0) -> None:
        """See ``AsyncEngineGroup.resume``."""
        self.run(self._group.resume(deadline=deadline))

    def verify(self, checkpoint: str | os.PathLike[str] | None = None, *, deadline: float = 300.0) -> Verification:
        """See ``AsyncEngineGroup.verify``."""
        return self.run(self._group.verify(checkpoint, deadline=deadline))

    def update(
        self,
        version: Version,
        *,
        process_group: ProcessGroup | None = None,
        senders: Senders = "first",
        **options: Any,
    ) -> Update:
        """See ``AsyncEngineGroup.update``. Use: ``with group.update(version) as update: update.send(model)``.

        Args:
            version: names the new weights.
            process_group: the ranks of a trainer of several (FSDP, TP, PP, DP), which all do this with the same arguments.
                ``DTensor`` weights are gathered, rank 0 commands, and every rank gets the result, or the error of any.
            senders: who sends. ``first``: rank 0, all of it. ``parts``: each rank a part of what it has; a rank need not
                have all (PP, EP), and what several have is spread over them. ``colocated``: each rank all of it, to the
                workers on its own device (by CUDA IPC).
            options: see ``AsyncEngineGroup.update``.
        """
        update = self._group.update(version, **options)
        if process_group is None:
            return Update(self, update)
        from .joint import JointUpdate

        return JointUpdate(self, update, process_group, version, senders)

    @property
    def asynchronous(self) -> tuple[AsyncEngineGroup, asyncio.AbstractEventLoop]:
        """What this is the form of, and the loop that it runs on."""
        return self._group, self._loop

    def close(self) -> None:
        """Close the connections and end the thread. Engines go on."""
        if self._thread.is_alive():
            self.run(self._group.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` on the group's loop and wait for it. An interrupt (Ctrl-C) cancels it and waits up to 2 s for its
        clean-up; another ends the wait.
        """
        if not self._thread.is_alive():
            work.close()
            raise ArealError("this group is closed")
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        task: asyncio.Task[None] | None = None

        async def run_to_the_end() -> None:
            try:
                outcome.set_result(await work)
            except BaseException as error:
                outcome.set_exception(error)

        def start() -> None:
            nonlocal task
            task = task or self._loop.create_task(run_to_the_end())

        def cancel() -> None:
            # Started even now: an interrupt may have come before that, and what is never started has no clean-up.
            start()
            assert task is not None
            self._loop.call_soon(task.cancel)

        try:
            self._loop.call_soon_threadsafe(start)
            return outcome.result()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(cancel)
            concurrent.futures.wait([outcome], timeout=_INTERRUPTED_SECONDS)
            raise

    def __enter__(self) -> EngineGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
