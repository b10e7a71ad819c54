"""``launch``: one call, and a handle on what came of it."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .. import security
from ..config import Settings
from ..errors import LaunchError, SettingsError
from .owner import ReplicaOwner, ReplicaState
from .spec import ReplicaSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..client.blocking import EngineGroup
    from .node import NodeState
    from .placement import Placement

_ANSWER_SECONDS = 30.0
_REPORT_SECONDS = 5.0


class Replica:
    """A vLLM deployment that serves. It ends with ``shutdown``, with the block, with this handle, and with this process.

    Attributes:
        name: its engines carry it.
        url: where the OpenAI API is served.
        home: where its engines register (``home.directory``, ``tcp://host:port``), and the key that opens it and them.
    """

    def __init__(self, owner: Any, spec: ReplicaSpec, state: ReplicaState) -> None:
        assert state.home is not None
        self.name, self.url, self.home = spec.name, state.url, state.home
        self._spec, self._owner = spec, owner
        self._group: EngineGroup | None = None

    @property
    def group(self) -> EngineGroup:
        """All engines that register at the directory: this replica's, and those of replicas that joined it."""
        if self._group is None:
            from ..client.blocking import EngineGroup

            self._group = EngineGroup.connect(self.home.directory, key=self.home.key)
        return self._group

    @property
    def nodes(self) -> tuple[NodeState, ...]:
        """Its nodes, the head first."""
        return self.status().nodes

    def status(self) -> ReplicaState:
        """How it is.

        Raises:
            LaunchError: its owner is gone, and everything with it.
        """
        try:
            state: ReplicaState = ray.get(self._owner.state.remote(), timeout=_ANSWER_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise LaunchError(f"the owner of replica {self.name} does not answer: {error}") from None
        return state

    def scale(self, nodes: int, report: Callable[[str], None] | None = None) -> Replica:
        """Start another replica, of ``nodes`` nodes like this one's, whose engines join this one's group: they come to the
        group's version by its next update before they serve. (vLLM's own data-parallel groups do not grow.)
        """
        per_node = self._spec.data_parallel_size / self._spec.nodes
        spec = dataclasses.replace(
            self._spec,
            name="",
            placement=dataclasses.replace(self._spec.placement, bundles=nodes, group=None, indices=()),
            data_parallel_size=round(per_node * nodes),
        )
        return launch(spec, join=self, report=report)

    def shutdown(self) -> None:
        """End it; returns when nothing is left on any node. May be called again."""
        if self._group is not None:
            self._group.close()
            self._group = None
        try:
            ray.get(self._owner.shutdown.remote(), timeout=_ANSWER_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            pass  # what it owns ends with it
        finally:
            ray.kill(self._owner)

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    async def __aenter__(self) -> Replica:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)


def launch(
    model: str | ReplicaSpec,
    placement: Placement | None = None,
    *,
    join: Replica | None = None,
    key_file: str | None = None,
    report: Callable[[str], None] | None = None,
    **settings: Any,
) -> Replica:
    """Place vLLM on the Ray cluster that this process is connected to, and wait until every engine serves.

    Args:
        model: of Hugging Face, or a path on every node; or a whole ``ReplicaSpec`` instead of the settings.
        placement: default: one device on one node.
        join: a replica whose group, directory and key this one shares.
        key_file: the cluster's key, if others need it; default: AREAL_VLLM_KEY_FILE, else one is made up.
        report: told every few seconds what each node is doing; default: a line on standard error.
        settings: further fields of ``ReplicaSpec``.

    Raises:
        SettingsError: what is asked for cannot be.
        LaunchError: it did not come up; the first line says why. Nothing is left of it.
    """
    return asyncio.run(launch_async(model, placement, join=join, key_file=key_file, report=report, **settings))


async def launch_async(
    model: str | ReplicaSpec,
    placement: Placement | None = None,
    *,
    join: Replica | None = None,
    key_file: str | None = None,
    report: Callable[[str], None] | None = None,
    **settings: Any,
) -> Replica:
    """``launch``, for asyncio."""
    if not isinstance(model, ReplicaSpec):
        model = ReplicaSpec.from_dict({"model": model, **({"placement": placement} if placement else {}), **settings})
    spec = dataclasses.replace(model, name=model.name or f"replica-{secrets.token_hex(3)}")
    spec.check()
    if not ray.is_initialized():
        raise SettingsError("this process is not connected to Ray: call ray.init(address=...) first")
    spec.placement.check_cluster()
    file = key_file or Settings.load().key_file
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    owner = ray.remote(ReplicaOwner).options(name=spec.name, num_cpus=0, scheduling_strategy=here).remote()
    try:
        await owner.start.remote(spec, join and join.home, security.read_key(file) if file else None)
        state = await _wait(owner, spec, report or _print)
    except BaseException:
        ray.kill(owner)
        raise
    return Replica(owner, spec, state)


async def _wait(owner: Any, spec: ReplicaSpec, report: Callable[[str], None]) -> ReplicaState:
    started = reported = time.monotonic()
    while True:
        state: ReplicaState = await asyncio.wait_for(owner.state.remote(), _ANSWER_SECONDS)
        if state.phase == "serving":
            return state
        if state.phase == "failed":
            raise LaunchError(f"replica {spec.name}: {state.error}")
        now = time.monotonic()
        if now - reported >= _REPORT_SECONDS:
            reported = now
            report(f"{now - started:4.0f} s  {state.doing}")
        await asyncio.sleep(0.2)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
