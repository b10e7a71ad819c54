"""One deployment of a dense model for all tests of this folder, which run in the order of ``_ORDER``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cluster import start_cluster
from left_on_disk import nothing_left

from harness.vllm_release import older_than

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import Cluster

_FOLDER = Path(__file__).parent
# First what needs engines that have had no update yet; last what kills them.
_ORDER = ("test_start", "test_verify", "test_call", "test_fuzz_engines", "test_dense", "test_areal", "test_killed")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [index for index, item in enumerate(items) if item.path.parent == _FOLDER]
    ordered = sorted((items[index] for index in places), key=lambda item: _ORDER.index(item.path.stem))
    for index, item in zip(places, ordered, strict=True):
        items[index] = item


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Engines whose memory can be damaged: their extension is ``corruptible.py``."""
    folder = tmp_path_factory.mktemp("dense")
    damage = folder / "damage"
    damage.mkdir()
    path = os.pathsep.join(filter(None, (str(_FOLDER), os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": path, "AREAL_TEST_DAMAGE": str(damage), "VLLM_PLUGINS": "areal_vllm_ext,areal_routes"}
    extension = "corruptible.CorruptibleWorker"
    # For the route whose answers say which version made which token; older ones have it without this.
    arguments = () if older_than(0, 32) else ("--enable-scale-out",)
    # The check of each file sees nothing of a deployment that ends after the last of them.
    with (
        nothing_left(),
        start_cluster(folder, moe=False, worker_extension=extension, env=env, vllm_args=arguments) as running,
    ):
        yield running


@pytest.fixture
def damage_folder(cluster: Cluster) -> Path:
    """Where engines look for orders to damage themselves."""
    return cluster.deployment.model_dir.parent / "damage"
