"""Where trainers and vLLM go: strategies in terms of Ray's placement groups."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import LaunchError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

Kind = Literal["shared", "separate", "deferred", "colocated"]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True)
class Placement:
    """Bundles of a placement group, and what goes into each.

    Attributes:
        kind: ``shared``, ``separate``, ``deferred`` or ``colocated``; the constructors of these names say what they are for.
        bundles: how many.
        devices: in each bundle.
        resource: Ray's name of a device: ``GPU``, ``NPU``, ``TPU``, ``CPU``, or any other that the cluster has.
        strategy: Ray's, how bundles go onto nodes.
        worker_share: part of a device that a vLLM worker asks Ray for; below 1 only where it shares it with a trainer.
        group: an existing placement group to use instead of a new one. It is never removed.
        indices: its bundles to use, in the order of ranks; default: its first ones that are large enough.
    """

    kind: Kind
    bundles: int = 1
    devices: int = 1
    resource: str = "GPU"
    strategy: Strategy = "PACK"
    worker_share: float = 1.0
    group: PlacementGroup | None = None
    indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SettingsError(f"placement {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if self.strategy not in get_args(Strategy):
            raise SettingsError(f"bundle strategy {self.strategy!r} is none of {', '.join(get_args(Strategy))}")
        if self.bundles < 1 or self.devices < 1 or not 0 < self.worker_share <= 1:
            raise SettingsError("a placement needs at least one node, one device, and a share above 0 and at most 1")
        if self.indices and len(set(self.indices)) != self.bundles:
            raise SettingsError(f"indices {self.indices} must name {self.bundles} different bundles")

    @classmethod
    def shared(cls, devices: int, *, resource: str = "GPU", strategy: Strategy = "PACK") -> Placement:
        """Trainer ranks: one group of one-device bundles. (One bundle of all devices fits on no node, and hangs.)"""
        return cls("shared", bundles=devices, resource=resource, strategy=strategy)

    @classmethod
    def separate(cls, devices: int = 1, *, resource: str = "GPU") -> Placement:
        """A replica on one node, in a group of its own."""
        return cls("separate", devices=devices, resource=resource)

    @classmethod
    def deferred(
        cls, nodes: int, devices_per_node: int, *, resource: str = "GPU", strategy: Strategy = "STRICT_SPREAD"
    ) -> Placement:
        """A replica that spans nodes: a bundle for each, the first is the head's."""
        return cls("deferred", bundles=nodes, devices=devices_per_node, resource=resource, strategy=strategy)

    @classmethod
    def colocated(
        cls, devices: int, *, worker_share: float = 0.4, resource: str = "GPU", strategy: Strategy = "PACK"
    ) -> Placement:
        """Trainer ranks and vLLM workers on the same devices, by fractions; vLLM's Ray executor starts the workers."""
        return cls("colocated", bundles=devices, resource=resource, strategy=strategy, worker_share=worker_share)

    def within(self, group: PlacementGroup, indices: Sequence[int] = ()) -> Placement:
        """The same, in bundles of an existing group."""
        return replace(self, group=group, indices=tuple(indices))

    @property
    def bundle(self) -> dict[str, float]:
        """What each bundle asks Ray for."""
        return {self.resource: float(self.devices)}

    def check_cluster(self) -> None:
        """Refuse what the nodes of this cluster could never hold.

        Raises:
            LaunchError: with what is asked for, there and free.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        fitting = [int(node["Resources"].get(self.resource, 0) // self.devices) for node in nodes]
        room = {"STRICT_SPREAD": sum(fit > 0 for fit in fitting), "STRICT_PACK": max(fitting, default=0)}
        if self.group is None and room.get(self.strategy, sum(fitting)) < self.bundles:
            raise LaunchError(f"the cluster is too small: {self._asked()}; {self._there()}")

    def create(self) -> PlacementGroup:
        """Ask Ray for the group, which ends with the calling process; ``wait`` for it. Gives the existing one, if any.

        Raises:
            LaunchError: the cluster can never hold it.
        """
        self.check_cluster()
        return self.group or placement_group([self.bundle] * self.bundles, strategy=self.strategy)

    def problem(self, group: PlacementGroup) -> str:
        """Why bundles of ``group`` are not there yet; empty where they are."""
        state = placement_group_table(group).get("state", "REMOVED")
        return "" if state == "CREATED" else f"placement group is {state}: {self._asked()}; {self._there()}"

    def reserve(self, timeout: float = 60.0) -> PlacementGroup:
        """``create``, and wait until the bundles are there.

        Raises:
            LaunchError: they are not in time; nothing is left reserved.
        """
        group = self.create()
        ends = time.monotonic() + timeout
        while problem := self.problem(group):
            if time.monotonic() > ends:
                if self.group is None:
                    remove_placement_group(group)
                raise LaunchError(f"no room after {timeout:.0f} s: {problem}")
            time.sleep(0.1)
        return group

    def choose(self, group: PlacementGroup) -> list[int]:
        """The bundles to use, in the order of ranks: one-device bundles of a node stay together.

        Raises:
            LaunchError: the group has too few that are large enough.
        """
        specs, nodes = group.bundle_specs, placement_group_table(group)["bundles_to_node_id"]
        large = [i for i in range(len(specs)) if specs[i].get(self.resource, 0) >= self.devices]
        if set(self.indices) - set(large) or len(large) < self.bundles:
            raise LaunchError(f"the placement group has bundles {specs}; {self._asked()}")
        order = list(dict.fromkeys(nodes[i] for i in large))
        return list(self.indices) or sorted(large, key=lambda i: order.index(nodes[i]))[: self.bundles]

    def options(self, group: PlacementGroup, index: int, share: float = 1.0) -> dict[str, Any]:
        """``Actor.options(**...)`` that puts an actor into bundle ``index``, with this share of its devices (0: none)."""
        amount = self.devices * share
        resources: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0}
        if self.resource in ("CPU", "GPU"):
            resources[f"num_{self.resource.lower()}s"] = amount
        else:
            resources["resources"] = {self.resource: amount}
        strategy = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        return {**resources, "scheduling_strategy": strategy}

    def _asked(self) -> str:
        return f"asked for {self.bundles} bundle(s) of {self.devices} {self.resource} ({self.strategy})"

    def _there(self) -> str:
        free = ray.available_resources().get(self.resource, 0)
        have = (
            f"{node['NodeManagerAddress']} has {node['Resources'].get(self.resource, 0):g}"
            for node in ray.nodes()
            if node["Alive"]
        )
        return f"{', '.join(have)} {self.resource}; free in all: {free:g}"
