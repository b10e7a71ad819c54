"""Numbered updates of one group, as TRL's two kinds of trainer ask for them. Nothing here imports TRL."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ...client.blocking import EngineGroup
from ...client.options import READY_SECONDS, UPDATE_SECONDS, UpdateOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...client.state import UpdateResult


@dataclasses.dataclass(frozen=True)
class SyncSettings:
    """How a trainer reaches its engines, and how it updates them.

    Attributes:
        directory: the directory's address (default: AREAL_VLLM_DIRECTORY, else port 29700 of this host).
        key_file: the cluster's key (default: AREAL_VLLM_KEY_FILE).
        engines: how many engines to wait for (default: all DP ranks of every replica that was seen).
        timeout: seconds for each update.
        options: further options of an update.
        on_update: called with the result of each update.
    """

    directory: str = ""
    key_file: str | None = None
    engines: int | None = None
    timeout: float = UPDATE_SECONDS
    options: UpdateOptions = dataclasses.field(default_factory=UpdateOptions)
    on_update: Callable[[UpdateResult], object] | None = None


class Syncs:
    """A group, and the number of the next update: one more than the highest that an engine serves at first."""

    def __init__(self, settings: SyncSettings) -> None:
        self._settings = settings
        self.group = EngineGroup.connect(settings.directory, key_file=settings.key_file)
        self.group.wait_ready(settings.engines, READY_SECONDS)
        numbers = [state.version for state in self.group.status() if isinstance(state.version, int)]
        self.version = max(numbers, default=0)

    def send(self, weights: Any, **options: Any) -> UpdateResult:
        """Move every engine to ``weights``, or none.

        Raises:
            ArealError: what the engines serve then is in docs/transactions.md. ``weights`` were walked to their end.
        """
        settings = self._settings
        merged: dict[str, Any] = {**settings.options, **options}
        self.version += 1  # also after a failure, so that no two updates have one name
        result = self.group.update_weights(weights, version=self.version, timeout=settings.timeout, **merged)
        if settings.on_update is not None:
            settings.on_update(result)
        return result

    def close(self) -> None:
        """Close the connections. Engines keep running."""
        self.group.close()
