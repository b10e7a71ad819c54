"""``Session``: what AReaL's calls mean for all engines of the deployment.

    pause ──▶ [meta ──▶ xccl] x N ──▶ continue         tensors by a torch process group
    pause ──▶ disk ──▶ continue                        a checkpoint directory
    sleep ──▶ pause ──▶ disk ──▶ continue ──▶ wake_up  the same, while a trainer on the same GPUs works

Tensors are staged at ``xccl`` and ``disk``; ``continue`` commits. A LoRA adapter comes by either way. Engines that sleep cannot
stage (``asleep.py``). The session decides nothing about safety: it is a client of ``AsyncEngineGroup``, whose
engines vote, commit and recover as for any other. One task does one call after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

from ...client.relay import Relay, TrainerGroup, join
from ...errors import ArealError, UpdateInDoubt, WeightsTainted
from .asleep import SleepingEngines
from .calls import AdapterMeta, Disk, Init, LoadAdapter, Meta, Refused, one_line
from .limits import Limits
from .names import outdated, version_of_adapter, version_of_path
from .open_update import OpenUpdate
from .servers import Servers, followed

if TYPE_CHECKING:
    from ...client.group import AsyncEngineGroup
    from ...client.lora import AdapterSource
    from ...protocol import SleepTag, Version

logger = logging.getLogger("vllm.areal_vllm_ext")


class Session:
    """One trainer's calls on one server. Several servers of one directory: the first of them acts, the others follow it."""

    def __init__(self, engines: AsyncEngineGroup, own: tuple[str, int], limits: Limits) -> None:
        """
        Args:
            engines: the deployment.
            own: the replica, and the first DP rank, of this server.
            limits: how long the trainer may take.
        """
        self._engines, self._limits = engines, limits
        self._servers = Servers(engines, own)
        self._groups: dict[str, TrainerGroup] = {}
        self._announced: Meta | None = None
        self._open: OpenUpdate | None = None
        self._paused = False
        # Why the last update failed. Continue answers it until the trainer begins again.
        self._failure = ""
        # Whether workers have been asked to receive tensors of an update that has not been committed.
        self._received = False
        self._sleeping = SleepingEngines(engines, limits.update)
        self._calls: asyncio.Queue[tuple[Callable[[], Awaitable[str]], asyncio.Future[str]]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    # Calls; each returns a message, or raises Refused or ArealError

    async def init(self, call: Init) -> str:
        """Have every worker join the trainer's process group."""
        return await self._do(lambda: self._init(call))

    async def pause(self) -> str:
        """Hold generation on every engine. Requests wait; none is ended."""
        return await self._do(self._pause)

    async def meta(self, call: Meta) -> str:
        """Note what the trainer broadcasts next."""
        return await self._do(lambda: self._meta(call))

    async def xccl(self) -> str:
        """Receive what was announced, on every worker of every engine."""
        return await self._do(self._xccl)

    async def disk(self, call: Disk) -> str:
        """Stage a checkpoint directory on every worker of every engine."""
        return await self._do(lambda: self._disk(call))

    async def load_adapter(self, call: LoadAdapter) -> str:
        """Stage a LoRA adapter from its directory, on every worker of every engine."""
        return await self._do(lambda: self._load_adapter(call))

    async def unload_adapter(self, name: str) -> str:
        """Have every engine serve an adapter no longer."""
        return await self._do(lambda: self._unload_adapter(name))

    async def resume(self) -> str:
        """Commit what was staged on every engine, or on none, and let them generate."""
        return await self._do(self._resume)

    async def sleep(self, level: Literal[1, 2]) -> str:
        """Put every engine to sleep."""
        return await self._do(lambda: self._sleep(level))

    async def wake_up(self, tags: list[SleepTag]) -> str:
        """Wake every engine up."""
        return await self._do(lambda: self._wake_up(tags))

    async def close(self) -> None:
        """End the session: what is open is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._engines.close()

    # The task

    async def _do(self, work: Callable[[], Awaitable[str]]) -> str:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._calls.put_nowait((work, answer))
        # A client that hangs up does not end what was begun: it asks again.
        return await asyncio.shield(answer)

    async def _run(self) -> None:
        """Do one call after the other. An update's block is entered and left by one task."""
        try:
            while True:
                busy = not self._sleeping.asleep and (self._paused or self._open is not None)
                try:
                    work, answer = await asyncio.wait_for(self._calls.get(), self._limits.idle if busy else None)
                except asyncio.TimeoutError:
                    await self._forsaken()
                    continue
                answer.add_done_callback(lambda done: done.cancelled() or done.exception())
                try:
                    answer.set_result(await work())
                except Exception as error:
                    answer.set_exception(error)
        finally:
            await self._give_up("the server ends")
            self._sleeping.drop_kept()

    async def _forsaken(self) -> None:
        """End what a trainer has left open."""
        problem = f"the trainer made no call for {self._limits.idle:.0f} s after it had paused generation"
        logger.warning(
            "areal_vllm_ext: %s: its update is given up, and engines generate with their old weights", problem
        )
        await self._fail(_old_weights(problem))

    # The process group

    async def _init(self, call: Init) -> str:
        if self._open is not None or self._paused:
            await self._fail(
                _old_weights("the trainer began anew")
            )  # it was restarted, and its predecessor left this open
        found = await self._engines.engines()
        workers = sum(len(engine.workers) for engine in found)
        if not workers:
            raise Refused("no engine has registered at the directory: wait until /health answers 200")
        # Two addresses of one deployment are two servers to AReaL: both get ranks among those of the deployment's workers.
        first_rank = call.rank_offset - (call.rank_offset - 1) % workers
        if first_rank + workers > call.world_size:
            raise Refused(
                f"the group {call.group_name} has {call.world_size} ranks, too few for the trainer and the {workers} workers "
                f"of this deployment from rank {first_rank} on: give AReaL a data-parallel rank for each engine (vllm:dN)"
            )
        group = TrainerGroup(
            name=call.group_name,
            backend=call.backend,
            rendezvous=f"{call.master_address}:{call.master_port}",
            world_size=call.world_size,
            first_rank=first_rank,
        )
        self._groups.pop(call.group_name, None)
        if leader := await self._servers.leader():
            return followed(leader)
        try:
            await join(self._engines, group, self._limits.join)
        except ArealError as error:
            raise Refused(f"the group {call.group_name} was not joined: {error}") from None
        self._groups[call.group_name] = group
        return f"{workers} workers of {len(found)} engines have joined {call.group_name}"

    # An update

    async def _pause(self) -> str:
        if self._open is not None:
            await self._give_up("the trainer paused again before it continued")
        self._failure, self._announced, self._servers.expected = "", None, None
        if leader := await self._servers.leader():
            return followed(leader)
        if await self._sleeping.sleeps():
            return "every engine sleeps, and none generates"
        await self._hold()
        if self._groups:
            # An engine that is missing is found here, before the trainer waits in a broadcast for it.
            await self._staging(self._begin_relay)
        return "generation is held on every engine"

    async def _hold(self) -> None:
        await self._engines.pause("keep")
        self._paused = True

    async def _meta(self, call: Meta) -> str:
        self._check_no_failure()
        if leader := await self._servers.leader():
            self._servers.expect(await self._version_of(call))
            return followed(leader)
        if call.group_name not in self._groups:
            raise Refused(
                f"the group {call.group_name} is not joined: call /areal_init_weights_update_group first; "
                "an update that failed ends the groups"
            )
        self._announced = call
        return f"{len(call.names)} tensors are expected"

    async def _xccl(self) -> str:
        self._check_no_failure()
        if leader := await self._servers.leader():
            return followed(leader)
        if (call := self._announced) is None:
            raise Refused(
                "no tensors were announced: call /areal_set_update_weight_meta before /areal_update_weights_xccl"
            )
        self._announced = None
        await self._staging(lambda: self._receive(call))
        return f"{len(call.names)} tensors are staged on every engine"

    async def _receive(self, call: Meta) -> None:
        version = await self._version_of(call) if isinstance(call, AdapterMeta) else None
        opened = self._open
        if opened is None or opened.relay is None or (opened.is_empty and version not in (None, opened.version)):
            opened = await self._begin_relay(version)
        self._received = True
        await opened.receive(call, self._not_needed_with)

    async def _begin_relay(self, version: Version | None = None) -> OpenUpdate:
        """Open an update that takes tensors of every group."""
        await self._give_up("another update begins")
        opened = await self._enter(await self._next_version() if version is None else version)
        opened.relay, self._received = Relay(opened.update), False
        await opened.relay.begin(list(self._groups.values()))
        return opened

    async def _disk(self, call: Disk) -> str:
        version = version_of_path(call.model_path)
        if version is None:
            version = await self._next_version()
        if leader := await self._servers.leader():
            self._servers.expect(version)
            return followed(leader)
        if await self._sleeping.sleeps():
            self._failure = ""
            await self._sleeping.keep(call.model_path, version)
            return f"version {version} is kept until the engines wake up"
        if self._failure:  # AReaL tries three times; the failure has ended its pause
            await self._hold()
            self._failure = ""
        if not self._paused:
            await self._engines.update_weights(call.model_path, version=version, timeout=self._limits.update)
            return f"every engine serves version {version}"

        async def stage() -> None:
            await self._give_up("another update begins")
            opened = await self._enter(version)
            await opened.update.send(call.model_path)
            await opened.update.prepare()

        await self._staging(stage)
        return f"version {version} is staged on every engine"

    async def _load_adapter(self, call: LoadAdapter) -> str:
        version = version_of_adapter(call.lora_name)
        if version is None:
            version = await self._next_version()
        if leader := await self._servers.leader():
            self._servers.expect(version)
            return followed(leader)
        adapters: dict[str, AdapterSource | None] = {call.lora_name: call.lora_path}
        served = {name for state in await self._engines.status() for name in state.adapters}
        adapters |= dict.fromkeys(outdated(call.lora_name, served))
        if self._failure:
            await self._hold()
            self._failure = ""
        if not self._paused:
            await self._engines.update_weights(version=version, adapters=adapters, timeout=self._limits.update)
            return f"every engine serves the adapter {call.lora_name}"

        async def stage() -> None:
            await self._give_up("another update begins")
            opened = await self._enter(version)
            await opened.update.change_adapters(adapters)
            await opened.update.prepare()

        await self._staging(stage)
        return f"the adapter {call.lora_name} is staged on every engine"

    async def _unload_adapter(self, name: str) -> str:
        if leader := await self._servers.leader():
            return followed(leader)
        if self._open is not None:
            raise Refused(f"an update is staged: unload {name} after /areal_continue_generation")
        version = max(await self._next_version() - 1, 0)
        await self._engines.update_weights(version=version, adapters={name: None}, timeout=self._limits.update)
        return f"no engine serves the adapter {name}"

    async def _not_needed_with(self, name: str) -> set[str]:
        """Return the adapters to remove when adapter ``name`` comes by a process group.

        They are its old versions, and what only some engines have because one was restarted: no process can send it again.
        """
        states = await self._engines.status()
        known = {adapter for state in states for adapter in state.adapters}
        partly = {adapter for adapter in known if any(adapter not in state.adapters for state in states)}
        return {*outdated(name, known), *partly} - {name}

    async def _enter(self, version: Version) -> OpenUpdate:
        update = self._engines.update(version, timeout=self._limits.update)
        await update.__aenter__()
        self._open = OpenUpdate(update, version)
        return self._open

    async def _staging(self, work: Callable[[], Awaitable[object]]) -> None:
        """Do a step of an update. If it fails, the update is given up, and engines generate with their old weights."""
        try:
            await work()
        except Exception as error:
            told = isinstance(error, (WeightsTainted, UpdateInDoubt))  # their messages say what engines serve
            await self._fail(one_line(error) if told else _old_weights(one_line(error)))
            raise Refused(self._failure) from error

    async def _resume(self) -> str:
        self._check_no_failure()
        if leader := await self._servers.leader():
            try:
                return await self._servers.followed_to_the_end(leader)
            except Refused as error:
                self._failure = str(error)
                raise
        if await self._sleeping.sleeps():
            return "every engine sleeps; it generates when it is awake"
        if self._open is not None and self._open.is_empty:
            await self._give_up("no tensors came")
        version = self._open.version if self._open is not None else None
        await self._staging(self._commit)
        try:
            await self._engines.resume()
        except ArealError as error:
            if version is None:
                raise
            logger.warning("areal_vllm_ext: version %s is committed, but not every engine resumed: %s", version, error)
        self._paused = False
        return "generation goes on" if version is None else f"every engine serves version {version}"

    async def _commit(self) -> None:
        """Leave the block of the open update, which commits it on every engine or on none."""
        if (opened := self._open) is None:
            return
        if opened.relay is not None:
            await opened.relay.prepare()
        self._open = None
        await opened.update.__aexit__(None, None, None)
        self._received = False
        for name, cause in opened.update.result.lost.items():
            logger.warning("areal_vllm_ext: %s was lost at the commit of version %s: %s", name, opened.version, cause)

    # Failures

    def _check_no_failure(self) -> None:
        if self._failure:
            raise Refused(self._failure)

    async def _give_up(self, reason: str) -> None:
        """Give up the open update, if any: every engine keeps its old weights."""
        opened, self._open = self._open, None
        if self._received:  # workers leave the groups of an update that is given up
            self._groups.clear()
            self._received = False
        if opened is None:
            return
        try:
            await opened.update.__aexit__(Refused, Refused(reason), None)
        except ArealError as error:
            logger.warning("areal_vllm_ext: an update was not given up everywhere yet: %s", error)

    async def _fail(self, reason: str) -> None:
        """Give up the open update and let engines generate with their old weights. Continue answers ``reason``."""
        self._failure = reason
        await self._give_up(reason)
        try:
            await self._engines.resume()
        except ArealError as error:
            logger.warning("areal_vllm_ext: not every engine resumed after an update had failed: %s", error)
        self._paused = False

    # Sleep

    async def _sleep(self, level: Literal[1, 2]) -> str:
        if leader := await self._servers.leader():
            return followed(leader)
        await self._give_up("the engines fall asleep")
        await self._sleeping.sleep(level)
        return "every engine sleeps"

    async def _wake_up(self, tags: list[SleepTag]) -> str:
        if leader := await self._servers.leader():
            return followed(leader)
        await self._sleeping.wake_up(tags)
        return f"every engine has woken up: {', '.join(tags) or 'all of it'}"

    # Versions

    async def _version_of(self, call: Meta) -> int:
        """Return the version that tensors of a process group bring."""
        version = version_of_adapter(call.lora_name) if isinstance(call, AdapterMeta) else None
        return await self._next_version() if version is None else version

    async def _next_version(self) -> int:
        """Return the version after the highest that an engine serves. A trainer's process group tells none."""
        versions = [state.version for state in await self._engines.status()]
        return 1 + max((one for one in versions if isinstance(one, int)), default=0)


def _old_weights(problem: str) -> str:
    return f"{problem}; every engine keeps its old weights: pause and send again"
