"""``AsyncEngineGroup``: every engine of a cluster as one object. ``blocking.py`` has its form without ``await``."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from typing import TYPE_CHECKING

import msgspec

from .. import protocol
from ..config import Settings, split_address
from ..control.command import DISCOVER_SECONDS, POLL_SECONDS, Commander, resume_all
from ..control.link import Link
from ..control.membership import describe_missing
from ..errors import EnginesMissing, EngineUnreachable, PauseFailed, RequestError, join
from ..protocol import security
from .sinks import Sinks
from .state import EngineState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..control.command import Target
    from ..integrity.verify import Verification
    from ..protocol import EngineInfo, KVPolicy, PauseMode, StagingKind, Version
    from .update import AsyncUpdate

PAUSE_LEASE_SECONDS = 30.0
# Grace period for clean-up requests sent after the deadline (under 1 s in total).
_GRACE_SECONDS = 0.5


class AsyncEngineGroup:
    """Every engine that the directory knows. All calls have deadlines, in seconds.

    Calls of one group run one after the other; other groups and the command line are kept out by a lease meanwhile.
    """

    def __init__(self, link: Link, directory: str, holder: str = "") -> None:
        self._link = link
        self._commander = Commander(link, directory, holder)
        self._sinks = Sinks()
        self._keeping_paused: asyncio.Task[None] | None = None

    @classmethod
    def connect(
        cls,
        address: str = "",
        *,
        key_file: str | os.PathLike[str] | None = None,
        key: security.ClusterKey | None = None,
    ) -> AsyncEngineGroup:
        """A group of all engines that the directory at ``address`` (``tcp://host:port``) knows, now or later.

        Nothing is sent yet: connecting before the engines are up works.

        Args:
            address: the directory (default: AREAL_VLLM_DIRECTORY, else this host's).
            key_file: the cluster's key (default: AREAL_VLLM_KEY_FILE).
            key: the key itself, for callers without a file.

        Raises:
            SettingsError: for a bad address or key file, or an address off loopback without a key.
        """
        settings = Settings.load()
        directory = address or settings.directory or "tcp://127.0.0.1:29700"
        file = os.fspath(key_file) if key_file else settings.key_file

        def key_for(host: str) -> security.ClusterKey:
            return key or security.key_for(host, file)

        key_for(split_address(directory)[0])
        return cls(Link(key_for, settings.max_message_mib << 20), directory)

    # Discovery

    async def engines(self, timeout: float = DISCOVER_SECONDS) -> list[EngineInfo]:
        """The engines that are alive, by replica and DP rank.

        Raises:
            EngineUnreachable: the directory does not answer.
        """
        return list((await self._commander.discover(timeout)).alive)

    async def wait_ready(self, engines: int | None = None, timeout: float = 600.0) -> list[EngineInfo]:
        """Wait until ``engines`` engines (default: all ranks of every replica that was seen) answer.

        Raises:
            EnginesMissing: time is up; the message says which are missing, by node and DP rank.
        """
        ends = time.monotonic() + timeout
        problem = ""
        while (left := ends - time.monotonic()) > 0:
            try:
                found = await self._commander.discover(min(left, DISCOVER_SECONDS))
                problem = describe_missing(found, engines)
                if not problem:
                    await asyncio.gather(*(self._hello(engine, left) for engine in found.alive))
                    return list(found.alive)
            except (EngineUnreachable, RequestError) as error:
                problem = str(error)
                if isinstance(error, RequestError) and error.kind == "protocol":
                    break
            await asyncio.sleep(min(POLL_SECONDS, max(ends - time.monotonic(), 0)))
        raise EnginesMissing(f"not ready after {timeout:.0f} s: {problem}")

    async def status(self, timeout: float = DISCOVER_SECONDS) -> list[EngineState]:
        """The state of every engine, also of those that were lost; an engine that does not answer is ``unreachable``."""
        found = await self._commander.discover(timeout)

        async def ask(engine: EngineInfo) -> EngineState:
            try:
                answer = await self._link.request(engine.address, protocol.GetStatus(), timeout)
            except (EngineUnreachable, RequestError) as error:
                return EngineState.of(engine, None, str(error))
            assert isinstance(answer, protocol.Status)
            return EngineState.of(answer.engine, answer)

        states = list(await asyncio.gather(*(ask(engine) for engine in found.alive)))
        lost = [EngineState.of(engine, None, f"not heard for {seconds:.0f} s") for engine, seconds in found.lost]
        return sorted(states + lost, key=lambda state: (state.replica, state.dp_rank))

    # Pause and resume

    async def pause(
        self,
        mode: PauseMode = "keep",
        *,
        kv: KVPolicy = "keep",
        deadline: float = 60.0,
        lease: float | None = PAUSE_LEASE_SECONDS,
    ) -> None:
        """Pause generation on every engine, all at once; returns when every engine is idle.

        Args:
            mode: ``keep`` freezes requests, ``wait`` lets them finish, ``abort`` ends them.
            kv: ``recompute`` drops cached keys and values, and frozen requests recompute theirs.
            deadline: seconds; when they are over the pause is taken back everywhere.
            lease: seconds after which engines run again by themselves when this group is closed or its process is gone (or
                stay paused, where they are set so). None: they stay paused until somebody resumes them.

        Raises:
            PauseFailed: naming the engines that did not pause; the others run again.
        """
        ends = time.monotonic() + deadline
        async with self._commander.command(deadline) as targets:
            self._keep_paused([target.engine.address for target in targets.values()], lease)
            holder = self._commander.holder
            pause = protocol.Pause(epoch=0, mode=mode, kv=kv, timeout=deadline, holder=holder, lease=lease or 0.0)
            requests = {name: msgspec.structs.replace(pause, epoch=target.epoch) for name, target in targets.items()}
            try:
                failed = await self._commander.ask_all(targets, requests, ends)
            except asyncio.CancelledError:
                await self._take_pause_back(targets)
                raise
            if failed:
                await self._take_pause_back(targets)
                raise PauseFailed(f"pause was taken back after {deadline:.1f} s: {join(failed)}")

    async def _take_pause_back(self, targets: Mapping[str, Target]) -> None:
        self._keep_paused([], None)
        await self._commander.ask_all(targets, resume_all(targets), time.monotonic() + _GRACE_SECONDS)

    def _keep_paused(self, addresses: list[str], lease: float | None) -> None:
        """Say every now and then that whoever paused these engines is alive; ends what was said so far."""
        if self._keeping_paused:
            self._keeping_paused.cancel()
            self._keeping_paused = None
        if not lease:
            return
        message = protocol.KeepPaused(holder=self._commander.holder, lease=lease)

        async def keep_saying() -> None:
            while True:
                await asyncio.sleep(lease / 4)
                await self._link.request_all({address: (address, message) for address in addresses}, lease / 4)

        self._keeping_paused = asyncio.create_task(keep_saying())

    async def resume(self, *, deadline: float = 60.0) -> None:
        """Let every engine generate again; does nothing on those that do.

        Raises:
            PauseFailed: naming the engines that did not resume.
        """
        ends = time.monotonic() + deadline
        async with self._commander.command(deadline) as targets:
            self._keep_paused([], None)
            if failed := await self._commander.ask_all(targets, resume_all(targets), ends):
                raise PauseFailed(f"not every engine resumed: {join(failed)}")

    # Update

    def update(  # noqa: PLR0913 - all but one by name
        self,
        version: Version,
        *,
        deadline: float = 300.0,
        transport: str = "auto",
        mode: PauseMode = "keep",
        kv: KVPolicy = "recompute",
        bucket_mib: int | None = None,
        staging: StagingKind = "auto",
        keep_buffers: bool = False,
        drop_lost: bool = False,
        on_phase: Callable[[str], None] | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> AsyncUpdate:
        """Move every engine to new weights, or none. Use: ``async with group.update(v) as update: await update.send(model)``.

        Args:
            version: names the new weights; any integer or string.
            deadline: seconds for all of it. Over it, every engine keeps its old weights.
            transport: ``broadcast`` (NCCL between GPUs, else gloo), ``ipc`` (CUDA, same host), ``shared_memory`` (same
                host), or ``auto``: ``ipc`` where a worker runs on the trainer's own GPU, or the only one on another that it
                sees and that can read its memory, else ``broadcast``.
                ``update.send("/path")`` goes by disk.
            mode: how engines pause for the switch, see ``pause``.
            kv: ``recompute`` drops keys and values of the old weights; ``keep`` reuses them, knowingly.
            bucket_mib: size of the pieces in which the weights travel; default: by NCCL a quarter, 128 at least and 1024
                at most, otherwise 256 from GPUs, 32 from host memory.
            staging: where workers keep the new weights until the switch: on their ``device``, in ``host`` memory, or
                (``auto``) on the device if there is room, else in host memory. It costs one copy of what each worker
                receives, or of its part where it needs a part; where there is no room the update is refused, with the
                numbers.
            keep_buffers: whether workers keep that memory for the next update, which is faster then, and the trainer its
                buckets; else it is given back once the update is over.
            drop_lost: go on without engines that are lost already, instead of EnginesMissing. One that comes back is stale:
                it serves nothing until an update reaches it.
            on_phase: called with the name of each phase (``begin``, ``prepare``, ``pause``, ``commit``, ``resume``,
                ``abort``) before its requests go out, on the event loop's thread.
            trace: where to write what trainer, engines and workers did when, also of an update that failed: JSON for
                https://ui.perfetto.dev. What of it cannot be had is logged, and no error.
        """
        from .update import AsyncUpdate, UpdateOptions  # they import torch, which status, pause and resume do without

        options = UpdateOptions(
            deadline=deadline,
            transport=transport,
            staging=staging,
            keep_buffers=keep_buffers,
            mode=mode,
            kv=kv,
            bucket_bytes=None if bucket_mib is None else bucket_mib << 20,
            drop_lost=drop_lost,
            on_phase=on_phase,
            trace=trace,
        )
        return AsyncUpdate(self._commander, self._sinks, version, options)

    async def verify(
        self, checkpoint: str | os.PathLike[str] | None = None, *, deadline: float = 300.0
    ) -> Verification:
        """Compare what the engines serve, while they generate.

        Every live parameter and buffer with those of the other engines, and with what it was after the engine's last
        commit; and what was applied with ``checkpoint``. Weights that a CPU backend keeps packed cannot be read beside a
        running engine: they are compared with a fresh load at the first update only.

        Args:
            checkpoint: a Hugging Face checkpoint directory that this process can read.
            deadline: seconds for all of it.

        Raises:
            NotACheckpoint: ``checkpoint`` is none.
            EngineUnreachable: an engine did not answer in time. RequestError: it could not tell.
        """
        from ..integrity.checkpoint import contents
        from ..integrity.verify import compare

        ends = time.monotonic() + deadline
        expected = await asyncio.to_thread(contents, checkpoint) if checkpoint is not None else None
        async with self._commander.command(max(ends - time.monotonic(), 0.1)) as targets:
            answers = await asyncio.gather(
                *(self._digests(name, target, expected is not None, ends) for name, target in targets.items())
            )
            statuses = {name: target.status for name, target in targets.items()}
            return await asyncio.to_thread(compare, dict(zip(targets, answers, strict=True)), statuses, expected)

    async def _digests(self, name: str, target: Target, with_contents: bool, ends: float) -> protocol.WeightDigests:
        while True:
            left = max(ends - time.monotonic(), 0.1)
            ask = protocol.DigestWeights(request=uuid.uuid4().hex, timeout=left, contents=with_contents)
            try:
                answer = await self._link.request(target.engine.address, ask, left + 0.2)
            except EngineUnreachable as error:
                raise EngineUnreachable(f"{name}: {error}") from None
            except RequestError as error:
                if error.kind != "busy" or left <= POLL_SECONDS:
                    raise RequestError(error.kind, f"{name}: {error}") from None
            else:
                assert isinstance(answer, protocol.WeightDigests)
                return answer
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        """Close the connections. Engines go on."""
        self._sinks.drop()
        self._keep_paused([], None)
        await self._link.close()

    async def __aenter__(self) -> AsyncEngineGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _hello(self, engine: EngineInfo, timeout: float) -> None:
        try:
            await self._link.request(engine.address, protocol.Hello(), timeout)
        except EngineUnreachable as error:
            raise EngineUnreachable(f"{engine.name} is registered, but {error}") from None
