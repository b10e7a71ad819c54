"""``ArealVLLMClient``: TRL's client of a vLLM server, whose weight syncs are updates of this package.

Completions go to the server as before. Weights go to every engine that the directory knows, as one update.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient

from ...errors import RequestError
from ..syncs import Syncs, SyncSettings, check_has, warn_unless_tested
from . import colocated

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_TESTED = ("trl", "1.16.0")
_REPLACED = ("init_communicator", "update_named_params", "update_model_params", "reset_prefix_cache")


class ArealVLLMClient(VLLMClient):  # type: ignore[misc]
    """TRL makes it in the trainer's main process. The server needs no ``--weight-transfer-config``."""

    settings = SyncSettings()
    syncs: Syncs | None = None
    _collected: list[tuple[str, torch.Tensor]] | None = None

    def init_communicator(self, device: Any = 0) -> None:
        """Find every engine. ``device`` is not needed: each update chooses how its tensors travel.

        Raises:
            EnginesMissing: an engine did not come up; the message names it.
        """
        if self.syncs is None:
            self.syncs = Syncs(self.settings)

    @contextlib.contextmanager
    def weight_update(self) -> Iterator[None]:
        """Make one update of all single tensors of the body. Nothing is sent where the body raises."""
        self._collected = []
        try:
            yield
            collected = self._collected
        finally:
            self._collected = None
        self._require().send(collected)

    def update_named_param(self, name: str, weights: torch.Tensor) -> None:
        """Update one tensor: inside ``weight_update`` with the others, otherwise it alone.

        Raises:
            UpdateAborted: it came alone, and an engine cannot keep the others; on a CPU none can.
        """
        if self._collected is not None:
            self._collected.append((name, weights.detach()))
        else:
            self._require().send([(name, weights)], partial=True)

    def update_named_params(self, metadata: Any, named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Move every engine to these weights, or none. The other ranks gather meanwhile, and are not left alone.

        Raises:
            ArealError: see docs/transactions.md.
        """
        if self._collected is not None:
            self._collected.extend((name, weights.detach()) for name, weights in named_params)
        else:
            self._require().send(named_params)

    def update_model_params(self, model: torch.nn.Module) -> None:
        """Move every engine to the weights of ``model``, or none."""
        self._require().send(model)

    def reset_prefix_cache(self) -> None:
        """Do nothing: an update has dropped what came from the old weights, on every engine."""

    def close_communicator(self) -> None:
        """Close the connections."""
        if self.syncs is not None:
            self.syncs.close()
            self.syncs = None

    def _require(self) -> Syncs:
        if self.syncs is None:
            raise RequestError("state", "the engines were not looked for: call init_communicator() first")
        return self.syncs


def use_areal(directory: str = "", **settings: Any) -> type[ArealVLLMClient]:
    """Let every ``GRPOTrainer`` (or ``RLOOTrainer``) of this process that is made later sync its weights by this package.

    Args:
        directory: the directory's address (default: AREAL_VLLM_DIRECTORY, else port 29700 of this host).
        settings: see ``SyncSettings``.

    Returns:
        the class that TRL will make its client of.

    Raises:
        ImportError: this TRL has no such client.
    """
    warn_unless_tested(*_TESTED)
    check_has(VLLMClient, _REPLACED, *_TESTED)

    class Client(ArealVLLMClient):
        """With the settings of this call."""

    Client.settings = SyncSettings(directory=directory, **settings)
    vllm_generation.VLLMClient = Client
    colocated.replace(vllm_generation.VLLMGeneration, Client.settings)
    return Client
