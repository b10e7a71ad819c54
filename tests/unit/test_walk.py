"""An iterator that several ranks walk is taken to its end where the update fails, so that no rank hangs in a collective."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_receivers import Served, checkpoint, group, served, shared_engines, weights

from areal_vllm_ext import ArealError, AsyncEngineGroup, EngineGroup, EnginesMissing, InvalidWeights, UpdateAborted
from areal_vllm_ext.client import walk as walks

__all__ = ["checkpoint", "group", "served", "shared_engines"]  # the fixtures


class Steps:
    """An iterator as a sharded trainer has it, which counts its steps."""

    def __init__(self, items: dict[str, torch.Tensor]) -> None:
        self.taken: list[str] = []
        self.items = items

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.items.items():
            self.taken.append(name)
            yield name, tensor


WRONG = {"embed": torch.zeros(3), **{name: one for name, one in weights(1).items() if name != "embed"}}


def sends_in_a_block(group: EngineGroup, steps: Any, **options: Any) -> None:
    with group.update(1, timeout=20) as opened:
        opened.send(steps, **options)


def sends_at_once(group: EngineGroup, steps: Any, **options: Any) -> None:
    group.update_weights(steps, version=1, timeout=20, **options)


@pytest.mark.parametrize("send", [sends_in_a_block, sends_at_once])
@pytest.mark.parametrize("form", [iter, lambda steps: steps], ids=["iterator", "iterable"])
def test_the_rest_is_taken_where_a_tensor_does_not_fit(group: EngineGroup, send: Any, form: Any) -> None:
    steps = Steps(WRONG)
    with pytest.raises(InvalidWeights, match="embed has shape"):
        send(group, form(steps))
    assert steps.taken == list(WRONG)


@pytest.mark.parametrize("send", [sends_in_a_block, sends_at_once])
def test_the_rest_is_taken_where_an_argument_is_wrong(group: EngineGroup, send: Any) -> None:
    steps = Steps(weights(1))
    with pytest.raises(ValueError, match="dtype must be one of"):
        send(group, iter(steps), dtype="fp32")
    assert steps.taken == list(steps.items)


def test_the_rest_is_taken_where_the_update_does_not_even_begin(
    served: Served, group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_vllm_ext.control.command.describe_missing", lambda *_, **__: "DP rank 7 was not heard")
    steps = Steps(weights(1))
    with pytest.raises(EnginesMissing):
        sends_at_once(group, iter(steps))
    assert steps.taken == list(steps.items)


def test_the_rest_is_taken_where_an_option_is_wrong(group: EngineGroup) -> None:
    for options in ({"timeout": 0}, {"transport": "pigeon"}, {"version": 1.5}):
        steps = Steps(weights(1))
        with pytest.raises((TypeError, ValueError)):
            group.update_weights(iter(steps), **{"version": 1, **options})
        assert steps.taken == list(steps.items)


def test_the_asynchronous_group_takes_the_rest_too(served: Served, key_file: Path) -> None:
    steps, others = Steps(WRONG), Steps(weights(1))

    async def run() -> None:
        async with AsyncEngineGroup.connect(served.deployment.directory, key_file=key_file) as client:
            with pytest.raises(InvalidWeights):
                await client.update_weights(iter(steps), version=1, timeout=20)
            with pytest.raises(ValueError, match="transport"):
                await client.update_weights(iter(others), version=1, transport="pigeon")  # type: ignore[arg-type]

    asyncio.run(run())
    assert steps.taken == list(WRONG)
    assert others.taken == list(others.items)


def test_the_error_is_the_updates_own_where_the_rest_fails_too(group: EngineGroup) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "embed", torch.zeros(3)
        raise ZeroDivisionError

    with pytest.raises(InvalidWeights, match="embed has shape"):
        sends_at_once(group, broken())


def test_an_endless_iterator_is_left_in_bounded_time(group: EngineGroup) -> None:
    endless = ((f"tensor {number}", torch.zeros(1)) for number in itertools.count())
    started = time.monotonic()
    with pytest.raises(InvalidWeights, match="tensor 0 is not a weight"):
        group.update_weights(endless, version=1, timeout=1)
    assert time.monotonic() - started < 2.5


def test_after_the_deadline_the_rest_is_taken_for_a_bounded_time(
    group: EngineGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walks, "_DRAIN_SECONDS", 0.3)
    steps = Steps(weights(1))

    def late() -> Iterator[tuple[str, torch.Tensor]]:
        for number, item in enumerate(steps):
            if number == 1:
                time.sleep(1.2)
            yield item

    with pytest.raises(UpdateAborted):
        group.update_weights(late(), version=1, timeout=1.0)
    assert steps.taken == list(steps.items)


def test_send_outside_of_the_block_is_refused_by_name(group: EngineGroup) -> None:
    update = group.update(1, timeout=20)
    with pytest.raises(ArealError, match=r"called before the update's block: write `with group\.update"):
        update.send(weights(1))
    with update:
        update.send(weights(1))
    with pytest.raises(ArealError, match="called after the update's block"):
        update.send(weights(1))
    with pytest.raises(ArealError, match="block was entered before"), update:
        pass


@pytest.mark.parametrize("path", ["", b"/bytes", "nul\0", "\ud800"])
def test_a_path_that_is_none_is_refused(group: EngineGroup, path: Any) -> None:
    with pytest.raises(InvalidWeights, match=r"send\(\.\.\.\) got"):
        sends_at_once(group, path)


WRONG_OPTIONS = {
    "senders": ({"senders": "parts"}, r"senders must be one of .*not 'parts'"),
    "senders of one rank": ({"senders": "partitioned"}, "senders='partitioned' needs process_group="),
    "process_group": ({"process_group": 5}, "process_group must be a torch.distributed.ProcessGroup, not 5"),
    "keep_buffers": ({"keep_buffers": "no"}, "keep_buffers must be True or False, not 'no'"),
    "on_phase": ({"on_phase": "print"}, "on_phase must be a function of the phase's name, not 'print'"),
    "trace": ({"trace": 1}, "trace must be a path, not 1"),
    "bucket_mib": ({"bucket_mib": 1.5}, "bucket_mib must be an integer, not 1.5"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_an_option_that_is_none_is_named_when_it_is_given(group: EngineGroup, case: str) -> None:
    options, message = WRONG_OPTIONS[case]
    with pytest.raises((TypeError, ValueError), match=message):
        group.update(1, **options)
