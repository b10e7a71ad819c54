"""Tensors that have not changed since the last update stay where they are: real clients, receivers, plans and commits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from real_commits import FROZEN, Engines, engines, group, trained, update
from real_receivers import checkpoint, connected, weights
from waiting import eventually

from areal_vllm_ext import EngineGroup, UpdateAborted
from areal_vllm_ext.process import switch_interval

__all__ = ["checkpoint", "engines", "group"]  # the fixtures


@pytest.mark.parametrize("transport", ["broadcast", "shared_memory"])
@pytest.mark.parametrize("bucket_bytes", [300, 1 << 20], ids=["small buckets", "one bucket"])
@pytest.mark.parametrize("iterable", [False, True], ids=["dict", "iterable"])
def test_what_has_not_changed_is_not_sent(
    engines: Engines, group: EngineGroup, transport: str, bucket_bytes: int, iterable: bool
) -> None:
    for version in (2, 3):
        expected = trained(1, version)
        source = iter(expected.items()) if iterable else expected
        result = update(group, source, version, transport=transport, bucket_bytes=bucket_bytes)
        assert result.kept == len(FROZEN)
        changed = sum(tensor.nbytes for name, tensor in expected.items() if name not in FROZEN)
        assert changed <= result.nbytes < changed + 256 * len(expected)
        assert engines.serve(expected)
        engines.wait_known()
    same = update(group, expected, 4, transport=transport)
    assert (same.kept, same.nbytes) == (len(expected), 0)
    assert {state.version for state in group.status()} == {4}
    engines.wait_known()
    assert update(group, weights(9), 5, transport=transport).kept == 0
    assert engines.serve(weights(9))
    assert group.verify().equal


def test_a_client_that_did_not_send_the_last_weights_sends_all(
    engines: Engines, group: EngineGroup, key_file: Path
) -> None:
    with connected(engines.deployment, key_file) as other:
        assert update(other, trained(1, 2), 2).kept == 0
        engines.wait_known()
        # The first client's last weights are not those that are served now.
        assert update(group, trained(1, 3), 3).kept == 0
    assert engines.serve(trained(1, 3))


def test_what_is_known_of_another_engines_checkpoint_is_not_taken_for_this_ones(
    engines: Engines, group: EngineGroup
) -> None:
    described = group._group._sinks.described
    assert len(described) == 1
    group._group._sinks.described = {"another": ((), 0, 0)}
    assert update(group, trained(1, 2), 2).kept == len(FROZEN)
    assert group._group._sinks.described == described


def test_an_engine_that_cannot_do_with_parts_gets_all_and_so_do_the_others(
    engines: Engines, group: EngineGroup
) -> None:
    engines.all_workers[-1].sleep(level=2)
    assert engines.all_workers[-1].slept == 2
    engines.all_workers[-1].model.embed.data.zero_()
    engines.all_workers[-1].wake_up()
    assert update(group, trained(1, 2), 2).kept == 0
    assert engines.serve(trained(1, 2))
    engines.wait_known()
    assert update(group, trained(1, 3), 3).kept == len(FROZEN)


@pytest.mark.parametrize("name", ["embed", "layer.0"], ids=["a parameter", "part of a parameter"])
def test_what_was_to_stay_and_was_changed_by_somebody_else_is_found_and_the_next_update_heals_it(
    engines: Engines, group: EngineGroup, name: str
) -> None:
    engines.all_workers[1].model.part(name)[0, 0] += 1
    with pytest.raises(UpdateAborted, match="tensors that were not sent have changed on this worker"):
        update(group, trained(1, 2), 2)
    assert update(group, trained(1, 3), 3).kept == 0
    assert engines.serve(trained(1, 3))


def test_a_tensor_of_another_dtype_is_a_no_and_the_next_update_brings_all(engines: Engines, group: EngineGroup) -> None:
    sources = engines.all_workers[0]._areal_receiver.context.loader._plan.sources
    sources["norm"] = (torch.float64, sources["norm"][1])
    with pytest.raises(UpdateAborted, match="other tensors were sent than in the last update"):
        update(group, trained(1, 2), 2)
    assert update(group, trained(1, 3), 3).kept == 0
    assert engines.serve(trained(1, 3))


def test_memory_that_was_lent_and_taken_back_before_it_was_loaded_taints_the_engine(
    engines: Engines, group: EngineGroup
) -> None:
    """By CUDA IPC; here the stamp is planted."""
    receiver = engines.workers[1][0]._areal_receiver

    def on_phase(phase: str) -> None:
        if phase == "commit":
            receiver.reception.staged.stamps[7] = torch.tensor(0)

    with group.update(2, timeout=20.0, on_phase=on_phase) as running:
        running.send(weights(2))
    ((lost, why),) = running.result.lost.items()
    assert lost == engines.deployment.engines[1].name
    assert "revoked its memory before it was loaded" in why
    assert {state.update_phase for state in group.status()} == {"idle", "tainted"}
    assert update(group, weights(3), 3).kept == 0
    assert engines.serve(weights(3))
    assert {state.update_phase for state in group.status()} == {"idle"}


def test_the_switch_interval_is_short_only_during_an_update(engines: Engines, group: EngineGroup) -> None:
    update(group, weights(2), 2)
    eventually(lambda: not switch_interval._active)


def test_the_look_at_what_was_committed_waits_for_an_update_that_is_on_its_way(
    engines: Engines, group: EngineGroup
) -> None:
    update(group, trained(1, 2), 2)
    known: list[str] = []

    def on_phase(phase: str) -> None:
        if phase == "prepare":
            time.sleep(0.5)  # longer than it takes to come
            known.extend(one._areal_receiver.context.live_weights.base()[0] for one in engines.all_workers)

    with group.update(3, timeout=20.0, on_phase=on_phase) as running:
        running.send(trained(1, 3))
    assert known == [""] * len(engines.all_workers)
    engines.wait_known()
    assert engines.serve(trained(1, 3))
