"""SkyRL's own worker in Ray, two ranks: started by SkyRL's kind of ``ray.init``, synced by this package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("skyrl", reason="SkyRL is in .venv-integrations: make test-integrations")

import ray
from served import assert_serve, connected, serving_model, train, worker_path

from areal_vllm_ext.demo.deployment import free_ports

pytestmark = pytest.mark.timeout(400)


def test_every_engine_gets_what_skyrl_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_model(tmp_path) as (served, model, key_file), connected(served.deployment, key_file) as group:
        # What a user sets; SkyRL's own runtime environment has variables only.
        monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "areal_vllm_ext.integrations.skyrl.runtime_env")
        monkeypatch.setenv("AREAL_VLLM_DIRECTORY", served.deployment.directory)
        monkeypatch.setenv("AREAL_VLLM_KEY_FILE", os.fspath(key_file))
        monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other tests its workers would starve
        environment = {"PYTHONPATH": worker_path(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
        try:
            from skyrl_worker import Policy

            port = free_ports(1)[0]
            policies = [ray.remote(Policy).remote(os.fspath(tmp_path / "model"), rank, port) for rank in range(2)]

            def all_ranks(method: str, *arguments: object, **named: object) -> list[object]:
                found: list[object] = ray.get([getattr(one, method).remote(*arguments, **named) for one in policies])
                return found

            assert all_ranks("replaced") == ["areal_vllm_ext.integrations.skyrl.senders"] * 2
            with pytest.raises(ray.exceptions.RayTaskError, match="weight_sync_backend=nccl"):
                all_ranks("connect", weight_sync_backend="delta")
            all_ranks("connect")
            for version in (1, 2):
                all_ranks("train", version)
                train(model, version)
                all_ranks("sync")
                assert_serve(served, model, group, version)
            # A tensor that does not fit: refused on both ranks, old weights serve, and no rank is left in a collective.
            all_ranks("train", 3, breaks=True)
            with pytest.raises(ray.exceptions.RayTaskError, match="shape"):
                all_ranks("sync")
            assert_serve(served, model, group, 2)
            train(model, 3)
            all_ranks("train", 4)
            train(model, 4)
            all_ranks("sync")
            assert {state.generation for state in group.status()} == {"running"}
            assert_serve(served, model, group, max(int(state.version) for state in group.status()))
        finally:
            ray.shutdown()
