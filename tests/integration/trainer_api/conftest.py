"""One deployment for all tests of this folder: another extension in the slot, and the worker's backend ``areal``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cluster import start_cluster
from left_on_disk import nothing_left

from harness.cpu_vllm import ONE_PROCESS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster import Cluster


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    env = {"PYTHONPATH": path, "AREAL_VLLM_ENABLE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    arguments = ["--weight-transfer-config", '{"backend": "areal"}', *ONE_PROCESS]
    folder = tmp_path_factory.mktemp("trainer_api")
    extension = "theirs.Theirs"
    with (
        nothing_left(),
        start_cluster(folder, moe=False, worker_extension=extension, env=env, vllm_args=arguments) as running,
    ):
        yield running
