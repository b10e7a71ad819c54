"""Tapes of small loads: a replay gives what the load gives, with few operators and little memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from areal_vllm_ext.worker.load.replay import Tape
from areal_vllm_ext.worker.load.tape import NotTaped, TapeRecorder

Weights = dict[str, torch.Tensor]
Load = Callable[[Weights], list[torch.Tensor]]
aten = torch.ops.aten


def weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in {"q": (4, 8), "k": (2, 8)}.items()}


def taped(load: Load, *held: torch.Tensor) -> Tape:
    staged = weights(0)
    recorder = TapeRecorder(held, staged)
    with torch.no_grad(), recorder:
        finals = load(staged)
    return recorder.tape(finals)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def quantised(staged: Weights) -> list[torch.Tensor]:
    """As vLLM's FP8: shards into one weight, a scale of its values, and bytes that lie transposed."""
    fused = torch.empty(6, 8)
    fused[:4].copy_(staged["q"])
    fused[4:].copy_(staged["k"])
    low, high = fused.aminmax()
    scale = torch.maximum(low.abs(), high.abs()).reshape(1) / torch.tensor(448.0)
    return [(fused / scale).clamp_(-448, 448).to(torch.float8_e4m3fn).t(), scale]


def joined(staged: Weights) -> list[torch.Tensor]:
    """Tensors inside a list, and as a named argument."""
    out = torch.empty(6, 8)
    torch.mul(torch.cat([staged["q"], staged["k"]]), 2, out=out)
    out[1:3, 2:] += staged["q"][:2, 2:]
    return [out, out[:, 1]]


def an_incoming_tensor(staged: Weights) -> list[torch.Tensor]:
    return [staged["q"], staged["k"][1:]]


def several_results(staged: Weights) -> list[torch.Tensor]:
    values, places = staged["q"].sort(dim=1)
    return [places, values.t()]


LOADS: list[Load] = [quantised, joined, an_incoming_tensor, several_results]


@pytest.mark.parametrize("load", LOADS)
def test_a_replay_gives_what_a_load_of_other_weights_gives(load: Load) -> None:
    tape = taped(load)
    for seed in (1, 2):
        for made, expected in zip(tape.replay(weights(seed), lambda: None), load(weights(seed)), strict=True):
            assert (made.dtype, made.shape, made.stride()) == (expected.dtype, expected.shape, expected.stride())
            assert torch.equal(made.float(), expected.float())


def test_replays_do_not_share_memory() -> None:
    tape = taped(quantised)
    kept = tape.replay(weights(1), lambda: None)
    first = [one.float() for one in kept]
    tape.replay(weights(2), lambda: None)
    assert all(torch.equal(one.float(), before) for one, before in zip(kept, first, strict=True))


def test_what_depends_on_no_weight_is_computed_once() -> None:
    def load(staged: Weights) -> list[torch.Tensor]:
        table = torch.arange(8).float()
        table.mul_(3)
        return [staged["q"] + table.cos(), staged["k"] * table, table]

    tape, staged = taped(load), weights(3)
    with Counted() as counted:
        made = tape.replay(staged, lambda: None)
    assert set(counted.calls) - {aten.empty.memory_format, aten.set_.source_Storage_storage_offset} == {
        aten.add.Tensor,
        aten.mul.Tensor,
    }
    assert all(torch.equal(one, expected) for one, expected in zip(made, load(weights(3)), strict=True))


def test_what_was_there_and_is_written_to_is_as_it_was_for_each_replay() -> None:
    held, counts = torch.arange(8).float(), torch.zeros(1)

    def load(staged: Weights) -> list[torch.Tensor]:
        held.add_(staged["q"][0])
        counts.add_(1)  # of no weight, and held
        return [held, staged["k"] + counts]

    tape = taped(load, held, counts)
    for seed in (1, 2):
        made = tape.replay(weights(seed), lambda: None)
        assert torch.equal(made[0], torch.arange(8).float() + weights(seed)["q"][0])
        assert torch.equal(made[1], weights(seed)["k"] + 1)


def test_a_tensor_is_made_once_and_freed_after_its_last_use() -> None:
    def load(staged: Weights) -> list[torch.Tensor]:
        total = torch.zeros(4, 8)
        for _ in range(5):
            total += staged["q"] * 2
        return [total]

    tape = taped(load)
    doubled: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watch(Counted):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if func is aten.mul.Tensor:
                doubled.append(weakref.ref(result))
            most = max(most, sum(one() is not None for one in doubled))
            return result

    with Watch() as watch:
        (made,) = tape.replay(weights(1), lambda: None)
    assert torch.equal(made, load(weights(1))[0])
    assert most == 1
    assert watch.calls[aten.set_.source_Storage_storage_offset] <= 2, "the weight and the total, each once"
    assert tape.nbytes == 2 * 4 * 8 * 4


def test_large_constants_are_made_again() -> None:
    def load(staged: Weights) -> list[torch.Tensor]:
        large = torch.ones(1 << 19)
        large[:8].add_(staged["q"][0])
        return [large, staged["k"] + torch.ones(1 << 19)[:8]]

    tape = taped(load)
    with Counted() as counted:
        made = tape.replay(weights(1), lambda: None)
    assert counted.calls[aten.ones.default] == 2
    assert all(torch.equal(one, expected) for one, expected in zip(made, load(weights(1)), strict=True))


def test_a_tensor_that_changes_its_shape_is_not_taped() -> None:
    with pytest.raises(NotTaped, match=r"t_.default changes a tensor's shape"):
        taped(lambda staged: [(staged["q"] * 2).t_()])


def test_a_replay_is_given_up_between_operators() -> None:
    tape, steps = taped(quantised), 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        tape.replay(weights(1), step)
