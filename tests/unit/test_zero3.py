"""Parameters that ZeRO stage 3 has partitioned are gathered a bucket at a time, and are partitioned again afterwards.

DeepSpeed is a source package, so it is not in the set that tests are run with. Where it is installed, these tests run on it.
Where it is not, they run on a stand-in for what is used of it (checked against 0.19.8).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch
from test_adapters import adapted, merged, same
from test_weights import dense, metas, mixture, saved, sent

from areal_vllm_ext.client import zero3
from areal_vllm_ext.client.weights import named_weights

REAL = importlib.util.find_spec("deepspeed") is not None
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class GatheredParameters:
    """As ``deepspeed.zero.GatheredParameters``, which waits for the last of several collectives only."""

    def __init__(self, params: list[Any]) -> None:
        self.params = sorted(
            {id(one): one for one in params if hasattr(one, "ds_id")}.values(), key=lambda one: one.ds_id
        )

    def __enter__(self) -> None:
        for parameter in self.params:
            parameter.data = parameter.ds_tensor.view(parameter.ds_shape)
        for parameter in self.params[:-1]:
            parameter.data = torch.full_like(parameter.data, torch.nan)  # its collective has not ended

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parameter in self.params:
            parameter.data = torch.empty(0)


def partition_as_deepspeed_does(model: torch.nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        one: Any = parameter
        one.ds_id, one.ds_shape, one.ds_numel = number, parameter.shape, parameter.numel()
        one.ds_tensor = parameter.detach().clone().flatten()
        parameter.data = torch.empty(0)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if not REAL:
        stand_in: Any = ModuleType("deepspeed")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)  # libraries look for it
        stand_in.zero = SimpleNamespace(GatheredParameters=GatheredParameters)
        monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
        yield stand_in
        return
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    real = importlib.import_module("deepspeed")
    # It would be compiled first, for minutes, and makes collectives within a host faster.
    monkeypatch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)
    real.init_distributed("gloo", verbose=False)
    yield real
    torch.distributed.destroy_process_group()


def partitioned(model: torch.nn.Module, deepspeed: Any) -> torch.nn.Module:
    if REAL:
        deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    else:
        partition_as_deepspeed_does(model)
    assert is_partitioned(model)
    return model


def is_partitioned(model: torch.nn.Module) -> bool:
    return all(parameter.numel() == 0 for parameter in model.parameters())


class DeepSpeedEngine(torch.nn.Module):
    """As DeepSpeed's, of which it has the name and the module."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize("bucket", [1, 3000, 1 << 30])
@pytest.mark.parametrize("make", [lambda: dense(tie_word_embeddings=True), dense], ids=["tied", "dense"])
def test_a_partitioned_model_is_gathered_a_bucket_at_a_time(
    make: Any, bucket: int, deepspeed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero3, "_BUCKET_BYTES", bucket)
    files = saved(make(), tmp_path)
    model = partitioned(make(), deepspeed)
    for source in (model, DeepSpeedEngine(model), torch.nn.DataParallel(model)):
        assert same(sent(source, metas(files)), files)
        assert is_partitioned(model)
    for number, (name, tensor) in enumerate(named_weights(model)):
        assert torch.equal(tensor, files[name])
        if number == 4:
            break
    assert is_partitioned(model), "also where the walk ends early"


def test_fused_experts_are_gathered_as_they_are_saved(deepspeed: Any, tmp_path: Path) -> None:
    files = saved(mixture(), tmp_path)
    assert same(sent(partitioned(mixture(), deepspeed), metas(files)), files)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_partitioned_model_with_an_adapter_is_sent_merged(deepspeed: Any, tmp_path: Path) -> None:
    wanted = merged(adapted("lora of all layers"), tmp_path)
    model = partitioned(adapted("lora of all layers"), deepspeed)
    assert same(sent(model, metas(wanted)), wanted)
    assert is_partitioned(model)
