"""Where trainers and vLLM run, in terms of Ray's placement groups."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..errors import LaunchError, SettingsError


class Placement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bundles of a placement group. Each ``kind`` has a constructor of the same name that says what it is for.

    Attributes:
        bundles: number of bundles.
        devices: number of devices in each bundle.
        resource: Ray's name of a device: ``GPU``, ``NPU``, ``CPU``, or any other that the cluster has.
        strategy: how Ray spreads the bundles over nodes.
        worker_share: share of a device that a vLLM worker asks Ray for; below 1 if it shares the device with a trainer.
        group: an existing placement group to use instead of a new one; the launcher never removes it.
        indices: bundles of ``group`` to use, in the order of ranks; default: the first ones that are large enough.
    """

    kind: Literal["shared", "separate", "deferred", "colocated"] = "separate"
    bundles: int = 1
    devices: int = 1
    resource: str = "GPU"
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    worker_share: float = 1.0
    group: Any = None
    indices: tuple[int, ...] = ()

    @classmethod
    def shared(cls, devices: int, **options: Any) -> Placement:
        """Place trainer ranks in one-device bundles. (One bundle of all devices waits for ever if no node has that many.)"""
        return cls("shared", devices, **options)

    @classmethod
    def separate(cls, devices: int = 1, **options: Any) -> Placement:
        """Place a replica on one node, in a group of its own."""
        return cls("separate", 1, devices, **options)

    @classmethod
    def deferred(cls, nodes: int, devices_per_node: int, **options: Any) -> Placement:
        """Place a replica on several nodes, one bundle each; the first is the head's."""
        return cls("deferred", nodes, devices_per_node, **{"strategy": "STRICT_SPREAD", **options})

    @classmethod
    def colocated(cls, devices: int, worker_share: float = 0.4, **options: Any) -> Placement:
        """Place trainer ranks and vLLM workers on the same devices; vLLM's Ray executor starts the workers."""
        return cls("colocated", devices, worker_share=worker_share, **options)

    def within(self, group: PlacementGroup, indices: Sequence[int] = ()) -> Placement:
        """Return the same placement in bundles of an existing group."""
        return msgspec.structs.replace(self, group=group, indices=tuple(indices))

    def check(self) -> None:
        """Check the values.

        Raises:
            SettingsError: one of them cannot be; the message is one line.
        """
        if self.bundles < 1 or self.devices < 1:
            raise SettingsError(f"placement: {self.bundles} bundles of {self.devices} devices; both must be at least 1")
        if not 0 < self.worker_share <= 1:
            raise SettingsError(f"placement.worker_share: {self.worker_share!r} is no share; write a number up to 1")
        if not (self.group is None or isinstance(self.group, PlacementGroup)):
            raise SettingsError(
                f"placement.group: {self.group!r} is not a placement group; use placement.within(group)"
            )
        if any(index < 0 for index in self.indices) or len(set(self.indices)) < len(self.indices):
            raise SettingsError(f"placement.indices: {list(self.indices)}: indices count from 0; name each bundle once")

    def reserve(self, timeout: float = 60.0, name: str = "") -> PlacementGroup:
        """Return the group once its bundles are reserved; a new one ends with the driver unless it is removed before.

        Args:
            timeout: seconds until the bundles are reserved.
            name: of a new group.

        Raises:
            LaunchError: the cluster is too small, or time is up; nothing stays reserved.
        """
        fits = [int(node["Resources"].get(self.resource, 0) // self.devices) for node in ray.nodes() if node["Alive"]]
        room = {"STRICT_SPREAD": sum(fit > 0 for fit in fits), "STRICT_PACK": max(fits, default=0)}
        if self.group is None and room.get(self.strategy, sum(fits)) < self.bundles:
            raise LaunchError(f"placement group: the cluster is too small: {self._asked()}; ask for less, or add nodes")
        bundles = [{self.resource: self.devices}] * self.bundles
        group = self.group or placement_group(bundles, strategy=self.strategy, name=name)
        ends = time.monotonic() + timeout
        while (state := placement_group_table(group).get("state", "REMOVED")) != "CREATED":
            if time.monotonic() > ends:
                if self.group is None:
                    remove_placement_group(group)
                raise LaunchError(
                    f"placement group: still {state} after {timeout:.0f} s: {self._asked()}; "
                    "wait until others free their devices, or ask for less"
                )
            time.sleep(0.1)
        return group

    def choose(self, group: PlacementGroup) -> list[int]:
        """Return the bundles to use, in the order of ranks; bundles of one node follow each other.

        Raises:
            LaunchError: too few bundles are large enough.
        """
        specs, nodes = group.bundle_specs, placement_group_table(group)["bundles_to_node_id"]
        large = [i for i in range(len(specs)) if specs[i].get(self.resource, 0) >= self.devices]
        chosen = list(self.indices) or sorted(large, key=lambda i: [nodes[j] for j in large].index(nodes[i]))
        if not set(chosen) <= set(large) or len(set(chosen[: self.bundles])) < self.bundles:
            raise LaunchError(
                f"placement group: its bundles {specs} are too few or too small: {self._asked()}; make a larger group"
            )
        return chosen[: self.bundles]

    def options(self, group: PlacementGroup, index: int, share: float = 1.0) -> dict[str, Any]:
        """Return the arguments of ``Actor.options`` that put an actor into bundle ``index``, with this share of its devices."""
        amount = self.devices * share
        own: dict[str, Any] = {"resources": {self.resource: amount}}
        if self.resource in ("CPU", "GPU"):
            own = {f"num_{self.resource.lower()}s": amount}
        place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
        return {"num_cpus": 0, "num_gpus": 0, **own, "scheduling_strategy": place}

    def _asked(self) -> str:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        have = (f"{node['NodeManagerAddress']} has {node['Resources'].get(self.resource, 0):g}" for node in nodes)
        asked = f"asked for {self.bundles} bundle(s) of {self.devices} {self.resource} ({self.strategy})"
        return f"{asked}; {', '.join(have)}; free in all: {ray.available_resources().get(self.resource, 0):g}"
