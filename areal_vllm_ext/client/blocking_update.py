"""``Update``: the blocking form of ``AsyncUpdate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loop_thread import LoopThread
    from .state import UpdateResult
    from .update import AsyncUpdate


class Update:
    """The blocking form of ``AsyncUpdate``; made by ``EngineGroup.update``."""

    def __init__(self, thread: LoopThread, update: AsyncUpdate) -> None:
        self._thread = thread
        self._update = update

    @property
    def result(self) -> UpdateResult:
        """What the update took; set once its block has been left."""
        return self._update.result

    def send(self, weights: Any, *, dtype: str | None = None) -> None:
        """See ``AsyncUpdate.send``. The tensors are handled in the caller's thread, on its current device and stream."""
        self._update.send_blocking(weights, dtype=dtype)

    def __enter__(self) -> Update:
        self._thread.run(self._update.__aenter__())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._thread.run(self._update.__aexit__(kind, error, trace))
