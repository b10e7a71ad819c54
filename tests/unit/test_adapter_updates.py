# ruff: noqa: F811 - fixtures are arguments
"""Adapters on their way from a trainer to every worker, over real sockets. What vLLM makes of them: test_adapter_store.py."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_receivers import (  # noqa: F401 - fixtures
    WORKERS,
    Served,
    checkpoint,
    connected,
    group,
    save,
    served,
    set_bucket_bytes,
    shared_engines,
    weights,
)

from areal_vllm_ext import ArealError, AsyncEngineGroup, EngineGroup, InvalidWeights, UpdateAborted
from areal_vllm_ext.cli.group import _print_states as print_states
from areal_vllm_ext.worker.adapters.store import AdapterStore

CONFIG = {"r": 2, "target_modules": {"b", "a"}}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "a.lora_A.weight": (2, 7),
        "a.lora_B.weight": (33, 2),
        "b.lora_A.weight": (2, 5),
        "b.lora_B.weight": (3, 2),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def adapter(seed: int) -> Any:
    return tensors(seed), CONFIG


@pytest.fixture(autouse=True)
def without_vllm(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers that keep what arrived, without vLLM's LoRA."""
    monkeypatch.setattr(AdapterStore, "load", lambda _, config, given, __: (config, dict(given)))
    served.adapters.clear()
    yield
    for engine in served.deployment.engines.values():
        engine.endpoint.participant.adapters = {}


def assert_brought(served: Served, **expected: int) -> None:
    """Each worker has got exactly these adapters, by the seeds of their tensors."""
    assert len(served.adapters) == WORKERS * len(served.deployment.engines)
    for held in served.adapters.values():
        assert set(held) == set(expected)
        for name, seed in expected.items():
            config, given = held[name]
            assert config == '{"r": 2, "target_modules": ["a", "b"]}'
            assert set(given) == set(tensors(seed))
            assert all(torch.equal(given[key], one) for key, one in tensors(seed).items())


def test_adapters_that_are_no_mapping_are_named(group: EngineGroup) -> None:
    with pytest.raises(TypeError, match="adapters must be a mapping of names to sources, not 'a'"):
        group.update_weights(version=1, adapters="a", timeout=10)  # type: ignore[arg-type]


