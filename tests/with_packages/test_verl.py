"""verl's own manager, replica, actor worker and rollout worker in Ray, with the backend ``areal`` by configuration only."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("verl", reason="verl is in .venv-integrations: make test-integrations")

import ray
from omegaconf import OmegaConf
from rollout_server import Server
from served import assert_serve, connected, serving_model, train, worker_path
from verl.checkpoint_engine import CheckpointEngineManager, CheckpointEngineWorker
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica
from verl_workers import Actor

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray, whose workers import what this process imports."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: beside other tests its workers would starve
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": worker_path(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}},
    )
    yield
    ray.shutdown()


def workers(count: int, cls: type, **arguments: Any) -> Any:
    pool = RayResourcePool([count], use_gpu=False, max_colocate_count=1)
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=RayClassWithInitArgs(ray.remote(cls), **arguments))


def test_every_engine_gets_what_verl_trained(cluster: None, tmp_path: Path) -> None:
    with serving_model(tmp_path) as (served, model, key_file), connected(served.deployment, key_file) as group:
        settings = {"directory": served.deployment.directory, "key_file": str(key_file), "engines": 2, "timeout": 60}
        settings["options"] = {"bucket_mib": 1}
        config = omega_conf_to_dataclass(
            OmegaConf.create(
                {
                    "_target_": "verl.workers.config.CheckpointEngineConfig",
                    "backend": "areal",
                    "custom_backend_module": "areal_vllm_ext.integrations.verl",
                    "engine_kwargs": {"areal": settings},
                }
            )
        )
        rollout = RolloutConfig(name="vllm", tensor_model_parallel_size=1, checkpoint_engine=config)
        model_config = HFModelConfig(
            path=str(tmp_path / "model"), load_tokenizer=False, override_config={"attn_implementation": "eager"}
        )
        actors = workers(2, Actor, path=str(tmp_path / "model"), config=config)
        rollouts = workers(1, CheckpointEngineWorker, rollout_config=rollout, model_config=model_config, replica_rank=0)
        server = ray.remote(Server).options(name="vllm_server_0_0").remote()
        replica = vLLMReplica(0, rollout, model_config, gpus_per_node=1)
        replica.workers, replica.servers = rollouts.workers, [server]

        def calls() -> tuple[list[str], int]:
            found: tuple[list[str], int] = ray.get(server.take_calls.remote())
            return found

        def trained(seed: int, breaks: bool = False) -> None:
            actors.train(seed, breaks)
            train(model, seed)

        # As verl's trainers make it. It aborts no request, and no loader of verl is called.
        manager = CheckpointEngineManager(config, actors, [replica])
        for version in (7, 8):
            trained(version)
            metrics = manager.update_weights(global_steps=version)
            assert set(metrics) == {"timing_s/areal_update", "timing_s/areal_pause"}
            assert_serve(served, model, group, version)
            assert calls() == (["set_global_steps", "resume_kv_cache"], version)
        # A tensor that does not fit: refused on both ranks, old weights serve, and no rank is left in a collective.
        actors.train(9, breaks=True)
        with pytest.raises(ray.exceptions.RayTaskError, match=r"has shape|shape"):
            manager.update_weights(global_steps=9)
        assert_serve(served, model, group, 8)
        train(model, 9)
        trained(10)
        manager.update_weights()  # without a step, as verl does before a validation: the next number
        assert_serve(served, model, group, 10)
        # Any other way to receive finds an empty stream, of which verl's rollout worker makes a new step and nothing else.
        ray.get(rollouts.update_weights(global_steps=11))
        assert calls() == (["resume_kv_cache", "set_global_steps"], 11)
        # Other backends go verl's way.
        asked: list[Any] = []
        other = SimpleNamespace(
            backend="naive", actor_wg=SimpleNamespace(update_weights=lambda **how: asked.append(how) or [])
        )
        assert CheckpointEngineManager.update_weights(other) == {}
        assert asked == [{"global_steps": None, "mode": "naive"}]
