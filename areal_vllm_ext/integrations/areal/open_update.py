"""An update between its first call and continue."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .calls import AdapterMeta, Refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from ...client.relay import Relay
    from ...client.update import AsyncUpdate
    from ...protocol import Version
    from .calls import Meta


@dataclasses.dataclass
class OpenUpdate:
    """An update that is open.

    Attributes:
        relay: takes tensors of the trainer's process groups; None if they come from disk.
        adapters: that the relay brings, by name, as they were first announced.
    """

    update: AsyncUpdate
    version: Version
    relay: Relay | None = None
    adapters: dict[str, AdapterMeta] = dataclasses.field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether a process group can bring its first tensors yet."""
        return self.relay is not None and not self.relay.buckets

    async def receive(self, call: Meta, not_needed: Callable[[str], Awaitable[Iterable[str]]]) -> None:
        """Receive what was announced, on every worker of every engine.

        Args:
            call: announced it.
            not_needed: returns the adapters that go when an adapter of this name comes.

        Raises:
            Refused: an adapter is announced in two ways.
            UpdateAborted: an engine failed.
        """
        assert self.relay is not None
        name = ""
        if isinstance(call, AdapterMeta):
            name = call.lora_name
            first = self.adapters.setdefault(name, call)
            if first.config != call.config:
                raise Refused(
                    f"adapter {name} came with another configuration than before: send the same for each bucket"
                )
            if first is call:
                self.relay.bring_adapter(name, call.config, await not_needed(name))
        await self.relay.receive(call.group_name, call.tensors(), name)
