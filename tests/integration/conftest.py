from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from typing import TYPE_CHECKING

from left_on_disk import nothing_left

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import Cluster

    from areal_vllm_ext import EngineGroup


@pytest.fixture(scope="module", autouse=True)
def nothing_left_on_disk() -> Iterator[None]:
    """The servers of a file's tests leave no socket, scratch folder or segment behind."""
    with nothing_left():
        yield


@pytest.fixture
def group(cluster: Cluster) -> Iterator[EngineGroup]:
    with cluster.connect() as connected:
        connected.wait_ready(engines=2, timeout=60)
        yield connected