def test_adapters_alone_leave_base_weights_as_they_are(
    served: Served, group: EngineGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    result = group.update_weights(version=1, adapters={"math": adapter(1), "code": adapter(2)}, timeout=20)
    assert_brought(served, math=1, code=2)
    assert all(held == {} for held in served.weights.values())
    assert {engine.root for engine in served.deployment.engines.values()} == {""}, "cached prefixes stay valid"
    assert result.adapters == {"math": 1, "code": 1}
    assert result.nbytes > 0
    print_states(group.status())
    assert "code (1), math (1)" in capsys.readouterr().out
    group.update_weights(version=2, adapters={"math": adapter(3), "code": None}, timeout=20)
    assert_brought(served, math=3)
    assert [(state.version, dict(state.adapters)) for state in group.status()] == [(2, {"math": 2})] * 2
    assert group.update_weights(version=3, adapters={"math": None}, timeout=20).adapters == {}
    assert_brought(served)


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory", "disk"])
def test_weights_and_adapters_come_in_one_update(
    served: Served, group: EngineGroup, tmp_path_factory: pytest.TempPathFactory, transport: Any
) -> None:
    source: Any = save(tmp_path_factory, weights(1)) if transport == "disk" else weights(1)
    options = {} if transport == "disk" else {"transport": transport}
    result = group.update_weights(source, version="both", adapters={"math": adapter(1)}, timeout=20, **options)
    assert served.serves(weights(1))
    assert_brought(served, math=1)
    assert result.adapters == {"math": "both"}
    assert "" not in {engine.root for engine in served.deployment.engines.values()}
    group.update_weights(source, version="base", timeout=20, **options)
    assert_brought(served)
    assert [dict(state.adapters) for state in group.status()] == [{"math": "both"}] * 2


def test_the_asynchronous_client_does_the_same(served: Served, key_file: Path) -> None:
    async def run() -> None:
        async with AsyncEngineGroup.connect(served.deployment.directory, key_file=key_file) as group:
            await group.wait_ready(2, timeout=10)
            await group.update_weights(version=1, adapters={"math": adapter(1), "gone": None}, timeout=20)
            assert_brought(served, math=1)
            async with group.update(2, timeout=20) as update:
                await update.send(weights(3))
                await update.send_adapter("math", adapter(2))
                await update.remove_adapter("gone")
            assert update.result.adapters == {"math": 2}

    asyncio.run(run())
    assert_brought(served, math=2)
    assert served.serves(weights(3))


def test_buckets_that_are_smaller_than_an_adapter(served: Served, group: EngineGroup) -> None:
    with group.update(1, timeout=20) as update:
        set_bucket_bytes(update, 256)
        update.send(weights(1))
        update.send_adapter("math", adapter(1))
        update.send_adapter("code", adapter(2))
    assert served.serves(weights(1))
    assert_brought(served, math=1, code=2)


def test_an_adapter_is_sent_as_it_was_when_it_was_given(served: Served, group: EngineGroup) -> None:
    given = adapter(1)
    with group.update(1, timeout=20) as update:
        update.send_adapter("math", given)
        given[0]["a.lora_A.weight"].zero_()
    assert_brought(served, math=1)


def test_an_update_of_adapters_can_be_held_after_the_votes(served: Served, group: EngineGroup) -> None:
    with group.update(1, timeout=20) as update:
        update.send_adapter("math", adapter(1))
        update.prepare()
        with pytest.raises(ArealError, match=r"send_adapter.* was called after update.prepare\(\)"):
            update.send_adapter("code", adapter(2))
        assert served.adapters == {} or all(state.adapters == {} for state in group.status())
    assert_brought(served, math=1)


def test_an_adapter_stays_where_the_update_fails(served: Served, group: EngineGroup) -> None:
    group.update_weights(version=1, adapters={"math": adapter(1)}, timeout=20)
    with contextlib.suppress(ZeroDivisionError), group.update(2, timeout=20) as update:
        update.send_adapter("math", adapter(2))
        raise ZeroDivisionError
    with pytest.raises(InvalidWeights, match="missing"):
        group.update_weights({"embed": weights(1)["embed"]}, version=2, adapters={"math": adapter(2)}, timeout=20)
    assert [(state.version, dict(state.adapters)) for state in group.status()] == [(1, {"math": 1})] * 2


def test_an_engine_that_came_back_without_an_adapter_gets_it(
    served: Served, group: EngineGroup, key_file: Path
) -> None:
    group.update_weights(weights(1), version=1, adapters={"math": adapter(1)}, timeout=20)
    first = next(iter(served.deployment.engines.values())).endpoint.participant
    first.adapters = {}
    with connected(served.deployment, key_file) as other:
        with pytest.raises(UpdateAborted, match="not every engine has adapter math, because one was restarted"):
            other.update_weights(weights(2), version=2, timeout=20)
        result = other.update_weights(weights(2), version=3, adapters={"code": adapter(2), "math": None}, timeout=20)
        assert result.adapters == {"code": 3}
    group.update_weights(weights(2), version=4, adapters={"math": adapter(1)}, timeout=20)
    first.adapters = {name: one for name, one in first.adapters.items() if name != "math"}
    result = group.update_weights(weights(3), version=5, timeout=20)
    assert_brought(served, math=1)
    assert result.adapters == {"math": 5, "code": 3}


@pytest.mark.parametrize("unfit", ["tainted", "stale", "foreign"])
def test_adapters_do_not_heal_base_weights(served: Served, group: EngineGroup, unfit: str) -> None:
    group.update_weights(weights(1), version=1, timeout=20)
    participant = next(iter(served.deployment.engines.values())).endpoint.participant
    setattr(participant, unfit, f"they are {unfit}")
    with pytest.raises(UpdateAborted, match=f"base weights must be in this update.*they are {unfit}"):
        group.update_weights(version=2, adapters={"math": adapter(1)}, timeout=20)
    group.update_weights(weights(1), version=3, adapters={"math": adapter(1)}, timeout=20)
    assert_brought(served, math=1)


def test_engines_without_lora_say_so(served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(UpdateAborted, match="adapter math: this engine was started without --enable-lora"):
        group.update_weights(version=1, adapters={"math": adapter(1)}, timeout=20)


def test_wrong_calls_say_what_to_do(served: Served, group: EngineGroup, checkpoint: Path) -> None:
    with pytest.raises(InvalidWeights, match="the update sent nothing"):
        group.update_weights(version=1, timeout=20)
    with group.update(1, timeout=20) as update:
        update.send_adapter("math", adapter(1))
        with pytest.raises(InvalidWeights, match="adapter math is in this update already"):
            update.remove_adapter("math")
        with pytest.raises(InvalidWeights, match="names no adapter"):
            update.send_adapter("", adapter(1))
    late = group.update(2, timeout=20)
    with pytest.raises(InvalidWeights, match=r"send_adapter.* before update.send\(path\)"):
        send_late(late, os.fspath(checkpoint))


def send_late(update: Any, path: str) -> None:
    """Send an adapter when it is too late to tell the workers of another sender."""
    with update:
        update.send(path)
        update.send_adapter("math", adapter(1))
