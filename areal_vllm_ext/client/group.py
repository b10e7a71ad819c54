"""``AsyncEngineGroup``: every engine of a cluster as one object. ``blocking.py`` has the form without ``await``."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from .. import protocol
from ..config import Settings, split_address
from ..control.command import BEHIND, DISCOVER_SECONDS, POLL_SECONDS, Commander, resume_all
from ..control.link import Link
from ..control.membership import describe_missing
from ..errors import EnginesMissing, EngineUnreachable, PauseFailed, RequestError, join
from ..protocol import KVPolicy, PauseMode, security
from . import calls, sleeping
from .options import (
    CALL_SECONDS,
    MAX_LEASE_SECONDS,
    PAUSE_LEASE_SECONDS,
    PAUSE_SECONDS,
    READY_SECONDS,
    UPDATE_SECONDS,
    VERIFY_SECONDS,
    Options,
    check_choice,
    checked_count,
    checked_path,
    checked_rank,
    checked_seconds,
    checked_version,
)
from .pause_lease import PauseLease
from .sinks import Sinks
from .state import EngineState
from .walk import Walk, walk

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from typing_extensions import Unpack

    from ..control.command import Target
    from ..integrity.verify import Verification
    from ..protocol import EngineInfo, SleepLevel, SleepTag, Version
    from .calls import CallResult
    from .drafts import DraftSource
    from .lora import AdapterSource
    from .options import UpdateOptions
    from .state import UpdateResult
    from .update import AsyncUpdate
    from .weights import WeightSource

# Grace period for clean-up requests sent after the deadline (under 1 s in total).
_GRACE_SECONDS = 0.5


def cannot_pickle(kind: str) -> str:
    """Return what to do instead of pickling a group."""
    return (
        f"{kind} cannot be pickled, because its connections belong to this process: call {kind}.connect(...) in the process "
        "that needs it"
    )


class AsyncEngineGroup:
    """Every engine that the directory knows. Made by ``connect``; every call has a timeout in seconds.

    Calls of one group run one after the other. A lease keeps out other groups and the command line meanwhile.
    """

    def __init__(self, link: Link, directory: str, holder: str = "") -> None:
        self._link = link
        self._commander = Commander(link, directory, holder)
        self._sinks = Sinks()
        self._pause_lease = PauseLease(self._commander)

    @classmethod
    def connect(
        cls,
        address: str = "",
        *,
        key_file: str | os.PathLike[str] | None = None,
        key: security.ClusterKey | None = None,
    ) -> AsyncEngineGroup:
        """Return a group of all engines that the directory at ``address`` knows, now or later.

        Nothing is sent yet, so that a trainer can connect before the engines are up. All replicas share one directory.

        Args:
            address: the directory, ``tcp://host:port`` (default: AREAL_VLLM_DIRECTORY, else port 29700 of this host).
            key_file: the file with the cluster's key (default: AREAL_VLLM_KEY_FILE).
            key: the key itself, for callers without a file.

        Raises:
            SettingsError: the address or the key file is wrong, or an address off loopback has no key.
        """
        settings = Settings.load()
        directory = address or settings.directory or "tcp://127.0.0.1:29700"
        file = checked_path("key_file", key_file) if key_file else settings.key_file

        def key_for(host: str) -> security.ClusterKey:
            return key or security.key_for(host, file)

        key_for(split_address(directory)[0])
        return cls(Link(key_for, settings.max_message_mib << 20), directory)

    # Discovery

    async def engines(self, timeout: float = DISCOVER_SECONDS) -> list[EngineInfo]:
        """Return the engines that are alive, by replica and DP rank.

        Raises:
            EngineUnreachable: the directory does not answer.
        """
        return list((await self._commander.discover(checked_seconds(timeout))).alive)

    async def wait_ready(self, engines: int | None = None, timeout: float = READY_SECONDS) -> list[EngineInfo]:
        """Wait until ``engines`` engines answer (default: all DP ranks of every replica that was seen).

        Raises:
            EnginesMissing: time is up; the message names the missing engines, by node and DP rank.
        """
        ends = time.monotonic() + checked_seconds(timeout)
        count = None if engines is None else checked_count("engines", engines)
        problem = ""
        while (left := ends - time.monotonic()) > 0:
            try:
                found = await self._commander.discover(min(left, DISCOVER_SECONDS))
                problem = describe_missing(found, count)
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
        """Return the state of every engine, lost engines included.

        An engine that does not answer has the generation ``unreachable``, and the cause in ``error``.

        Raises:
            EngineUnreachable: the directory does not answer.
        """
        ends = time.monotonic() + checked_seconds(timeout)
        found = await self._commander.discover(timeout)

        async def ask(engine: EngineInfo) -> EngineState:
            try:
                left = max(ends - time.monotonic(), 0.1)
                answer = await self._link.request(engine.address, protocol.GetStatus(), left)
            except (EngineUnreachable, RequestError) as error:
                return EngineState.of(engine, None, str(error))
            assert isinstance(answer, protocol.Status)
            return EngineState.of(answer.engine, answer)

        states = list(await asyncio.gather(*(ask(engine) for engine in found.alive)))
        lost = [EngineState.of(engine, None, f"no heartbeat for {seconds:.0f} s") for engine, seconds in found.lost]
        return sorted(states + lost, key=lambda state: (state.replica, state.dp_rank))

    # Pause and resume

    async def pause(
        self,
        mode: PauseMode = "keep",
        *,
        kv: KVPolicy = "keep",
        timeout: float = PAUSE_SECONDS,
        lease: float | None = PAUSE_LEASE_SECONDS,
    ) -> None:
        """Pause generation on every engine, all at once; returns when every engine is idle.

        Args:
            mode: ``keep`` freezes requests, ``wait`` lets them finish, ``abort`` ends them.
            kv: ``keep`` (the default) keeps cached keys and values, because a pause alone changes no weights; so does
                ``reuse``. ``recompute`` drops them, and frozen requests compute theirs again.
            timeout: seconds. After them the pause is taken back on every engine.
            lease: seconds after which engines resume by themselves once this group is closed or its process is gone.
                Engines that are set to stay paused do not resume. None: engines stay paused until somebody resumes them.

        Raises:
            PauseFailed: naming the engines that did not pause; the others run again.
        """
        ends = time.monotonic() + checked_seconds(timeout)
        check_choice("mode", mode, PauseMode)
        check_choice("kv", kv, KVPolicy)
        seconds = 0.0 if lease is None else checked_seconds(lease, "lease", MAX_LEASE_SECONDS)
        async with self._commander.command("pause", timeout) as targets:
            self._pause_lease.renew([target.engine.address for target in targets.values()], seconds)
            holder = self._commander.holder
            pause = protocol.Pause(epoch=0, mode=mode, kv=kv, timeout=timeout, holder=holder, lease=seconds)
            requests = {name: msgspec.structs.replace(pause, epoch=target.epoch) for name, target in targets.items()}
            try:
                failed = await self._commander.ask_all(targets, requests, ends)
            except asyncio.CancelledError:
                await self._take_pause_back(targets)
                raise
            if failed:
                await self._take_pause_back(targets)
                raise PauseFailed(f"pause was taken back after {timeout:.1f} s: {join(failed)}")

    async def _take_pause_back(self, targets: Mapping[str, Target]) -> None:
        self._pause_lease.stop()
        await self._commander.ask_all(targets, resume_all(targets), time.monotonic() + _GRACE_SECONDS)

    async def resume(self, *, timeout: float = PAUSE_SECONDS) -> None:
        """Let every engine generate again. An engine that generates already is left alone.

        Raises:
            PauseFailed: naming the engines that did not resume.
        """
        ends = time.monotonic() + checked_seconds(timeout)
        async with self._commander.command("resume", timeout) as targets:
            self._pause_lease.stop()
            failed = await self._commander.ask_all(targets, resume_all(targets), ends)
            failed |= {name: BEHIND for name, target in targets.items() if target.behind and name not in failed}
            if failed:
                raise PauseFailed(f"not every engine resumed: {join(failed)}")

    # Sleep

    async def sleep(self, level: SleepLevel = 1, *, mode: PauseMode = "keep", timeout: float = PAUSE_SECONDS) -> None:
        """Give the device memory of every engine back, by vLLM's sleep mode; returns when it is free.

        Engines that run are paused first. An engine sleeps until ``wake_up``, also when this group is closed. An update
        that comes meanwhile wakes the weights only.

        Args:
            level: 1 keeps the weights aside in host memory. 2 discards them, so the engine serves nothing until an update.
            mode: what becomes of running requests, see ``pause``. With ``keep`` they go on after the engine is awake, and
                compute their keys and values again.
            timeout: seconds. After them, sleep of level 1 is taken back on every engine.

        Raises:
            SleepFailed: naming the engines that did not fall asleep, or that were started without ``--enable-sleep-mode``.
        """
        check_choice("level", level, protocol.SleepLevel)
        check_choice("mode", mode, PauseMode)
        plain: protocol.SleepLevel = 1 if level == 1 else 2  # numpy's integers cannot be sent
        await sleeping.sleep(self._commander, plain, mode, checked_seconds(timeout))

    async def wake_up(self, tags: Sequence[SleepTag] | None = None, *, timeout: float = PAUSE_SECONDS) -> None:
        """Bring weights and KV cache of every engine back to its device.

        An engine that ran before ``sleep`` runs again once it is wholly awake; one that was paused before stays paused. An
        engine whose weights were discarded (level 2) stays paused until an update brings new ones.

        Args:
            tags: ``["weights"]`` (then an update may come), ``["kv_cache"]``, or None for all.
            timeout: seconds.

        Raises:
            SleepFailed: naming the engines that did not wake up or did not resume. Calling again does no harm.
        """
        for tag in tags or ():
            check_choice("tags", tag, protocol.SleepTag)
        await sleeping.wake_up(self._commander, tuple(tags or ()), checked_seconds(timeout))

    async def wake_up_with(
        self,
        weights: WeightSource | str | os.PathLike[str],
        *,
        version: Version,
        draft: DraftSource | None = None,
        timeout: float = UPDATE_SECONDS,
        dtype: str | torch.dtype | None = None,
        **options: Unpack[UpdateOptions],
    ) -> UpdateResult:
        """Wake every engine up with new weights: update, which wakes the weights' memory, then wake the KV cache.

        This is the order for engines that sleep at either level. Where the update fails, the KV cache sleeps on; calling
        again goes on from there. Arguments and results are those of ``update_weights``.
        """
        ends = time.monotonic() + checked_seconds(timeout)
        result = await self.update_weights(
            weights, version=version, draft=draft, timeout=timeout, dtype=dtype, **options
        )
        await self.wake_up(timeout=max(ends - time.monotonic(), 0.05))
        return result

    # Update

    async def update_weights(
        self,
        weights: WeightSource | str | os.PathLike[str] | None = None,
        *,
        version: Version,
        draft: DraftSource | None = None,
        adapters: Mapping[str, AdapterSource | None] | None = None,
        timeout: float = UPDATE_SECONDS,
        dtype: str | torch.dtype | None = None,
        **options: Unpack[UpdateOptions],
    ) -> UpdateResult:
        """Move every engine to ``weights`` and ``adapters``, or none.

        Args:
            weights: an ``nn.Module``, a state dict, an iterable of (name, tensor), or the path of a Hugging Face
                checkpoint directory that every engine can read. None (the default) leaves the base weights as they are.
            version: names the new weights; any integer of 64 bits, or a string.
            draft: the weights of the engines' drafter, see ``AsyncUpdate.send``.
            adapters: LoRA adapters by name, see ``AsyncUpdate.send_adapter``; None removes one. Others stay as they are.
            timeout: seconds for the whole update. After them, every engine keeps its old weights.
            dtype: the dtype in which floating-point tensors are sent, see ``AsyncUpdate.send``.
            options: see ``UpdateOptions``.

        Returns:
            what the update took, and which engines serve the new weights.

        Raises:
            ArealError: see ``docs/transactions.md`` for what engines serve after each of its kinds.
        """
        weights = walk(weights, timeout)
        try:
            async with self.update(version, timeout=timeout, **options) as update:
                await update.change_adapters(adapters or {})
                if weights is not None:
                    await update.send(weights, dtype=dtype, draft=draft)
        except Exception:
            if isinstance(weights, Walk):
                await asyncio.to_thread(weights.drain)
            raise
        return update.result

    def update(
        self, version: Version, *, timeout: float = UPDATE_SECONDS, **options: Unpack[UpdateOptions]
    ) -> AsyncUpdate:
        """Return an update as a block, for trainers that do more between its start and its commit.

        Use: ``async with group.update(step) as update: await update.send(model)``. Leaving the block commits.

        Args:
            version: names the new weights; any integer of 64 bits, or a string.
            timeout: seconds for the whole update. After them, every engine keeps its old weights.
            options: see ``UpdateOptions``.
        """
        # These import torch, which status, pause and resume do without.
        from .transaction import Transaction
        from .update import AsyncUpdate

        checked = Options.of(timeout, options)
        return AsyncUpdate(Transaction(self._commander, self._sinks, checked_version(version), checked))

    async def verify(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        draft: str | os.PathLike[str] | None = None,
        timeout: float = VERIFY_SECONDS,
    ) -> Verification:
        """Compare what the engines serve, while they generate.

        Every live parameter and buffer is compared with the other engines', and with its value after the engine's last
        commit. What was applied is compared with ``checkpoint``. A CPU backend keeps some weights packed, and these cannot
        be read beside a running engine: they are compared with a fresh load at the first update only.

        Args:
            checkpoint: a Hugging Face checkpoint directory that this process can read.
            draft: such a directory of the engines' drafter, beside ``checkpoint``; one that holds both needs none.
            timeout: seconds for all of it.

        Raises:
            NotACheckpoint: ``checkpoint`` or ``draft`` is not a checkpoint directory.
            EngineUnreachable: an engine did not answer in time.
            RequestError: an engine refused.
        """
        from .verifying import verify

        path = None if checkpoint is None else checked_path("checkpoint", checkpoint)
        drafter = None if draft is None else checked_path("draft", draft)
        return await verify(self._commander, path, drafter, checked_seconds(timeout))

    async def call(self, method: str, *arguments: Any, timeout: float = CALL_SECONDS, lease: bool = True) -> CallResult:
        """Call a method of your own worker extension on every worker of every engine, headless ones too.

        The method runs on each worker's own thread, between two steps; its engine generates nothing meanwhile. It must
        not change the weights. Engines that sleep run it too, and have no weights in memory then.

        Args:
            method: the name of a public method that a subclass of ``WorkerExtension`` defines.
            arguments: None, bool, int of 64 bits, float, str, bytes, and lists and dicts of these, as msgpack carries them.
                Tuples arrive as lists. So do answers.
            timeout: seconds. After them, an engine that has not begun to run the method does not run it.
            lease: hold the group's lease meanwhile, so that no update runs beside the call. False: call at once, also
                inside an update's block.

        Returns:
            the answer of each worker; an exception of the method is an answer too, see ``WorkerAnswer``.

        Raises:
            CallFailed: an engine did not answer in time, or could not ask its workers; ``answers`` has the others'.
            RequestError: a call must not reach this method, or the lease is held by another client.
            EnginesMissing: an engine is lost or was never there; nothing was called.
            TypeError: msgpack cannot carry an argument; nothing was sent.
            ValueError: the arguments are longer than engines read (AREAL_VLLM_MAX_MESSAGE_MIB); nothing was called.
        """
        encoded = calls.encode_arguments(method, arguments)
        return await calls.call(self._commander, method, encoded, checked_seconds(timeout), lease=lease)

    async def forget(self, replica: str, dp_rank: int | None = None, *, timeout: float = DISCOVER_SECONDS) -> None:
        """Give up lost engines for good, so that commands go on without them.

        An engine that comes back all the same is a member again, once an update has reached it.

        Args:
            replica: the replica's name, as ``status`` shows it.
            dp_rank: the engine's DP rank (default: all ranks of the replica).
            timeout: seconds.

        Raises:
            EngineUnreachable: the directory does not answer.
            RequestError: an engine is alive, or the directory does not know the replica.
        """
        rank = None if dp_rank is None else checked_rank("dp_rank", dp_rank)
        await self._commander.forget(replica, rank, checked_seconds(timeout))

    async def close(self) -> None:
        """Close the connections. Engines keep running.

        A call that has not ended loses its lease at once, so that other clients need not wait for it. What an update has
        begun is aborted or committed everywhere, by the next client or by the directory.
        """
        await self._commander.close()
        self._sinks.drop()
        self._pause_lease.stop()
        self._link.close()

    async def __aenter__(self) -> AsyncEngineGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(cannot_pickle("AsyncEngineGroup"))

    async def _hello(self, engine: EngineInfo, timeout: float) -> None:
        try:
            await self._link.request(engine.address, protocol.Hello(), timeout)
        except EngineUnreachable as error:
            raise EngineUnreachable(f"{engine.name} is registered, but {error}") from None
