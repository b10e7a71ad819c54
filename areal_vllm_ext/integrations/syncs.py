"""Numbered updates of one group, as trainers of other packages ask for them. Nothing here imports such a package."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from ..client.blocking import EngineGroup
from ..client.options import READY_SECONDS, UPDATE_SECONDS, UpdateOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed import ProcessGroup

    from ..client.options import Senders
    from ..client.state import UpdateResult
    from ..protocol import Version


@dataclasses.dataclass(frozen=True)
class SyncSettings:
    """How a trainer reaches its engines, and how it updates them.

    Attributes:
        directory: the directory's address (default: AREAL_VLLM_DIRECTORY, else port 29700 of this host).
        key_file: the cluster's key (default: AREAL_VLLM_KEY_FILE).
        engines: how many engines to wait for (default: all DP ranks of every replica that was seen).
        timeout: seconds for each update.
        senders: which ranks of the trainer send, see ``EngineGroup.update``. Of use with ``process_group`` only.
        options: further options of an update.
        on_update: called with the result of each update.
    """

    directory: str = ""
    key_file: str | None = None
    engines: int | None = None
    timeout: float = UPDATE_SECONDS
    senders: Senders = "rank0"
    options: UpdateOptions = dataclasses.field(default_factory=UpdateOptions)
    on_update: Callable[[UpdateResult], object] | None = None


class Syncs:
    """A group, and the number of the next update: one more than the highest that an engine serves at first."""

    def __init__(self, settings: SyncSettings, process_group: ProcessGroup | None = None) -> None:
        """
        Args:
            settings: see there.
            process_group: the trainer's ranks, if it has several. Each of them makes the same calls.

        Raises:
            EnginesMissing: an engine did not come up; the message names it.
        """
        self._settings = settings
        self._ranks = process_group
        self.group = EngineGroup.connect(settings.directory, key_file=settings.key_file)
        self.group.wait_ready(settings.engines, READY_SECONDS)
        numbers = [state.version for state in self.group.status() if isinstance(state.version, int)]
        self.version = max(numbers, default=0)

    @classmethod
    def of_all_ranks(cls, settings: SyncSettings) -> Syncs:
        """Return those of all ranks of torch.distributed, or of this process alone where it is not initialized."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        return cls(settings, dist.group.WORLD if several else None)

    def send(self, weights: Any, version: Version | None = None, **options: Any) -> UpdateResult:
        """Move every engine to ``weights``, or none.

        Args:
            weights: see ``EngineGroup.update_weights``.
            version: names them (default: the next number).
            options: of this update, over those of the settings.

        Raises:
            ArealError: what the engines serve then is in docs/transactions.md. ``weights`` were walked to their end.
        """
        settings = self._settings
        merged: dict[str, Any] = {**settings.options, **options}
        if version is None:
            version = self.version + 1
        if isinstance(version, int):
            self.version = version  # also after a failure, so that no two updates have one name
        result = self.group.update_weights(
            weights,
            version=version,
            timeout=settings.timeout,
            process_group=self._ranks,
            senders=settings.senders,
            **merged,
        )
        if settings.on_update is not None:
            settings.on_update(result)
        return result

    def close(self) -> None:
        """Close the connections. Engines keep running."""
        self.group.close()


def check_has(owner: type, names: Iterable[str], package: str, tested: str) -> None:
    """Raise ImportError if the class ``owner`` of ``package`` lacks methods of these names, which are replaced."""
    if missing := [name for name in names if not hasattr(owner, name)]:
        raise ImportError(
            f"{package} {_installed(package)}: its {owner.__name__} has no {', '.join(missing)}; use {tested}, which was tested"
        )


def warn_unless_tested(package: str, tested: str) -> None:
    """Say in one line that ``package`` is installed in another version than was tested. A patch release is not another."""
    found = _installed(package)
    if found.split(".")[:2] != tested.split(".")[:2]:
        warnings.warn(
            f"{package} {found}: the integration was tested on {tested} only; install that version, or check the weights of "
            "the first updates",
            stacklevel=3,
        )


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "of unknown version"
