"""One Ray cluster for all tests of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness.ray_cluster import RayCluster, ray_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(devices=1, resource="CPU") as running:
        yield running
