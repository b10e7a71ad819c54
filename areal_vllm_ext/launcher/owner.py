"""The actor that owns a replica: it asks for no resources, places the nodes, watches them, and all of them end with it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray
import zmq
from ray.util.placement_group import remove_placement_group

from ..control.directory import SETTLE_SECONDS, DirectoryServer
from ..errors import ArealError, LaunchError
from ..process.lifeline import Lifelines
from ..protocol import security
from .node import NodeFacts, NodeLauncher, NodeState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ray.util.placement_group import PlacementGroup

    from .spec import ReplicaSpec

_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Home:
    """Where the engines of one or more replicas register, and the key that opens it and them."""

    directory: str
    key: security.ClusterKey


@dataclass(frozen=True)
class ReplicaState:
    """``error`` is the last one. ``devices``, of colocated workers by rank: the node and the device proven to be theirs."""

    phase: str = "starting"  # serving, failed, ended: in the last two nothing is left of it
    doing: str = ""
    error: str = ""
    url: str = ""
    home: Home | None = None
    nodes: tuple[NodeState, ...] = ()
    restarts: int = 0
    devices: tuple[tuple[str, str], ...] = ()


class ReplicaOwner:
    """Its methods return at once (but ``shutdown``); what takes time runs beside them."""

    def __init__(self) -> None:
        self._state = ReplicaState()
        self._nodes: dict[int, NodeState] = {}
        self._launchers: dict[int, Any] = {}
        self._group: PlacementGroup | None = None
        self._running: asyncio.Task[None] | None = None
        self._gone, self._seen = set[str](), set[str]()
        self._lifelines = Lifelines(self._gone.add)

    async def start(self, spec: ReplicaSpec, home: Home | None, key: security.ClusterKey | None) -> None:
        """Begin. The directory is here, or at another replica's ``home``: engines that start again must find it as it was."""
        self._spec, own = spec, ray.util.get_node_ip_address()
        self._lifeline = await self._lifelines.listen(own)
        if home is None:
            key, context = key or security.new_key(), zmq.Context()
            security.ZapAuthenticator(context, key)
            server = DirectoryServer(context, own, 0, key, settle_seconds=SETTLE_SECONDS)
            home = Home(server.address, key)
        self._home = home
        self._running = asyncio.create_task(self._run())

    async def state(self) -> ReplicaState:
        return replace(self._state, home=self._home, nodes=tuple(self._nodes[index] for index in sorted(self._nodes)))

    async def shutdown(self) -> None:
        """End everything; returns when nothing is left."""
        if self._running:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._end_all()
        self._now(phase="ended")

    def _now(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._start_all(), self._spec.timeout)
                self._now(phase="serving", doing="")
                while True:
                    await self._look()
                    await asyncio.sleep(_LOOK_SECONDS)
            except asyncio.TimeoutError:
                ends = (f"--- {node.log} on {node.address}:\n{node.last_lines}" for node in self._nodes.values())
                self._now(error="\n".join([f"not up after {self._spec.timeout:.0f} s: {self._state.doing}", *ends]))
            except Exception as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                self._now(error=str(cause) if isinstance(cause, ArealError) else f"{type(cause).__name__}: {cause}")
            never = self._spec.restart == "never" or self._state.restarts == self._spec.max_restarts
            if never or self._state.phase != "serving":
                break
            self._now(phase="starting", restarts=self._state.restarts + 1)
            await self._stop_servers()
        await self._end_all()
        self._now(phase="failed")

    async def _start_all(self) -> None:
        spec, place = self._spec, self._spec.placement
        self._now(doing="waiting for its placement group")
        again = place.within(self._group) if self._group else place
        self._group = await asyncio.to_thread(again.reserve, spec.timeout - 1, spec.name)
        bundles = place.choose(self._group)
        self._now(doing=f"waiting for actors in bundles {bundles}")
        if place.kind == "colocated" and not self._state.devices:  # before vLLM, which asks for the same share, has it
            probe = ray.remote(_device)
            asked = [probe.options(**place.options(self._group, one, place.worker_share)).remote() for one in bundles]
            self._now(devices=tuple(await asyncio.gather(*asked)))
        for index in set(range(spec.nodes)) - set(self._launchers):
            name = f"{spec.name}-{f'headless-{index}' if index else 'head'}"
            options = place.options(self._group, bundles[index], share=0.0 if place.kind == "colocated" else 1.0)
            options["name"] = f"{name}.{self._state.restarts}"
            self._launchers[index] = ray.remote(NodeLauncher).options(**options).remote(name, spec.log_dir)
            self._nodes[index] = NodeState(name)
        await self._all(lambda _, one: one.live_with.remote(self._lifeline))
        path = spec.model if spec.model.startswith(("/", "./", "../")) else ""
        facts = await self._all(lambda _, one: one.reserve.remote(3, path))
        addresses = {one.address for one in facts}
        if len(addresses) > 1 and any(map(security.is_loopback, addresses)):
            raise LaunchError(f"nodes {addresses} cannot reach each other: ray start --node-ip-address=ADDRESS on each")
        self._now(url=f"http://{facts[0].address}:{facts[0].ports[0]}")
        env = self._environment(bundles)
        await self._all(lambda i, one: one.start_vllm.remote(spec.command_line(i, facts), env, self._home.key))
        # Engines that start again are stale: vLLM's front end, and its health, wait with them for the next update.
        while not (self._nodes[0].healthy or (spec.worker_extension and self._state.restarts)):
            await self._look()
            self._now(doing="; ".join(f"{node.name}: {node.doing}" for node in self._nodes.values()))
            await asyncio.sleep(_LOOK_SECONDS)
        if spec.worker_extension:
            self._now(doing="waiting until all engines have registered")
            await self._prove(facts)

    def _environment(self, bundles: Sequence[int]) -> dict[str, str]:
        own = {
            "AREAL_VLLM_DIRECTORY": self._home.directory,
            "AREAL_VLLM_REPLICA": self._spec.name,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "AREAL_VLLM_",
        }
        if self._spec.placement.kind == "colocated":
            assert self._group is not None
            own["AREAL_VLLM_PLACEMENT_GROUP"] = self._group.id.hex()
            own["VLLM_RAY_PER_WORKER_GPUS"] = str(self._spec.placement.worker_share)
            own["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundles))
        return {**self._spec.env, **own}

    async def _prove(self, facts: Sequence[NodeFacts]) -> None:
        """See every engine hooked, on the node of its bundle, and colocated workers on their bundle's device."""
        # It imports torch, for which this loop has no time, and launchers, which share this package, no use.
        client = await asyncio.to_thread(import_module, "areal_vllm_ext.client.group")
        found: list[Any] = []
        async with client.AsyncEngineGroup.connect(self._home.directory, key=self._home.key) as group:
            while len(found) < self._spec.data_parallel_size:
                await self._look()
                with contextlib.suppress(ArealError):
                    own = [engine for engine in await group.engines() if engine.replica == self._spec.name]
                    found = [engine for engine in own if engine.incarnation not in self._seen]
                await asyncio.sleep(_LOOK_SECONDS)
        for engine in found:
            meant = facts[engine.dp_rank * self._spec.nodes // self._spec.data_parallel_size].address
            if engine.node.rpartition("/")[2] != meant:
                raise LaunchError(f"{engine.name} is not on the node of its bundle, {meant}")
        self._seen |= {engine.incarnation for engine in found}
        workers = sorted(found[0].workers, key=lambda worker: worker.rank)
        are_on = tuple((worker.node.rpartition("/")[2], worker.device_id) for worker in workers)
        if self._state.devices not in ((), are_on):
            raise LaunchError(f"vLLM's workers are on {are_on}, and their bundles on {self._state.devices}")

    async def _look(self) -> None:
        """Ask every node how it is.

        Raises:
            LaunchError: one has ended, with its last words.
        """

        async def ask(index: int) -> str:
            node = self._nodes[index]
            try:
                if node.name in self._gone:
                    raise ray.exceptions.RayActorError
                health = "/health" if index == 0 and self._state.phase == "starting" else ""
                asked = self._launchers[index].poll.remote(health)
                self._nodes[index] = node = await asyncio.wait_for(asked, _ANSWER_SECONDS)
            except (ray.exceptions.RayError, asyncio.TimeoutError):
                self._gone.discard(node.name)
                ray.kill(self._launchers.pop(index))
                return f"{node.name} on {node.address} is gone: actor killed, or node lost\n{node.last_lines}"
            said = f"{node.name} on {node.address} {node.doing}: {node.cause}\n{node.last_lines}"
            return said if node.exit_code is not None else ""

        if ended := list(filter(None, await asyncio.gather(*map(ask, list(self._launchers))))):
            raise LaunchError(ended[0])

    async def _all(self, call: Callable[[int, Any], Awaitable[Any]]) -> list[Any]:
        return list(await asyncio.gather(*(call(index, self._launchers[index]) for index in range(self._spec.nodes))))

    async def _stop_servers(self) -> None:
        """End what runs, everywhere at once. A launcher that cannot be asked is killed, which ends its server as well."""
        asked = {index: one.stop.remote() for index, one in self._launchers.items()}
        waits = (asyncio.wait_for(ref, _ANSWER_SECONDS) for ref in asked.values())
        for index, outcome in zip(asked, await asyncio.gather(*waits, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                ray.kill(self._launchers.pop(index))

    async def _end_all(self) -> None:
        await self._stop_servers()
        for launcher in self._launchers.values():
            ray.kill(launcher)
        self._launchers.clear()
        if self._group and self._spec.placement.group is None:
            await asyncio.to_thread(remove_placement_group, self._group)
        self._group = None


def _device() -> tuple[str, str]:
    """Node and device of the bundle in which this runs."""
    from ..transport.device import own_device_id

    return ray.util.get_node_ip_address(), own_device_id()
