"""The actor that owns a replica: it asks for no resources, places the nodes, watches them, and all of them end with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
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
    from collections.abc import Sequence

    from ray.util.placement_group import PlacementGroup

    from ..protocol import EngineInfo
    from .spec import ReplicaSpec

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class Home:
    """Where the engines of one or more replicas register, and the key that opens it."""

    directory: str
    key: security.ClusterKey


@dataclass(frozen=True)
class ReplicaState:
    """How a replica is.

    Attributes:
        phase: ``starting``, ``serving``, ``failed`` or ``ended``. In the last two nothing is left of it.
        doing: what it waits for, while it starts.
        error: why it has failed, or had to be started again.
        devices: of colocated workers, by rank: address of the node and name of the device that were proven to be theirs.
    """

    phase: str
    doing: str
    error: str
    url: str
    home: Home | None
    nodes: tuple[NodeState, ...]
    restarts: int
    devices: tuple[tuple[str, str], ...] = ()


class ReplicaOwner:
    """See the module. Its methods return at once (but ``shutdown``); what takes time runs beside them."""

    def __init__(self) -> None:
        self._phase, self._doing, self._error, self._url, self._restarts = "starting", "", "", "", 0
        self._launchers: dict[int, Any] = {}
        self._states: dict[int, NodeState] = {}
        self._devices: tuple[tuple[str, str], ...] = ()
        self._group: PlacementGroup | None = None
        self._home: Home | None = None
        self._running: asyncio.Task[None] | None = None
        self._gone: set[str] = set()
        self._lifelines = Lifelines(self._gone.add)

    async def start(self, spec: ReplicaSpec, home: Home | None, key: security.ClusterKey | None) -> None:
        """Begin. The directory is here, unless at another replica's ``home``: it must outlive engines that start again, which
        learn from it that they are behind.
        """
        self._spec = spec
        self._home = home or self._serve_directory(key or security.new_key())
        self._lifeline = await self._lifelines.listen(ray.util.get_node_ip_address())
        self._running = asyncio.create_task(self._run())

    async def state(self) -> ReplicaState:
        """How it is."""
        states = tuple(self._states[index] for index in sorted(self._states))
        args = (self._phase, self._doing, self._error, self._url, self._home, states, self._restarts, self._devices)
        return ReplicaState(*args)

    async def shutdown(self) -> None:
        """End everything; returns when nothing is left."""
        if self._running:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._end_all()
        self._phase = "ended"

    def _serve_directory(self, key: security.ClusterKey) -> Home:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        security.Gatekeeper(context, key)
        own = ray.util.get_node_ip_address()
        return Home(DirectoryServer(context, own, 0, key, settle_seconds=SETTLE_SECONDS).address, key)

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await asyncio.wait_for(self._start_all(), self._spec.timeout)
                except asyncio.TimeoutError:
                    raise LaunchError(f"not up after {self._spec.timeout:.0f} s: {self._doing}{self._logs()}") from None
                self._phase, self._doing = "serving", ""
                self._error = await self._lost_node()
                if self._spec.restart == "never" or self._restarts == self._spec.max_restarts:
                    break
                logger.warning("areal_vllm_ext: starting again: %s", self._error)
                self._phase, self._restarts = "starting", self._restarts + 1
                await self._stop_servers()
        except Exception as error:
            self._error = str(error) if isinstance(error, ArealError) else f"{type(error).__name__}: {error}"
        await self._end_all()
        self._phase = "failed"

    async def _start_all(self) -> None:
        spec, place = self._spec, self._spec.placement
        if self._group is None:
            self._group = await asyncio.to_thread(place.create)
        while problem := await asyncio.to_thread(place.problem, self._group):
            self._doing = problem
            await asyncio.sleep(_LOOK_SECONDS)
        bundles = place.choose(self._group)
        self._doing = f"waiting for launchers in bundles {bundles}"
        launcher = ray.remote(NodeLauncher)
        share = 0.0 if place.kind == "colocated" else 1.0
        for index in range(spec.nodes):
            if index not in self._launchers:
                name = f"{spec.name}-head" if index == 0 else f"{spec.name}-headless-{index}"
                options = place.options(self._group, bundles[index], share)
                self._launchers[index] = launcher.options(name=name, **options).remote(name, spec.log_dir)
                self._states[index] = NodeState(name)
        if place.kind == "colocated":
            self._devices = await self._devices_of(self._group, bundles)
        await self._all(lambda one: one.live_with.remote(self._lifeline))
        path = spec.model if spec.model.startswith(("/", "./", "../")) else ""
        facts = await self._all(lambda one: one.reserve.remote(3, path))
        if any(security.is_loopback(one.address) for one in facts) and len({one.address for one in facts}) > 1:
            names = ", ".join(one.address for one in facts)
            raise LaunchError(f"other nodes cannot reach a loopback address ({names}): ray start --node-ip-address=...")
        self._url = f"http://{facts[0].address}:{facts[0].ports[0]}"
        env = self._environment(bundles)
        assert self._home is not None
        starting = [
            one.start_vllm.remote(spec.command_line(index, facts), env, self._home.key)
            for index, one in self._launchers.items()
        ]
        await asyncio.gather(*starting)
        while not self._states[0].healthy:
            if lost := await self._look():
                raise LaunchError(lost)
            self._doing = "; ".join(f"{state.name}: {state.doing}" for state in self._states.values())
            await asyncio.sleep(_LOOK_SECONDS)
        if spec.worker_extension:
            self._doing = "waiting until all engines have registered"
            await self._prove(facts)

    def _environment(self, bundles: Sequence[int]) -> dict[str, str]:
        assert self._home is not None
        assert self._group is not None
        found = {
            "AREAL_VLLM_DIRECTORY": self._home.directory,
            "AREAL_VLLM_REPLICA": self._spec.name,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "AREAL_VLLM_",
        }
        if self._spec.placement.kind == "colocated":
            found["AREAL_VLLM_PLACEMENT_GROUP"] = self._group.id.hex()
            found["VLLM_RAY_PER_WORKER_GPUS"] = str(self._spec.placement.worker_share)
            found["VLLM_RAY_BUNDLE_INDICES"] = ",".join(str(index) for index in bundles)
        return {**self._spec.env, **found}

    async def _prove(self, facts: Sequence[NodeFacts]) -> None:
        """See every engine hooked, on the node of its bundle, and colocated workers on their bundle's device."""
        from ..client.group import (
            AsyncEngineGroup,  # imports torch: launchers, which share this package, have no use for it
        )

        assert self._home is not None
        async with AsyncEngineGroup.connect(self._home.directory, key=self._home.key) as group:
            found: list[EngineInfo] = []
            while len(found) < self._spec.data_parallel_size:
                if lost := await self._look():
                    raise LaunchError(lost)
                with contextlib.suppress(ArealError):
                    found = [engine for engine in await group.engines() if engine.replica == self._spec.name]
                await asyncio.sleep(_LOOK_SECONDS)
        for engine in found:
            meant, is_on = facts[self._spec.node_of(engine.dp_rank)].address, engine.node.rpartition("/")[2]
            if is_on != meant:
                raise LaunchError(f"{engine.name} is on {is_on}, and its bundle on {meant}")
        if self._devices:
            by_rank = sorted(found[0].workers, key=lambda worker: worker.rank)
            are_on = tuple((worker.node.rpartition("/")[2], worker.device_id) for worker in by_rank)
            if are_on != self._devices:
                raise LaunchError(f"vLLM's workers are on {are_on}, and their bundles on {self._devices}")

    async def _devices_of(self, group: PlacementGroup, bundles: Sequence[int]) -> tuple[tuple[str, str], ...]:
        place = self._spec.placement
        look = ray.remote(_device)
        asked = [look.options(**place.options(group, index, place.worker_share)).remote() for index in bundles]
        return tuple(await asyncio.gather(*asked))

    async def _lost_node(self) -> str:
        """Returns when a node is lost: why."""
        while True:
            if lost := await self._look():
                return lost
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(self) -> str:
        """Ask every node how it is; says which one has ended, if any has, with its last words."""

        async def ask(index: int) -> str:
            last, launcher = self._states[index], self._launchers[index]
            try:
                if last.name in self._gone:
                    raise ray.exceptions.RayActorError
                asked = launcher.poll.remote("/health" if index == 0 and self._phase == "starting" else "")
                self._states[index] = state = await asyncio.wait_for(asked, _ANSWER_SECONDS)
            except (ray.exceptions.RayError, asyncio.TimeoutError):
                self._gone.discard(last.name)
                ray.kill(self._launchers.pop(index))
                return f"{last.name} on {last.address} is gone: its actor was killed, or its node is lost\n{last.last_lines}"
            if state.exit_code is None:
                return ""
            return f"{state.name} on {state.address} ended with exit code {state.exit_code}: {state.cause}\n{state.last_lines}"

        # The one that ended first says why; the others only that it is gone.
        return next(filter(None, await asyncio.gather(*(ask(index) for index in list(self._launchers)))), "")

    async def _all(self, call: Any) -> list[Any]:
        try:
            return list(await asyncio.gather(*(call(self._launchers[index]) for index in range(self._spec.nodes))))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, ArealError) else LaunchError(str(error)) from None

    async def _stop_servers(self) -> None:
        """End what runs, everywhere at once. A launcher that cannot be asked is killed, which ends its server as well."""

        async def stop(index: int) -> None:
            try:
                await asyncio.wait_for(self._launchers[index].stop.remote(), _ANSWER_SECONDS)
            except (ray.exceptions.RayError, asyncio.TimeoutError):
                ray.kill(self._launchers.pop(index))

        await asyncio.gather(*(stop(index) for index in list(self._launchers)))

    async def _end_all(self) -> None:
        await self._stop_servers()
        for launcher in self._launchers.values():
            ray.kill(launcher)
        self._launchers.clear()
        if self._group is not None and self._spec.placement.group is None:
            await asyncio.to_thread(remove_placement_group, self._group)
        self._group = None

    def _logs(self) -> str:
        ends = (
            f"--- the end of {state.log} on {state.address} ---\n{state.last_lines}" for state in self._states.values()
        )
        return "\n".join(["", *ends])


def _device() -> tuple[str, str]:
    """Node and device of the bundle in which this runs."""
    import torch

    from ..transport.ipc import device_id

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return ray.util.get_node_ip_address(), device_id(device)
