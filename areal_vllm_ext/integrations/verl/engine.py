"""``ArealCheckpointEngine``: the backend ``areal`` of verl's checkpoint engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from verl.checkpoint_engine import CheckpointEngine, CheckpointEngineRegistry

from ..syncs import Syncs, SyncSettings, warn_unless_tested

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    import torch

BACKEND = "areal"


@CheckpointEngineRegistry.register(BACKEND)
class ArealCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """Updates every engine from the actor's ranks. A rollout worker has nothing to receive."""

    # verl takes an empty stream of this format for "no weight changed": it sets the step, and calls no loader of its own.
    wire_format = "delta_flush"

    def __init__(self, bucket_size: int = 0, is_master: bool = False, **settings: Any) -> None:
        """verl makes it in each process of actor and rollout, with ``checkpoint_engine.engine_kwargs.areal``.

        Args:
            bucket_size: not used; the option is ``options.bucket_mib``.
            is_master: not used; rank 0 of torch.distributed commands.
            settings: see ``SyncSettings``.
        """
        warn_unless_tested("verl", "0.9.1")
        self._settings = SyncSettings(**settings)
        self._syncs: Syncs | None = None

    def prepare(self) -> dict[str, Any]:
        """Do nothing: actor and rollout workers need not meet."""
        return {}

    @classmethod
    def build_topology(
        cls,
        actor_wg_world_size: int,  # noqa: ARG003 - of verl's interface, as the next two
        rollout_world_size: int,  # noqa: ARG003
        metadata: list[dict[str, Any]],  # noqa: ARG003
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Do nothing: actor and rollout workers need not meet."""
        return {}, {}

    def init_process_group(self) -> None:
        """Do nothing: actor and rollout workers need not meet."""

    def finalize(self) -> None:
        """Do nothing: the connections are used again."""

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, float]:
        """Move every engine to ``weights``, or none. All ranks of the actor call it, because ``weights`` gathers.

        Args:
            weights: walked to their end, also where the update fails.
            global_steps: the version (default: the next number).

        Returns:
            metrics, which verl logs.

        Raises:
            ArealError: see docs/transactions.md.
        """
        if self._syncs is None:
            self._syncs = Syncs.of_all_ranks(self._settings)
        result = self._syncs.send(weights, version=global_steps)
        return {
            "timing_s/areal_update": result.total_ms / 1000,
            "timing_s/areal_pause": result.pause_ms / 1000,
        }

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[Any]:
        """Give nothing: engines receive their weights from the actor."""
        return
        yield
