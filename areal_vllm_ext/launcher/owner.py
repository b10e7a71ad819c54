"""The actor that owns a replica: it places the nodes and watches them, and all of them end with it.

It asks Ray for no resources, and it also serves the directory, so that the directory outlives engines that restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import zmq
from ray.util.placement_group import remove_placement_group

from ..client.group import AsyncEngineGroup
from ..control.command import Commander
from ..control.directory_server import DirectoryServer
from ..control.link import Link
from ..errors import ArealError, LaunchError
from ..process.lifeline import Lifelines
from ..protocol import security, timing
from .node import NodeLauncher
from .state import DirectoryEndpoint, NodeAddress, NodeState, ReplicaState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ray.util.placement_group import PlacementGroup

    from .spec import ReplicaSpec

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 30.0
# Engines that were killed are lost to the directory after 5 s.
_FORGET_SECONDS = timing.LOST_AFTER_SECONDS + 3.0
_DIRECTORY_SECONDS = 2.0
_MAX_MESSAGE_BYTES = 1 << 20


class ReplicaOwner:
    """Methods return at once, except ``shutdown``: starting and watching run in a background task."""

    def __init__(self) -> None:
        self._state = ReplicaState()
        self._nodes: dict[int, NodeState] = {}
        self._launchers: dict[int, Any] = {}
        self._group: PlacementGroup | None = None
        self._running: asyncio.Task[None] | None = None
        self._joined = False
        self._gone, self._seen = set[str](), set[str]()
        self._lifelines = Lifelines(self._gone.add)

    async def start(
        self, spec: ReplicaSpec, directory: DirectoryEndpoint | None, key: security.ClusterKey | None
    ) -> None:
        """Start the replica; serve the directory here, unless the replica joins another one's ``directory``."""
        self._spec, own = spec, ray.util.get_node_ip_address()
        self._lifeline = await self._lifelines.listen(own)
        self._joined = directory is not None
        if directory is None:
            key, context = key or security.new_key(), zmq.Context()
            security.ZapAuthenticator(context, key)
            server = DirectoryServer(context, own, 0, key, settle_seconds=timing.SETTLE_SECONDS)
            directory = DirectoryEndpoint(server.address, key)
        self._directory = directory
        self._running = asyncio.create_task(self._run())

    async def state(self) -> ReplicaState:
        """Return the state, with the last answer of every node."""
        nodes = tuple(self._nodes[index] for index in sorted(self._nodes))
        return replace(self._state, directory=self._directory, nodes=nodes)

    async def shutdown(self) -> None:
        """End everything; returns once nothing is left."""
        if self._running:
            self._running.cancel()
            await asyncio.wait([self._running])
        await self._end_all()
        if self._joined:
            with contextlib.suppress(ArealError):  # the directory ended before this replica
                await forget_closed(self._directory, self._spec.name)
        self._change(phase="ended")

    def _change(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)

    async def _run(self) -> None:
        while True:
            try:
                await asyncio.wait_for(self._start_all(), self._spec.timeout)
                self._change(phase="serving", stage="")
                while True:
                    await self._poll_nodes()
                    await asyncio.sleep(_POLL_SECONDS)
            except asyncio.TimeoutError:
                ends = (f"--- {node.log} on {node.address}:\n{node.last_lines}" for node in self._nodes.values())
                self._change(
                    error="\n".join(
                        [
                            f"not up after {self._spec.timeout:.0f} s: {self._state.stage}; raise timeout=, or see the logs",
                            *ends,
                        ]
                    )
                )
            except Exception as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                self._change(error=str(cause) if isinstance(cause, ArealError) else f"{type(cause).__name__}: {cause}")
            never = self._spec.restart == "never" or self._state.restarts == self._spec.max_restarts
            if never or self._state.phase != "serving":
                break
            self._change(phase="starting", restarts=self._state.restarts + 1)
            await self._stop_servers()
        await self._end_all()
        self._change(phase="failed")

    async def _start_all(self) -> None:
        spec, place = self._spec, self._spec.placement
        self._change(stage="waiting for its placement group")
        again = place.within(self._group) if self._group else place
        self._group = await asyncio.to_thread(again.reserve, spec.timeout - 1, spec.name)
        bundles = place.choose(self._group)
        self._change(stage=f"waiting for actors in bundles {bundles}")
        # Probe the devices before vLLM starts, because its workers take the share that the probe asks for.
        if place.kind == "colocated" and not self._state.devices:
            probe = ray.remote(_device)
            asked = [probe.options(**place.options(self._group, one, place.worker_share)).remote() for one in bundles]
            self._change(devices=tuple(await asyncio.gather(*asked)))
        for index in set(range(spec.nodes)) - set(self._launchers):
            name = f"{spec.name}-{f'headless-{index}' if index else 'head'}"
            options = place.options(self._group, bundles[index], share=0.0 if place.kind == "colocated" else 1.0)
            options["name"] = f"{name}.{self._state.restarts}"
            self._launchers[index] = ray.remote(NodeLauncher).options(**options).remote(name, spec.log_dir)
            self._nodes[index] = NodeState(name)
        await self._on_every_node(lambda _, one: one.tie_to_owner.remote(self._lifeline))
        path = spec.model if spec.model.startswith(("/", "./", "../")) else ""
        addresses = await self._on_every_node(lambda _, one: one.reserve.remote(3, path))
        hosts = {one.host for one in addresses}
        if len(hosts) > 1 and any(map(security.is_loopback, hosts)):
            raise LaunchError(
                f"nodes {', '.join(sorted(hosts))}: a loopback address cannot be reached from another node; start Ray on each "
                "node with --node-ip-address=ADDRESS"
            )
        self._change(url=f"http://{addresses[0].host}:{addresses[0].ports[0]}")
        env = self._environment(bundles)
        await self._on_every_node(
            lambda i, one: one.start_vllm.remote(spec.command_line(i, addresses), env, self._directory.key)
        )
        # Engines that restart are stale and stay paused until the next update, so vLLM's /health does not answer until then.
        while not (self._nodes[0].healthy or (spec.worker_extension and self._state.restarts)):
            await self._poll_nodes()
            self._change(stage="; ".join(f"{node.name}: {node.stage}" for node in self._nodes.values()))
            await asyncio.sleep(_POLL_SECONDS)
        if spec.worker_extension:
            self._change(stage="waiting until all engines have registered")
            await self._verify_placement(addresses)

    def _environment(self, bundles: Sequence[int]) -> dict[str, str]:
        own = {
            "AREAL_VLLM_DIRECTORY": self._directory.address,
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

    async def _verify_placement(self, addresses: Sequence[NodeAddress]) -> None:
        """Wait until every engine has registered, and check where the engines and the colocated workers are.

        Raises:
            LaunchError: an engine is on another node than its bundle, or a worker on another device.
        """
        found: list[Any] = []
        async with AsyncEngineGroup.connect(self._directory.address, key=self._directory.key) as group:
            while len(found) < self._spec.data_parallel_size:
                await self._poll_nodes()
                with contextlib.suppress(ArealError):
                    own = [engine for engine in await group.engines() if engine.replica == self._spec.name]
                    found = [engine for engine in own if engine.incarnation not in self._seen]
                await asyncio.sleep(_POLL_SECONDS)
        for engine in found:
            meant = addresses[engine.dp_rank * self._spec.nodes // self._spec.data_parallel_size].host
            if engine.node.rpartition("/")[2] != meant:
                raise LaunchError(
                    f"{engine.name} is on {engine.node}, but its bundle is on {meant}; report this as a bug"
                )
        self._seen |= {engine.incarnation for engine in found}
        workers = sorted(found[0].workers, key=lambda worker: worker.rank)
        are_on = tuple((worker.node.rpartition("/")[2], worker.device_id) for worker in workers)
        if self._state.devices not in ((), are_on):
            raise LaunchError(
                f"vLLM's workers are on {are_on}, but their bundles are on {self._state.devices}; list the bundles of each "
                "node in ascending order of devices, with placement.within(group, indices)"
            )

    async def _poll_nodes(self) -> None:
        """Ask every node for its state.

        Raises:
            LaunchError: a server has ended, with the end of its log, or a node is gone.
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
                return f"{node.name} on {node.address} is gone: the actor was killed, or the node was lost\n{node.last_lines}"
            if node.exit_code is None:
                return ""
            return f"{node.name} on {node.address} {node.stage}: {node.cause}\n{node.last_lines}"

        if ended := list(filter(None, await asyncio.gather(*map(ask, list(self._launchers))))):
            raise LaunchError(ended[0])

    async def _on_every_node(self, call: Callable[[int, Any], Awaitable[Any]]) -> list[Any]:
        return list(await asyncio.gather(*(call(index, self._launchers[index]) for index in range(self._spec.nodes))))

    async def _stop_servers(self) -> None:
        """End the servers of all nodes at the same time; kill a launcher that does not answer, which ends its server too."""
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


async def forget_closed(directory: DirectoryEndpoint, replica: str, seconds: float = _FORGET_SECONDS) -> None:
    """Let the directory's other replicas go on without ``replica``, whose engines have ended on purpose.

    Engines that were killed are alive to the directory until they are lost, and cannot be forgotten before.

    Raises:
        EngineUnreachable: the directory does not answer.
    """
    link = Link(lambda _: directory.key, _MAX_MESSAGE_BYTES)
    commander, ends = Commander(link, directory.address), time.monotonic() + seconds
    try:
        while time.monotonic() < ends:
            found = await commander.discover(_DIRECTORY_SECONDS)
            if not any(engine.replica == replica for engine in (*found.alive, *found.joining)):
                if any(engine.replica == replica for engine, _ in found.lost):
                    await commander.forget(replica, None, _DIRECTORY_SECONDS)
                return
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        link.close()


def _device() -> tuple[str, str]:
    """Return node and device of the bundle in which this task runs."""
    from ..transport.device import own_device_id

    return ray.util.get_node_ip_address(), own_device_id()
