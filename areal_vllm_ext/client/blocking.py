"""``EngineGroup``: the blocking form of ``AsyncEngineGroup``, which runs on an event loop in a thread of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from ..control.command import DISCOVER_SECONDS
from .group import AsyncEngineGroup, cannot_pickle
from .loop_thread import LoopThread
from .options import (
    CALL_SECONDS,
    PAUSE_LEASE_SECONDS,
    PAUSE_SECONDS,
    READY_SECONDS,
    UPDATE_SECONDS,
    VERIFY_SECONDS,
    Senders,
    check_choice,
    checked_seconds,
)
from .walk import drained_on_error, walk

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import torch
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ..integrity.verify import Verification
    from ..protocol import EngineInfo, KVPolicy, PauseMode, SleepLevel, SleepTag, Version
    from ..protocol.security import ClusterKey
    from .blocking_update import Update
    from .calls import CallResult
    from .drafts import DraftSource
    from .lora import AdapterSource
    from .options import UpdateOptions
    from .state import EngineState, UpdateResult
    from .weights import WeightSource


class EngineGroup:
    """Every engine that the directory knows. Made by ``connect``; every call has a timeout in seconds.

    The methods are those of ``AsyncEngineGroup``. A trainer of several ranks needs this class, because collectives block
    the calling thread.
    """

    def __init__(self, group: AsyncEngineGroup, thread: LoopThread) -> None:
        self._group = group
        self._thread = thread

    @classmethod
    def connect(
        cls,
        address: str = "",
        *,
        key_file: str | os.PathLike[str] | None = None,
        key: ClusterKey | None = None,
    ) -> EngineGroup:
        """Return a group of all engines that the directory knows. See ``AsyncEngineGroup.connect``."""
        return cls(AsyncEngineGroup.connect(address, key_file=key_file, key=key), LoopThread("areal-engine-group"))

    def engines(self, timeout: float = DISCOVER_SECONDS) -> list[EngineInfo]:
        """Return the engines that are alive. See ``AsyncEngineGroup.engines``."""
        return self._thread.run(self._group.engines(timeout))

    def wait_ready(self, engines: int | None = None, timeout: float = READY_SECONDS) -> list[EngineInfo]:
        """Wait until all engines answer. See ``AsyncEngineGroup.wait_ready``."""
        return self._thread.run(self._group.wait_ready(engines, timeout))

    def status(self, timeout: float = DISCOVER_SECONDS) -> list[EngineState]:
        """Return the state of every engine. See ``AsyncEngineGroup.status``."""
        return self._thread.run(self._group.status(timeout))

    def pause(
        self,
        mode: PauseMode = "keep",
        *,
        kv: KVPolicy = "keep",
        timeout: float = PAUSE_SECONDS,
        lease: float | None = PAUSE_LEASE_SECONDS,
    ) -> None:
        """Pause generation on every engine. See ``AsyncEngineGroup.pause``."""
        self._thread.run(self._group.pause(mode, kv=kv, timeout=timeout, lease=lease))

    def resume(self, *, timeout: float = PAUSE_SECONDS) -> None:
        """Let every engine generate again. See ``AsyncEngineGroup.resume``."""
        self._thread.run(self._group.resume(timeout=timeout))

    def sleep(self, level: SleepLevel = 1, *, mode: PauseMode = "keep", timeout: float = PAUSE_SECONDS) -> None:
        """Give the device memory of every engine back. See ``AsyncEngineGroup.sleep``."""
        self._thread.run(self._group.sleep(level, mode=mode, timeout=timeout))

    def wake_up(self, tags: Sequence[SleepTag] | None = None, *, timeout: float = PAUSE_SECONDS) -> None:
        """Bring weights and KV cache of every engine back. See ``AsyncEngineGroup.wake_up``."""
        self._thread.run(self._group.wake_up(tags, timeout=timeout))

    def wake_up_with(
        self,
        weights: WeightSource | str | os.PathLike[str],
        *,
        version: Version,
        draft: DraftSource | None = None,
        timeout: float = UPDATE_SECONDS,
        dtype: str | torch.dtype | None = None,
        **options: Unpack[UpdateOptions],
    ) -> UpdateResult:
        """Wake every engine up with new weights. See ``AsyncEngineGroup.wake_up_with``.

        A trainer of several ranks makes the two calls itself: all ranks update, and rank 0 wakes engines up.
        """
        ends = time.monotonic() + checked_seconds(timeout)
        result = self.update_weights(weights, version=version, draft=draft, timeout=timeout, dtype=dtype, **options)
        self.wake_up(timeout=max(ends - time.monotonic(), 0.05))
        return result

    def verify(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        draft: str | os.PathLike[str] | None = None,
        timeout: float = VERIFY_SECONDS,
    ) -> Verification:
        """Compare what the engines serve. See ``AsyncEngineGroup.verify``."""
        return self._thread.run(self._group.verify(checkpoint, draft=draft, timeout=timeout))

    def update_weights(
        self,
        weights: WeightSource | str | os.PathLike[str] | None = None,
        *,
        version: Version,
        draft: DraftSource | None = None,
        adapters: Mapping[str, AdapterSource | None] | None = None,
        timeout: float = UPDATE_SECONDS,
        dtype: str | torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
        senders: Senders = "rank0",
        **options: Unpack[UpdateOptions],
    ) -> UpdateResult:
        """Move every engine to ``weights`` and ``adapters``, or none.

        See ``AsyncEngineGroup.update_weights``; ``process_group`` and ``senders`` are those of ``update``.
        """
        weights = walk(weights, timeout)
        with drained_on_error(weights):
            opened = self.update(version, timeout=timeout, process_group=process_group, senders=senders, **options)
            with opened as update:
                update.change_adapters(adapters or {})
                if weights is not None:
                    update.send(weights, dtype=dtype, draft=draft)
        return update.result

    def update(
        self,
        version: Version,
        *,
        timeout: float = UPDATE_SECONDS,
        process_group: ProcessGroup | None = None,
        senders: Senders = "rank0",
        **options: Unpack[UpdateOptions],
    ) -> Update:
        """Return an update as a block, for trainers that do more between its start and its commit.

        Use: ``with group.update(step) as update: update.send(model)``. Leaving the block commits.

        Args:
            version: names the new weights; any integer of 64 bits, or a string.
            timeout: seconds for the whole update. After them, every engine keeps its old weights.
            process_group: the ranks of a trainer of several ranks (FSDP, TP, PP, DP). All ranks make the same call; rank 0
                commands, and every rank gets the result, or the error of any rank.
            senders: which ranks send. ``rank0``: rank 0 gathers and sends all tensors. ``partitioned``: each rank sends a
                share of the tensors that it holds, so no rank needs to hold all of them (PP, EP). ``colocated``: each rank
                sends all tensors to the workers on its own device (by CUDA IPC).
            options: see ``UpdateOptions``.
        """
        from .blocking_update import Update

        check_choice("senders", senders, Senders)
        if process_group is None and senders != "rank0":
            raise ValueError(f"senders={senders!r} needs process_group=, the ranks of the trainer")
        transaction = self._group.update(version, timeout=timeout, **options).transaction
        if process_group is None:
            return Update(self._thread, transaction)
        from .ranks.update import JointUpdate

        return JointUpdate(self._thread, transaction, process_group, senders)

    def call(self, method: str, *arguments: Any, timeout: float = CALL_SECONDS, lease: bool = True) -> CallResult:
        """Call a method of your own worker extension on every worker. See ``AsyncEngineGroup.call``."""
        return self._thread.run(self._group.call(method, *arguments, timeout=timeout, lease=lease))

    def forget(self, replica: str, dp_rank: int | None = None, *, timeout: float = DISCOVER_SECONDS) -> None:
        """Give up lost engines for good. See ``AsyncEngineGroup.forget``."""
        self._thread.run(self._group.forget(replica, dp_rank, timeout=timeout))

    def close(self) -> None:
        """Close the connections and end the thread. See ``AsyncEngineGroup.close``."""
        if self._thread.is_alive:
            self._thread.run(self._group.close())
            self._thread.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(cannot_pickle("EngineGroup"))

    def __enter__(self) -> EngineGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
