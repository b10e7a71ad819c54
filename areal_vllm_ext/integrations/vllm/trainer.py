"""The trainer engine ``areal`` of vLLM's ``WeightTransferTrainerFactory``: vLLM's API, and this package's whole transaction.

The plugin registers it by its path, so it is imported only where a trainer asks for it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from ...client.blocking import EngineGroup
from ...client.options import UPDATE_SECONDS, UpdateOptions
from .client import WeightSyncClient
from .source import full_pass

if TYPE_CHECKING:
    from ...client.options import Senders
    from ...client.state import UpdateResult
    from ...protocol import Version


@dataclasses.dataclass
class ArealTrainerInitInfo(TrainerInitInfo):  # type: ignore[misc]
    """How the trainer reaches the engines, and how it updates them.

    Attributes:
        rank: of this process in the trainer; 0 commands.
        directory: the directory's address (default: AREAL_VLLM_DIRECTORY, else port 29700 of this host).
        key_file: the cluster's key (default: AREAL_VLLM_KEY_FILE).
        timeout: seconds for each update.
        senders: which ranks send, see ``EngineGroup.update``.
        process_group: the trainer's ranks (default: all ranks of torch.distributed, if it is initialised).
        options: further options of an update.
    """

    backend: ClassVar[str] = "areal"

    directory: str = ""
    key_file: str | None = None
    timeout: float = UPDATE_SECONDS
    senders: Senders = "rank0"
    process_group: Any = None
    options: UpdateOptions = dataclasses.field(default_factory=UpdateOptions)


class ArealTrainerEngine(TrainerWeightTransferEngine):  # type: ignore[misc]
    """Sends the source to every engine that the directory knows: all of them move, or none does."""

    init_info_cls = ArealTrainerInitInfo

    def __init__(self, init_info: ArealTrainerInitInfo, *, client: Any, source: Any) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self.rank = init_info.rank
        self._info = init_info
        self._ranks = init_info.process_group
        if self._ranks is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._ranks = dist.group.WORLD
        self._own = not isinstance(client, WeightSyncClient)
        self.group = (
            EngineGroup.connect(init_info.directory, key_file=init_info.key_file) if self._own else client.group
        )
        self._next: int | None = None

    @classmethod
    def trainer_init(
        cls, init_info: ArealTrainerInitInfo, *, client: Any = None, source: Any = None
    ) -> ArealTrainerEngine:
        """Connect on every trainer rank. Engines need no rendezvous.

        Args:
            init_info: see there.
            client: a ``WeightSyncClient``, whose group is used; any other is not needed, and left alone.
            source: vLLM's ``WeightSource`` of 0.32 or 0.33.

        Raises:
            ValueError: there is no source.
            SettingsError: the address or the key is wrong.
        """
        if source is None:
            raise ValueError("the trainer engine areal needs source=, a WeightSource")
        return cls(init_info, client=client, source=source)

    def send_weights(self, version: Version | None = None) -> UpdateResult:
        """Move every engine to the source's weights, or none. Called on every trainer rank.

        Args:
            version: names the new weights (default: one more than the highest number that an engine serves at first).

        Raises:
            ArealError: see docs/transactions.md for what engines serve after each of its kinds.
        """
        if version is None:
            if self._next is None:
                numbers = [state.version for state in self.group.status() if isinstance(state.version, int)]
                self._next = max(numbers, default=0) + 1
            version = self._next
        result = self.group.update_weights(
            full_pass(self.source),
            version=version,
            timeout=self._info.timeout,
            process_group=self._ranks,
            senders=self._info.senders,
            **self._info.options,
        )
        if isinstance(version, int):
            self._next = version + 1
        return result

    def shutdown(self) -> None:
        """Close the connections. Engines keep running."""
        if self._own:
            self.group.close()
