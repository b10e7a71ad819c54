from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from typing import TYPE_CHECKING

from cluster import WORKER_EXTENSION, Cluster, start_cluster

from areal_vllm_ext.process.leftovers import left_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from areal_vllm_ext import EngineGroup


# Not checked: engines in processes of the test's own, which nothing cleans up after; and servers that are harder to end than
# vLLM, whose supervisor is killed with them.
_NOT_CHECKED = ("test_in_process", "test_launcher")


@pytest.fixture(scope="module", autouse=True)
def nothing_left_on_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """The servers of a file's tests leave no socket, scratch folder or segment behind."""
    before = left_on_disk()
    yield
    if request.module.__name__ in _NOT_CHECKED:
        return
    ends = time.monotonic() + 15
    while left := left_on_disk() - before:
        assert time.monotonic() < ends, f"left on disk: {', '.join(map(str, sorted(left)))}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The engines of one test file: dense, or MoE where the file says ``MOE = True``; with its ``WORKER_EXTENSION``, if any."""
    moe = getattr(request.module, "MOE", False)
    extension = getattr(request.module, "WORKER_EXTENSION", WORKER_EXTENSION)
    with pytest.MonkeyPatch.context() as environment:
        # Where engines find an extension of these tests, and what it is told.
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        environment.setenv("AREAL_TEST_DAMAGE", str(tmp_path_factory.mktemp("damage")))
        with start_cluster(
            tmp_path_factory.mktemp("moe" if moe else "dense"), moe=moe, worker_extension=extension
        ) as running:
            yield running


@pytest.fixture
def group(cluster: Cluster) -> Iterator[EngineGroup]:
    with cluster.connect() as connected:
        connected.wait_ready(engines=2, timeout=60)
        yield connected
