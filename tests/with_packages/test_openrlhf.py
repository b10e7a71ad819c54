"""OpenRLHF's own actor trainer in Ray, two ranks of ZeRO-3: started by its kind of ``ray.init``, synced by this package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("openrlhf", reason="OpenRLHF is in .venv-integrations: make test-integrations")

import ray
from served import assert_serve, connected, serving_model, train, worker_path

from areal_vllm_ext.demo.deployment import free_ports

pytestmark = pytest.mark.timeout(400)


def test_every_engine_gets_what_openrlhf_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_model(tmp_path) as (served, model, key_file), connected(served.deployment, key_file) as group:
        # What a user sets; OpenRLHF's own runtime environment has variables only.
        monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "areal_vllm_ext.integrations.openrlhf.runtime_env")
        monkeypatch.setenv("AREAL_VLLM_DIRECTORY", served.deployment.directory)
        monkeypatch.setenv("AREAL_VLLM_KEY_FILE", os.fspath(key_file))
        monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other tests its workers would starve
        environment = {"PYTHONPATH": worker_path(), "OMP_NUM_THREADS": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
        try:
            from openrlhf_worker import Policy

            port = free_ports(1)[0]
            policies = [ray.remote(Policy).remote(os.fspath(tmp_path / "model"), rank, port) for rank in range(2)]

            def all_ranks(method: str, *arguments: object) -> list[object]:
                found: list[object] = ray.get([getattr(one, method).remote(*arguments) for one in policies])
                return found

            assert all_ranks("replaced") == ["areal_vllm_ext.integrations.openrlhf.actor"] * 2
            for version in (1, 2):
                all_ranks("train", version)
                train(model, version)
                all_ranks("broadcast_to_vllm")
                assert_serve(served, model, group, version)
                assert all_ranks("is_partitioned") == [True, True]
            with pytest.raises(ray.exceptions.RayTaskError, match="tensor_parallel_size is above 1"):
                all_ranks("broadcast_to_vllm", 2)
            assert_serve(served, model, group, 2)
            all_ranks("train", 3)
            train(model, 3)
            all_ranks("broadcast_to_vllm")
            assert_serve(served, model, group, 3)
        finally:
            ray.shutdown()
