"""``EngineGroup``: the blocking form of ``AsyncEngineGroup``, which it runs on an event loop in a thread of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..control.command import DISCOVER_SECONDS
from .group import PAUSE_LEASE_SECONDS, AsyncEngineGroup
from .loop_thread import LoopThread

if TYPE_CHECKING:
    import os

    from torch.distributed import ProcessGroup

    from ..integrity.verify import Verification
    from ..protocol import EngineInfo, KVPolicy, PauseMode, Version
    from ..protocol.security import ClusterKey
    from .blocking_update import Update
    from .options import Senders
    from .state import EngineState


class EngineGroup:
    """The blocking form of ``AsyncEngineGroup``, with the same methods."""

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
        """See ``AsyncEngineGroup.connect``."""
        return cls(AsyncEngineGroup.connect(address, key_file=key_file, key=key), LoopThread("areal-engine-group"))

    def engines(self, timeout: float = DISCOVER_SECONDS) -> list[EngineInfo]:
        """See ``AsyncEngineGroup.engines``."""
        return self._thread.run(self._group.engines(timeout))

    def wait_ready(self, engines: int | None = None, timeout: float = 600.0) -> list[EngineInfo]:
        """See ``AsyncEngineGroup.wait_ready``."""
        return self._thread.run(self._group.wait_ready(engines, timeout))

    def status(self, timeout: float = DISCOVER_SECONDS) -> list[EngineState]:
        """See ``AsyncEngineGroup.status``."""
        return self._thread.run(self._group.status(timeout))

    def pause(
        self,
        mode: PauseMode = "keep",
        *,
        kv: KVPolicy = "keep",
        deadline: float = 60.0,
        lease: float | None = PAUSE_LEASE_SECONDS,
    ) -> None:
        """See ``AsyncEngineGroup.pause``."""
        self._thread.run(self._group.pause(mode, kv=kv, deadline=deadline, lease=lease))

    def resume(self, *, deadline: float = 60.0) -> None:
        """See ``AsyncEngineGroup.resume``."""
        self._thread.run(self._group.resume(deadline=deadline))

    def verify(self, checkpoint: str | os.PathLike[str] | None = None, *, deadline: float = 300.0) -> Verification:
        """See ``AsyncEngineGroup.verify``."""
        return self._thread.run(self._group.verify(checkpoint, deadline=deadline))

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
            from .blocking_update import Update

            return Update(self._thread, update)
        from .joint import JointUpdate

        return JointUpdate(self._thread, update, process_group, version, senders)

    def close(self) -> None:
        """Close the connections and end the thread. Engines go on."""
        if self._thread.is_alive:
            self._thread.run(self._group.close())
            self._thread.close()

    def __enter__(self) -> EngineGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
