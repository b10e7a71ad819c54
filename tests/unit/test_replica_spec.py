"""What runs on each node of a replica follows from the placement and the sizes."""

from __future__ import annotations

from typing import Any

import pytest

from areal_vllm_ext.errors import SettingsError
from areal_vllm_ext.launcher import Placement, ReplicaSpec
from areal_vllm_ext.launcher.state import NodeAddress

FACTS = [NodeAddress("10.0.0.1", (8000, 8001, 8002)), NodeAddress("10.0.0.2", (9000, 9001, 9002))]


def lines(**settings: Any) -> list[str]:
    spec = ReplicaSpec(model="m", command=("serve",), worker_extension=None, **settings)
    spec.check()
    return [" ".join(spec.command_line(node, FACTS)) for node in range(spec.nodes)]


def test_one_engine() -> None:
    assert lines() == ["serve m --host 10.0.0.1 --port 8000"]


def test_engines_and_tensor_parallel_ranks_of_a_node() -> None:
    (line,) = lines(placement=Placement.separate(8), data_parallel_size=4, tensor_parallel_size=2)
    assert line == (
        "serve m --tensor-parallel-size 2 --data-parallel-size 4 --data-parallel-size-local 4 "
        "--data-parallel-address 10.0.0.1 --data-parallel-rpc-port 8001 --host 10.0.0.1 --port 8000"
    )


def test_data_parallel_over_nodes() -> None:
    head, headless = lines(placement=Placement.deferred(2, 4), data_parallel_size=4, tensor_parallel_size=2)
    assert "--data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-address 10.0.0.1" in head
    assert head.endswith("--data-parallel-rpc-port 8001 --host 10.0.0.1 --port 8000")
    assert headless.endswith("--data-parallel-rpc-port 8001 --headless --data-parallel-start-rank 2")


def test_an_engine_over_nodes() -> None:
    head, headless = lines(placement=Placement.deferred(2, 4), tensor_parallel_size=4, pipeline_parallel_size=2)
    common = "serve m --tensor-parallel-size 4 --pipeline-parallel-size 2 --nnodes 2 --node-rank"
    assert head == f"{common} 0 --master-addr 10.0.0.1 --master-port 8002 --host 10.0.0.1 --port 8000"
    assert headless == f"{common} 1 --headless --master-addr 10.0.0.1 --master-port 8002"


def test_arguments_of_the_head_come_last() -> None:
    head, headless = lines(
        placement=Placement.deferred(2, 1),
        data_parallel_size=2,
        vllm_args=["--seed", "1"],
        head_args=["--api-key", "k"],
    )
    assert head.endswith("--seed 1 --api-key k")
    assert headless.endswith("--seed 1")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"data_parallel_size": 2}, "DP 2 x TP 1 x PP 1 are 2 devices, but it has 1 x 1; make them equal"),
        ({"data_parallel_size": 0}, "are 0 devices"),
        (
            {"placement": Placement.deferred(4, 3), "tensor_parallel_size": 2, "data_parallel_size": 6},
            "neither of 2 devices per engine and 3 per node divides the other",
        ),
        ({"placement": Placement.colocated(2), "data_parallel_size": 2}, "a colocated replica has one engine"),
        (
            {"placement": Placement.deferred(2, 1), "data_parallel_size": 2, "restart": "node"},
            "restart 'node': this replica has several nodes",
        ),
        ({"vllm_args": ["--data_parallel_rank=1"]}, "vLLM argument --data_parallel_rank=1: .*leave it out"),
        ({"vllm_args": ["-tp", "2"]}, "vLLM argument -tp: .*leave it out"),
        ({"placement": Placement.shared(1)}, "'shared' is for trainer ranks"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        lines(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"placement": Placement.separate(1).within("g")}, "placement.group: 'g' is not a placement group"),
        ({"placement": Placement(indices=(0, 0))}, "name each bundle once"),
        ({"placement": Placement(indices=(-1,))}, "indices count from 0"),
        ({"placement": Placement(worker_share=float("nan"))}, "worker_share: nan is no share"),
        ({"timeout": float("inf")}, "timeout: inf is not a number of seconds"),
        ({"name": "a/b"}, "name: 'a/b' names log files"),
        ({"name": ".."}, "name: '..' names log files"),
        ({"command": ()}, "neither can be empty"),
        ({"head_args": ["\0"]}, "head_args: it has a null character"),
    ],
)
def test_a_value_that_cannot_be_is_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        ReplicaSpec(**{"model": "m", **settings}).check()
