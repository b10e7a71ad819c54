"""``StagedAdapters``: the adapters of one update in a worker, from their first tensor to the commit."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ... import errors
from ...integrity import digest
from ...transport.buckets import contents_of, first_non_finite
from .loading import Unusable
from .store import StoredAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ...integrity.digest import Contents
    from ...protocol import Units
    from ..load.intake import Intake
    from .store import AdapterStore


class StagedAdapters:
    """The adapters that one update or fetch brings.

    Attributes:
        voted: what the store serves of them, by name; set by the vote.
    """

    def __init__(self) -> None:
        self.voted: dict[str, StoredAdapter] = {}
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._contents: dict[str, Contents] = {}
        # Those of a trainer that announces no digests.
        self._unannounced: set[str] = set()
        self._lock = threading.Lock()

    def add(self, adapter: str, tensors: Mapping[str, torch.Tensor], contents: Contents | None = None) -> None:
        """Stage tensors of ``adapter`` that have arrived.

        Args:
            adapter: its name.
            tensors: its tensors, or some of them.
            contents: what they were compared with; None if the trainer announces no digests.
        """
        if name := first_non_finite(tensors.items()):
            raise ValueError(f"adapter {adapter}: {name} holds NaN or infinite values")
        copied = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        if contents is None:
            contents = contents_of(copied)
            self._unannounced.add(adapter)
        with self._lock:
            self._tensors.setdefault(adapter, {}).update(copied)
            self._contents.setdefault(adapter, {}).update(contents)

    def vote(self, units: Units, store: AdapterStore, intake: Intake) -> dict[str, str]:
        """Check that all adapters are here, and that this worker can serve them. Returns the manifest of each.

        Raises:
            RuntimeError: tensors are missing, or others than the trainer's.
            ValueError: this worker cannot serve one of them; the message names it and the cause.
        """
        manifests: dict[str, str] = {}
        for unit in units.adapters:
            contents, tensors = self._contents.get(unit.name, {}), self._tensors.pop(unit.name, {})
            manifests[unit.name] = digest.adapter_manifest(unit.config, contents.values())
            if unit.name not in self._unannounced and manifests[unit.name] != unit.manifest:
                raise RuntimeError(
                    f"adapter {unit.name} arrived with other tensors than were sent: {errors.SEND_AGAIN}"
                )
            try:
                model = store.load(unit.config, tensors, intake)
            except Unusable as reason:
                raise ValueError(f"nothing was applied: adapter {unit.name}: {reason}") from None
            self.voted[unit.name] = StoredAdapter(unit, contents, tensors, model)
        return manifests

    def free(self) -> None:
        self.voted, self._tensors, self._contents = {}, {}, {}
