"""``Update``: the blocking face of an update."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from .options import checked_mapping
from .transaction import CANNOT_PICKLE

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import torch

    from ..protocol import Version
    from .drafts import DraftSource
    from .loop_thread import LoopThread
    from .lora import AdapterSource
    from .state import UpdateResult
    from .transaction import Transaction
    from .weights import WeightSource


class Update:
    """An update in progress; made by ``EngineGroup.update``."""

    def __init__(self, thread: LoopThread, transaction: Transaction) -> None:
        self._thread = thread
        self._transaction = transaction

    @property
    def version(self) -> Version:
        """Names the new weights."""
        return self._transaction.version

    @property
    def result(self) -> UpdateResult:
        """What the update took; set once its block has been left."""
        return self._transaction.result

    def send(
        self,
        weights: WeightSource | str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        draft: DraftSource | None = None,
    ) -> None:
        """See ``AsyncUpdate.send``. The tensors are handled in the caller's thread, on its current device and stream."""
        self._transaction.send(weights, dtype, draft)

    def prepare(self) -> None:
        """See ``AsyncUpdate.prepare``."""
        self._thread.run(self._transaction.prepare())

    def send_adapter(self, name: str, source: AdapterSource) -> None:
        """See ``AsyncUpdate.send_adapter``."""
        self._transaction.add_adapter(name, source)

    def remove_adapter(self, name: str) -> None:
        """See ``AsyncUpdate.remove_adapter``."""
        self._transaction.remove_adapter(name)

    def change_adapters(self, adapters: Mapping[str, AdapterSource | None]) -> None:
        """See ``AsyncUpdate.change_adapters``."""
        for name, source in checked_mapping("adapters", adapters).items():
            if source is None:
                self.remove_adapter(name)
            else:
                self.send_adapter(name, source)

    def __enter__(self) -> Update:
        self._transaction.start(self._thread.loop)
        self._thread.run(self._transaction.open())
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._thread.run(self._transaction.close(error))
        finally:
            self._transaction.abandon()

    def __reduce__(self) -> NoReturn:
        raise TypeError(CANNOT_PICKLE)
