from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from typing import TYPE_CHECKING

from cluster import Cluster, start_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from areal_vllm_ext import EngineGroup


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The engines of one test file: dense, or MoE where the file says ``MOE = True``."""
    moe = getattr(request.module, "MOE", False)
    with start_cluster(tmp_path_factory.mktemp("moe" if moe else "dense"), moe=moe) as running:
        yield running


@pytest.fixture
def group(cluster: Cluster) -> Iterator[EngineGroup]:
    with cluster.connect() as connected:
        connected.wait_ready(engines=2, timeout=60)
        yield connected
