"""Launch a replica with one call, and hold it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from msgspec.structs import replace
from ray.util.placement_group import get_placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..client.blocking import EngineGroup
from ..config import Settings
from ..errors import LaunchError, SettingsError
from ..protocol import security
from .owner import ReplicaOwner
from .placement import Placement
from .spec import ReplicaSpec
from .state import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable

    from .state import NodeState

_ANSWER_SECONDS = 30.0
_REPORT_SECONDS = 5.0


class Replica:
    """A vLLM deployment that serves, until ``shutdown``, the end of its block, of this handle or of this process.

    Attributes:
        name: under which its engines register.
        directory: where its engines register, with the key.
    """

    def __init__(self, owner: Any, spec: ReplicaSpec, state: ReplicaState) -> None:
        assert state.directory is not None
        self.name, self.directory = spec.name, state.directory
        self._spec, self._owner = spec, owner
        self._group: EngineGroup | None = None
        # Ray also ends an actor without handles, but that has been seen to take half a minute.
        weakref.finalize(self, _end, owner, spec.name)

    @property
    def url(self) -> str:
        """Address of the OpenAI API; it changes when the head restarts on another node."""
        return self.status().url

    @property
    def nodes(self) -> tuple[NodeState, ...]:
        """State of each node, the head first."""
        return self.status().nodes

    @property
    def group(self) -> EngineGroup:
        """All engines of the directory: those of this replica, and of replicas that joined it."""
        self._group = self._group or EngineGroup.connect(self.directory.address, key=self.directory.key)
        return self._group

    def status(self) -> ReplicaState:
        """Return the state of the replica.

        Raises:
            LaunchError: the owner is gone, and everything with it.
        """
        try:
            return ray.get(self._owner.state.remote(), timeout=_ANSWER_SECONDS)  # type: ignore[no-any-return]
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            cause = " ".join(str(error).split())
            raise LaunchError(f"replica {self.name}: its owner does not answer: {cause}; launch it again") from None

    def scale(self, nodes: int, report: Callable[[str], None] | None = None) -> Replica:
        """Launch another replica with this many nodes in the same group, and return it.

        It is a replica of its own because vLLM's data-parallel groups do not grow. Its engines serve from the next update on,
        which brings them to the group's version.

        Args:
            nodes: number of nodes; each holds as many engines as a node of this replica.
            report: is called with lines about the progress; default: prints to stderr.
        """
        place = replace(self._spec.placement, bundles=nodes, group=None, indices=())
        size = self._spec.data_parallel_size * nodes // self._spec.nodes
        return launch(replace(self._spec, name="", placement=place, data_parallel_size=size), join=self, report=report)

    def shutdown(self) -> None:
        """End the replica; returns once nothing is left on any node. Idempotent."""
        if self._group:
            self._group.close()
        try:
            ray.get(self._owner.shutdown.remote(), timeout=_ANSWER_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            pass  # everything that the owner holds ends with it
        _end(self._owner, self.name)

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    async def __aenter__(self) -> Replica:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.shutdown)


def launch(model: str | ReplicaSpec, placement: Placement | None = None, **options: Any) -> Replica:
    """Start vLLM on the Ray cluster to which this process is connected, and wait until every engine serves.

    Args:
        model: the model, or a whole ``ReplicaSpec``.
        placement: default: one device on one node.
        options: fields of ``ReplicaSpec``, and the arguments of ``launch_async``.

    Raises:
        SettingsError: the settings contradict each other, or this process is not connected to Ray.
        LaunchError: the replica did not come up; the first line says why, and nothing of it is left.
    """
    return asyncio.run(launch_async(model, placement, **options))


async def launch_async(
    model: str | ReplicaSpec,
    placement: Placement | None = None,
    *,
    join: Replica | None = None,
    key_file: str | None = None,
    report: Callable[[str], None] | None = None,
    **settings: Any,
) -> Replica:
    """Do what ``launch`` does, in an event loop.

    Args:
        model: the model, or a whole ``ReplicaSpec``.
        placement: default: one device on one node.
        join: a replica whose group the new engines join.
        key_file: the cluster's key, if other programs need it; default: AREAL_VLLM_KEY_FILE, else a new key.
        report: is called with lines about the progress; default: prints to stderr.
        settings: fields of ``ReplicaSpec``.
    """
    if isinstance(model, str):
        model = ReplicaSpec(model=model, placement=placement or Placement(), **settings)
    spec = replace(model, name=model.name or f"replica-{secrets.token_hex(3)}")
    spec.check()
    if not ray.is_initialized():
        raise SettingsError("launch: this process is not connected to Ray; call ray.init(address=...) first")
    file = key_file or Settings.load().key_file
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    owner = ray.remote(ReplicaOwner).options(name=spec.name, num_cpus=0, scheduling_strategy=here).remote()
    report = report or partial(print, file=sys.stderr, flush=True)
    try:
        await owner.start.remote(spec, join and join.directory, security.read_key(file) if file else None)
        started = reported = time.monotonic()
        while (state := await asyncio.wait_for(owner.state.remote(), _ANSWER_SECONDS)).phase != "serving":
            if state.phase == "failed":
                raise LaunchError(f"replica {spec.name}: {state.error}")  # noqa: TRY301 - the clean-up below is for every error
            if (now := time.monotonic()) - reported >= _REPORT_SECONDS:
                reported = now
                report(f"{now - started:4.0f} s  {state.stage}")
            await asyncio.sleep(0.2)
        return Replica(owner, spec, state)
    except BaseException:
        _end(owner, spec.name)
        raise


def _end(owner: Any, name: str) -> None:
    """End the owner and everything it holds, and its placement group, which would live as long as this driver."""
    if ray.is_initialized():
        ray.kill(owner)
        with contextlib.suppress(ValueError):  # the group is gone already, or is not the owner's
            remove_placement_group(get_placement_group(name))
