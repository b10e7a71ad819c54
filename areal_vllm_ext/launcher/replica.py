"""``launch``: one call, and a handle on what came of it."""

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
from .owner import ReplicaOwner, ReplicaState
from .placement import Placement
from .spec import ReplicaSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from .node import NodeState

_ANSWER_SECONDS = 30.0
_REPORT_SECONDS = 5.0


class Replica:
    """A vLLM deployment that serves; it ends with ``shutdown``, its block, this handle, and this process.

    ``home`` says where its engines register, under ``name``, and has the key that opens it and them.
    """

    def __init__(self, owner: Any, spec: ReplicaSpec, state: ReplicaState) -> None:
        assert state.home is not None
        self.name, self.home = spec.name, state.home
        self._spec, self._owner = spec, owner
        self._group: EngineGroup | None = None
        weakref.finalize(self, _end, owner, spec.name)  # left to Ray, this has been seen to take half a minute

    @property
    def url(self) -> str:
        """Where the OpenAI API is served. It moves when the head starts again on another node."""
        return self.status().url

    @property
    def nodes(self) -> tuple[NodeState, ...]:
        """The head first."""
        return self.status().nodes

    @property
    def group(self) -> EngineGroup:
        """All engines of this home: this replica's, and those of replicas that joined it."""
        self._group = self._group or EngineGroup.connect(self.home.directory, key=self.home.key)
        return self._group

    def status(self) -> ReplicaState:
        """How it is.

        Raises:
            LaunchError: its owner is gone, and everything with it.
        """
        try:
            return ray.get(self._owner.state.remote(), timeout=_ANSWER_SECONDS)  # type: ignore[no-any-return]
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise LaunchError(f"the owner of replica {self.name} does not answer: {error}") from None

    def scale(self, nodes: int, report: Callable[[str], None] | None = None) -> Replica:
        """Add nodes, as a replica of their own (vLLM's groups do not grow) in the same group. Its engines come to the group's
        version by the next update, before they serve.
        """
        place = replace(self._spec.placement, bundles=nodes, group=None, indices=())
        size = self._spec.data_parallel_size * nodes // self._spec.nodes
        return launch(replace(self._spec, name="", placement=place, data_parallel_size=size), join=self, report=report)

    def shutdown(self) -> None:
        """End it; returns when nothing is left on any node. May be called again."""
        if self._group:
            self._group.close()
        try:
            ray.get(self._owner.shutdown.remote(), timeout=_ANSWER_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            pass  # what it owns ends with it
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
    """Place vLLM on the Ray cluster to which this process is connected, and wait until every engine serves.

    ``model`` may also be a whole ``ReplicaSpec``; ``options`` are fields of that, and those of ``launch_async``.

    ``SettingsError``: it cannot be. ``LaunchError``: it did not come up; the first line says why, and nothing is left of it.
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
    """``launch``, for asyncio. ``join``: a replica whose group its engines come into. ``key_file``: the cluster's key, if
    others need it; default: AREAL_VLLM_KEY_FILE, else made up. ``report`` is told what each node is doing; default: stderr.
    """
    if isinstance(model, str):
        model = ReplicaSpec(model=model, placement=placement or Placement(), **settings)
    spec = replace(model, name=model.name or f"replica-{secrets.token_hex(3)}")
    spec.check()
    if not ray.is_initialized():
        raise SettingsError("this process is not connected to Ray: call ray.init(address=...) first")
    file = key_file or Settings.load().key_file
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    owner = ray.remote(ReplicaOwner).options(name=spec.name, num_cpus=0, scheduling_strategy=here).remote()
    report = report or partial(print, file=sys.stderr, flush=True)
    try:
        await owner.start.remote(spec, join and join.home, security.read_key(file) if file else None)
        started = reported = time.monotonic()
        while (state := await asyncio.wait_for(owner.state.remote(), _ANSWER_SECONDS)).phase != "serving":
            if state.phase == "failed":
                raise LaunchError(f"replica {spec.name}: {state.error}")  # noqa: TRY301 - the clean-up is for all
            if (now := time.monotonic()) - reported >= _REPORT_SECONDS:
                reported = now
                report(f"{now - started:4.0f} s  {state.doing}")
            await asyncio.sleep(0.2)
        return Replica(owner, spec, state)
    except BaseException:
        _end(owner, spec.name)
        raise


def _end(owner: Any, name: str) -> None:
    """End the owner, all that it owns, and what outlives it until this driver ends: its placement group."""
    if ray.is_initialized():
        ray.kill(owner)
        with contextlib.suppress(ValueError):  # it is removed, or was not the owner's
            remove_placement_group(get_placement_group(name))
