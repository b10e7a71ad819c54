"""The actor that owns a replica: it asks for no resources, places the nodes, watches them, and all of them end with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import zmq
from ray.util.placement_group import remove_placement_group

from .. import security
from ..directory import SETTLE_SECONDS, DirectoryServer
from ..errors import ArealError, LaunchError
from ..lifeline import Lifelines
from .node import NodeFacts, NodeLauncher, NodeState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ray.util.placement_group import PlacementGroup

    from ..protocol import EngineInfo
    from .spec import ReplicaSpec

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Home:
    """Where the engines of one or more replicas register, and the key that opens it and them."""

    directory: str
    key: security.ClusterKey


@dataclass(frozen=True)
class ReplicaState:
    """How a replica is.

    Attributes:
        phase: ``starting``, ``serving``, ``failed`` or ``ended``. In the last two nothing is left of it.
        doing: what it waits for, while it starts.
        error: why it has failed, or was started again the last time.
        devices: of colocated workers, by rank: the node and the device that were proven to be theirs.
    """

    phase: str = "starting"
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
        self._gone: set[str] = set()
        self._lifelines = Lifelines(self._gone.add)

    async def start(self, spec: ReplicaSpec, home: Home | None, key: security.ClusterKey | None) -> None:
        """Begin. The directory is here, or at another replica's ``home``: it must outlive engines that start again, which
        learn from it that they are behind.
        """
        self._spec, own = spec, ray.util.get_node_ip_address()
        self._lifeline = await self._lifelines.listen(own)
        if home is None:
            key, context = key or security.new_key(), zmq.Context()
            security.Gatekeeper(context, key)
            server = DirectoryServer(context, own, 0, key, settle_seconds=SETTLE_SECONDS)
            home = Home(server.address, key)
        self._home = home
        self._running = asyncio.create_task(self._run())

    async def state(self) -> ReplicaState:
        """How it is."""
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
        try:
            while True:
                await asyncio.wait_for(self._start_all(), self._spec.timeout)
                self._now(phase="serving", doing="")
                while not (lost := await self._look()):  # noqa: ASYNC110 - nobody would set an event
                    await asyncio.sleep(_LOOK_SECONDS)
                self._now(error=lost)
                if self._spec.restart == "never" or self._state.restarts == self._spec.max_restarts:
                    break
                logger.warning("areal_vllm_ext: starting again: %s", lost)
                self._now(phase="starting", restarts=self._state.restarts + 1)
                await self._stop_servers()
        except asyncio.TimeoutError:
            ends = [
                f"--- the end of {node.log} on {node.address} ---\n{node.last_lines}" for node in self._nodes.values()
            ]
            self._now(error="\n".join([f"not up after {self._spec.timeout:.0f} s: {self._state.doing}", *ends]))
        except Exception as error:
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
            self._now(error=str(cause) if isinstance(cause, ArealError) else f"{type(cause).__name__}: {cause}")
        await self._end_all()
        self._now(phase="failed")

    async def _start_all(self) -> None:
        spec, place = self._spec, self._spec.placement
        self._group = self._group or await asyncio.to_thread(place.create)
        while problem := await asyncio.to_thread(place.problem, self._group):
            self._now(doing=problem)
            await asyncio.sleep(_LOOK_SECONDS)
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
        while not self._nodes[0].healthy:
            await self._raise_if_lost()
            self._now(doing="; ".join(f"{node.name}: {node.doing}" for node in self._nodes.values()))
            await asyncio.sleep(_LOOK_SECONDS)
        if spec.worker_extension:
            self._now(doing="waiting until all engines have registered")
            await self._prove(facts)

    def _environment(self, bundles: Sequence[int]) -> dict[str, str]:
        own = {
            "AREAL_VLLM_DIRECTORY": self._home.directory,
            "AREAL_VLLM_REPLICA": self._spec.name,
            # For vLLM's Ray executor and actors, should they be asked for.
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
        client = await asyncio.to_thread(
            _client
        )  # imports torch: launchers, which share this package, have no use for it
        found: list[EngineInfo] = []
        async with client.AsyncEngineGroup.connect(self._home.directory, key=self._home.key) as group:
            while len(found) < self._spec.data_parallel_size:
                await self._raise_if_lost()
                with contextlib.suppress(ArealError):
                    found = [engine for engine in await group.engines() if engine.replica == self._spec.name]
                await asyncio.sleep(_LOOK_SECONDS)
        for engine in found:
            meant = facts[self._spec.node_of(engine.dp_rank)].address
            if engine.node.rpartition("/")[2] != meant:
                raise LaunchError(f"{engine.name} is not on the node of its bundle, {meant}")
        workers = sorted(found[0].workers, key=lambda worker: worker.rank)
        are_on = tuple((worker.node.rpartition("/")[2], worker.device_id) for worker in workers)
        if self._state.devices not in ((), are_on):
            raise LaunchError(f"vLLM's workers are on {are_on}, and their bundles on {self._state.devices}")

    async def _raise_if_lost(self) -> None:
        if lost := await self._look():
            raise LaunchError(lost)

    async def _look(self) -> str:
        """Ask every node how it is; says which has ended, if any has, and its last words."""

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
                return (
                    f"{node.name} on {node.address} is gone: its actor was killed, or its node lost\n{node.last_lines}"
                )
            said = f"{node.name} on {node.address} {node.doing}: {node.cause}\n{node.last_lines}"
            return said if node.exit_code is not None else ""

        return next(filter(None, await asyncio.gather(*map(ask, list(self._launchers)))), "")

    async def _all(self, call: Callable[[int, Any], Awaitable[Any]]) -> list[Any]:
        return list(await asyncio.gather(*(call(index, self._launchers[index]) for index in range(self._spec.nodes))))

    async def _stop_servers(self) -> None:
        """End what runs, everywhere at once. A launcher that cannot be asked is killed, which ends its server as well."""

        async def stop(index: int) -> None:
            try:
                await asyncio.wait_for(self._launchers[index].stop.remote(), _ANSWER_SECONDS)
            except (ray.exceptions.RayError, asyncio.TimeoutError):
                ray.kill(self._launchers.pop(index))

        await asyncio.gather(*map(stop, list(self._launchers)))

    async def _end_all(self) -> None:
        await self._stop_servers()
        for launcher in self._launchers.values():
            ray.kill(launcher)
        self._launchers.clear()
        if self._group and self._spec.placement.group is None:
            await asyncio.to_thread(remove_placement_group, self._group)
        self._group = None


def _client() -> Any:
    from ..client import group

    return group


def _device() -> tuple[str, str]:
    """Node and device of the bundle in which this runs."""
    import torch

    from ..transport.ipc import device_id

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return ray.util.get_node_ip_address(), device_id(device)
