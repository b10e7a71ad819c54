"""``WeightSyncClient``: vLLM's own trainer engines (nccl, ipc) over this package's control plane.

It satisfies ``vllm.distributed.weight_transfer.base.VLLMWeightSyncClient`` and imports nothing of vLLM. See
docs/vllm-trainer-api.md for what it promises and what it cannot.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from ...client import calls
from ...client.options import CALL_SECONDS, UPDATE_SECONDS, checked_seconds, checked_version
from ...errors import RequestError, WeightsTainted
from ...protocol import transfer_steps
from .session import WHAT, Session, worker_offsets

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import TypeVar

    from ...client.blocking import EngineGroup
    from ...control.command import Commander

    T = TypeVar("T")


class WeightSyncClient:
    """The control plane of one update after the other, on every engine of a group, headless ones too.

    Its methods are those of vLLM's protocol: synchronous, plain dicts. ``update_weights`` may run in another thread than the
    others. An error before ``start_weight_update`` returns leaves the old weights, unless it is ``WeightsTainted``.
    """

    def __init__(self, group: EngineGroup, *, timeout: float = UPDATE_SECONDS) -> None:
        """
        Args:
            group: all engines; ``close`` it after the last update.
            timeout: seconds for each update, from its start to its finish, and for meeting the trainer.
        """
        self.group = group
        self._timeout = checked_seconds(timeout)
        self._session: Session | None = None
        self._updates = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have every worker meet the trainer. With NCCL it blocks until all have, so vLLM calls it on a side thread.

        Raises:
            ValueError: ``world_size`` is not the trainer and all workers; nothing was sent.
            CallFailed: a worker did not meet the trainer; the message names it.
        """
        self._run(self._init(init_info))

    def shutdown_weight_transfer_engine(self) -> None:
        """Have every worker leave the trainer.

        Raises:
            CallFailed: a worker did not; the message names it.
        """
        self._run(self._call_all(transfer_steps.SHUTDOWN, {}))

    def start_weight_update(self) -> None:
        """Take the lease, pause every engine, and make every model ready. From here on nothing can be taken back.

        Raises:
            ArealError: ``WeightsTainted``: some engine had begun. Any other: the old weights are served.
        """
        if self._session is not None:
            raise RequestError("state", f"{WHAT} has been started by this client: finish it first")
        session = self._run(self._begin())
        self._session = session

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Have every worker receive and load one piece. A list has one for each worker of all replicas.

        Raises:
            WeightsTainted: a worker failed; the session is over.
        """
        session = self._require()
        try:
            self._run(self._update(session, update_info))
        except BaseException as error:
            self.abandon_weight_update()
            if isinstance(error, WeightsTainted) or not isinstance(error, Exception):
                raise
            raise WeightsTainted(
                f"{WHAT} failed at update, and the engines serve nothing: {error}; send again"
            ) from error

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Make the new weights whole, name them, and let the engines run that ran before.

        Args:
            weight_version: shown by ``status`` and by outputs (default: the number of this client's updates).

        Raises:
            WeightsTainted: a worker failed.
            PauseFailed: the new weights are live, and an engine did not resume.
        """
        session, self._session = self._require(), None
        self._updates += 1
        self._run(session.finish(checked_version(self._updates if weight_version is None else weight_version)))

    def abandon_weight_update(self) -> None:
        """Give up what was started. Engines stay tainted until an update succeeds. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            self._run(session.abandon())

    def _require(self) -> Session:
        if self._session is None:
            raise RequestError("state", f"{WHAT} has not been started: call start_weight_update first")
        return self._session

    @property
    def _commander(self) -> Commander:
        return self.group._group._commander  # noqa: SLF001 - one package

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.group._thread.run(work)  # noqa: SLF001 - one package

    async def _begin(self) -> Session:
        session = Session(self._commander, self._timeout)
        await session.start()
        return session

    async def _update(self, session: Session, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        from ...transport.native_handles import to_plain

        if not isinstance(update_info, list):
            await session.update(to_plain(update_info))
            return
        engines = {engine.name: engine for engine in (await self._commander.engines(self._timeout)).values()}
        offsets, total = worker_offsets(engines)
        if len(update_info) != total:
            raise ValueError(f"update_info has {len(update_info)} entries, and there are {total} workers")
        ends = {name: offsets[name] + _replica_workers(engines, name) for name in engines}
        parts = {name: to_plain(update_info[offsets[name] : ends[name]]) for name in engines}
        await session.update(parts, each=True)

    async def _init(self, init_info: dict[str, Any]) -> None:
        engines = await self._commander.engines(self._timeout)
        offsets, total = worker_offsets(engines)
        world_size, first = init_info.get("world_size"), init_info.get("rank_offset", 0)
        if world_size is not None and world_size != total + first:
            raise ValueError(
                f"world_size is {world_size}, but {first} trainer ranks and {total} workers of {len(engines)} engines make "
                f"{total + first}: pass world_size={total + first}"
            )
        infos = {name: dict(init_info) for name in engines}
        if "rank_offset" in init_info:
            for name, info in infos.items():
                info["rank_offset"] = first + offsets[name]
        await self._call_all(transfer_steps.INIT, infos)

    async def _call_all(self, step: str, arguments: dict[str, dict[str, Any]]) -> None:
        ends = time.monotonic() + self._timeout
        async with self._commander.command(WHAT, max(self._timeout, CALL_SECONDS)) as targets:
            encoded = {name: msgspec.msgpack.encode([arguments[name]] if name in arguments else []) for name in targets}
            engines = {name: target.engine for name, target in targets.items()}
            epochs = {name: target.epoch for name, target in targets.items()}
            found = await calls.ask(self._commander, step, encoded, engines, epochs, ends)
            found.values  # noqa: B018 - raises what a worker raised


def _replica_workers(engines: dict[str, Any], name: str) -> int:
    return sum(len(one.workers) for one in engines.values() if one.replica == engines[name].replica)
