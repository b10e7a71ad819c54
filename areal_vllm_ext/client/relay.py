"""``Relay``: an update whose tensors come from a trainer without this package, which is rank 0 of torch process groups.

Such a trainer announces names, dtypes and shapes by a route of its own, and broadcasts the tensors to the workers. Whoever has
that route (``integrations/``) calls ``join`` once for each group, and for each update ``begin`` and ``receive``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InvalidWeights
from ..protocol import Bucket, Segment, Sender, TensorMeta, TorchGroup
from ..transport.buckets import packed_layout
from .lora import relayed
from .sending import Sending, SendReport

if TYPE_CHECKING:
    from ..protocol import EngineInfo
    from .group import AsyncEngineGroup
    from .update import AsyncUpdate


@dataclasses.dataclass(frozen=True)
class TrainerGroup:
    """A torch process group of a trainer, as its route describes it.

    Attributes:
        name: of the group.
        backend: of the group.
        rendezvous: ``host:port`` of the trainer's TCPStore.
        world_size: its ranks: the trainer, and the workers of all engines of all deployments.
        first_rank: of the first worker of this deployment.
        joining: names this joining; another one with the same name replaces it.
    """

    name: str
    backend: Literal["gloo", "nccl"]
    rendezvous: str
    world_size: int
    first_rank: int = 1
    joining: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def transfers(self, engines: dict[str, EngineInfo], *, established: bool) -> dict[str, TorchGroup]:
        """Return what each engine has to know to join, by its name. Ranks go by replica, DP rank and worker."""
        ordered = sorted(engines.items(), key=lambda item: (item[1].replica, item[1].dp_rank))
        places = [(name, rank) for name, engine in ordered for rank in sorted(worker.rank for worker in engine.workers)]
        ranks = {place: rank for rank, place in enumerate(places, self.first_rank)}
        return {
            name: TorchGroup(
                backend=self.backend,
                group=self.name,
                joining=self.joining,
                world_size=self.world_size,
                ranks={worker.rank: ranks[name, worker.rank] for worker in engine.workers},
                rendezvous=self.rendezvous,
                established=established,
            )
            for name, engine in engines.items()
        }


class _Joined(Exception):
    """Ends the update by which a group was joined."""


async def join(engines: AsyncEngineGroup, group: TrainerGroup, timeout: float) -> None:
    """Have every worker of every engine join a trainer's group; returns when all ranks are there.

    It is the begin of an update that is given up then: workers connect at the begin, and keep their connections.

    Raises:
        UpdateAborted: a worker could not join in time.
    """
    with contextlib.suppress(_Joined):
        async with engines.update(f"joining {group.name}", timeout=timeout) as update:
            relay = Relay(update)
            await relay.begin([group], joined=False)
            await relay.end_joining()
            raise _Joined


class Relay:
    """Announces an update's buckets for a trainer that broadcasts them.

    Attributes:
        buckets: how many have arrived at every worker.
    """

    def __init__(self, update: AsyncUpdate) -> None:
        self.buckets = 0
        self._weights = False  # whether base weights are among them
        self._transaction = update.transaction
        self._senders: dict[str, tuple[int, Sending]] = {}

    async def begin(self, groups: Sequence[TrainerGroup], *, joined: bool = True) -> None:
        """Begin the update at every engine, with a sender for each group.

        Args:
            groups: the trainer's groups.
            joined: whether every worker has joined them in an earlier update.

        Raises:
            UpdateAborted: an engine is not ready.
        """
        transaction = self._transaction
        delivery = transaction.delivery
        engines = {name: engine for name, (engine, _) in delivery.engines.items()}
        by_group = [group.transfers(engines, established=joined) for group in groups]
        senders = {
            name: {number: Sender(transfer=transfers[name]) for number, transfers in enumerate(by_group)}
            for name in engines
        }
        if joined:
            await delivery.describe()  # how much room staging needs
        await transaction.driver.begin(senders, delivery.stagings())
        self._senders = {
            group.name: (number, Sending(transaction.context, delivery.engines, number))
            for number, group in enumerate(groups)
        }

    async def end_joining(self) -> None:
        """Give up an update that was begun to join a group. Engines note no error."""
        driver = self._transaction.driver
        assert driver.coordinator is not None
        await driver.run(driver.coordinator.give_up(""))

    def bring_adapter(self, name: str, config: Mapping[str, Any], removed: Iterable[str]) -> None:
        """Note that the update brings a LoRA adapter, whose tensors ``receive`` receives.

        Args:
            name: the adapter's.
            config: peft's.
            removed: adapters that the engines need not serve any more.

        Raises:
            InvalidWeights: the name is none, or the update brings an adapter of this name already.
        """
        coordinator = self._transaction.driver.coordinator
        assert coordinator is not None
        self._transaction.adapters.add(name, relayed(name, config, coordinator.update))
        for one in removed:
            self._transaction.remove_adapter(one)

    async def receive(self, group: str, tensors: Sequence[TensorMeta], adapter: str = "") -> None:
        """Receive what the trainer broadcasts to ``group``; returns when every worker of every engine has staged it.

        Args:
            group: the trainer's group.
            tensors: what it broadcasts, in this order.
            adapter: whose tensors these are; empty for base weights.

        Raises:
            UpdateAborted: an engine failed; the message names it.
        """
        coordinator = self._transaction.driver.coordinator
        assert coordinator is not None
        _, sending = self._senders[group]
        segments, nbytes = packed_layout([Segment(meta, 0) for meta in tensors])
        report = sending.report
        bucket = Bucket(
            epoch=0,
            update=coordinator.update,
            index=report.buckets,
            nbytes=nbytes,
            segments=segments,
            adapter=adapter,
        )
        report.buckets += 1
        report.nbytes += nbytes
        await sending.announce(bucket)
        self.buckets += 1
        self._weights = self._weights or not adapter

    async def prepare(self) -> None:
        """Ask for the votes on all that has arrived. Leaving the update's block commits.

        Raises:
            InvalidWeights: nothing has arrived.
            UpdateAborted: an engine voted no.
        """
        if not self.buckets:
            raise InvalidWeights("no tensor has arrived")
        delivery = self._transaction.delivery
        for number, sending in self._senders.values():
            report = SendReport(sending.report.buckets, sending.report.nbytes, [], 0)
            delivery.record(number, report, complete=self._weights)
        await self._transaction.prepare()
