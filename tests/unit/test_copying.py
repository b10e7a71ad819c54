"""Prepared copies: every layout gets the right bytes, and those that one kernel can copy together are together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from areal_vllm_ext.integrity import digest
from areal_vllm_ext.worker.load.copying import Copies
from areal_vllm_ext.worker.load.proof import digests_by_name
from areal_vllm_ext.worker.load.strides import in_memory_order, is_dense

aten = torch.ops.aten

DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float32, torch.float64, torch.bool, torch.int64)
# Shape and strides of a target and its source, and the elements before them in their memory.
LAYOUTS = {
    "contiguous": ((4, 8), (8, 1), (8, 1), 0),
    "transposed": ((8, 4), (1, 8), (1, 8), 16),
    "one transposed": ((8, 4), (4, 1), (1, 8), 0),
    "columns": ((4, 8), (8, 1), (32, 1), 8),
    "odd columns": ((4, 3), (3, 1), (7, 1), 1),
    "two of three": ((4, 2), (3, 1), (3, 1), 0),
    "every second": ((6,), (2,), (2,), 0),
    "one row for all": ((4, 8), (8, 1), (0, 1), 0),
    "one value for all": ((4, 8), (8, 1), (0, 0), 3),
    "odd": ((5,), (1,), (1,), 0),
    "an odd start": ((8,), (1,), (1,), 1),
    "three of eight": ((4, 3), (8, 1), (8, 1), 0),
    "experts": ((2, 3, 4), (12, 1, 3), (12, 1, 3), 0),
    "a row of one": ((1, 8), (1, 1), (8, 1), 0),
    "scalar": ((), (), (), 5),
    "empty": ((0, 4), (4, 1), (4, 1), 0),
}


def memory(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Bytes that are no two alike in a row, as elements of ``dtype``."""
    values = torch.randint(0, 2 if dtype is torch.bool else 120, (1024,), dtype=torch.uint8)
    return values.roll(seed).view(dtype)


def a_pair(layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape, to, of, offset = LAYOUTS[layout]
    target, source = memory(dtype, 1).clone(), memory(dtype, 2).clone()
    return target.as_strided(shape, to, offset), source.as_strided(shape, of, offset)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_target_gets_its_source_s_bytes_and_nothing_around_it_changes(layout: str, dtype: torch.dtype) -> None:
    target, source = a_pair(layout, dtype)
    expected = torch.empty(0, dtype=dtype).set_(target.untyped_storage().clone())
    expected.as_strided(target.shape, target.stride(), target.storage_offset()).copy_(source)
    before = bytes_of(source)

    Copies([(target, source)]).run()

    assert torch.equal(bytes_of(target), bytes_of(expected))
    assert torch.equal(bytes_of(source), before)


def test_values_are_cast() -> None:
    target, source = torch.zeros(4, 6, dtype=torch.bfloat16), torch.randn(6, 4).t()
    Copies([(target, source)]).run()
    assert torch.equal(target, source.to(torch.bfloat16))


def test_parameters_are_written_without_their_history() -> None:
    target = torch.nn.Parameter(torch.zeros(3))
    Copies([(target, torch.ones(3))]).run()
    assert target.tolist() == [1, 1, 1]
    assert target._version == 0


class Calls(TorchDispatchMode):
    """Records the copies, with the dtype and the tensors of each."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, torch.dtype, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._foreach_copy_.default:
            self.calls.append((func, args[0][0].dtype, list(zip(args[0], args[1], strict=True))))
        return func(*args, **(kwargs or {}))


def test_what_a_kernel_can_copy_together_is_copied_as_integers_by_one_call() -> None:
    # What an engine in FP8 holds: transposed float8 weights, bfloat16 norms, a float32 scale for each layer.
    pairs = [a_pair("transposed", torch.float8_e4m3fn) for _ in range(5)]
    pairs += [a_pair("contiguous", torch.bfloat16) for _ in range(3)]
    pairs += [a_pair("scalar", torch.float32) for _ in range(5)]
    copies = Copies(pairs)

    with Calls() as recorded:
        copies.run()

    assert [(func, dtype, len(together)) for func, dtype, together in recorded.calls] == [
        (aten._foreach_copy_.default, torch.int32, 13)
    ]
    # The conditions of torch's kernel for many tensors.
    for target, source in recorded.calls[0][2]:
        assert target.shape == source.shape
        assert target.stride() == source.stride() == (1,)


def test_a_copy_with_gaps_does_not_keep_others_from_being_copied_together() -> None:
    copies = Copies(
        [a_pair(layout, torch.bfloat16) for layout in ("contiguous", "columns", "contiguous", "transposed")]
    )
    with Calls() as recorded:
        copies.run()
    assert Counter(len(together) for _, _, together in recorded.calls) == {3: 1, 1: 1}
    # Columns of 16 bytes: four integers a row, not eight elements.
    assert [target.shape for _, _, [(target, _), *more] in recorded.calls if not more] == [(4, 4)]


def test_warming_up_launches_each_kernel_and_writes_nothing() -> None:
    layouts = ("contiguous", "columns", "odd columns", "one value for all", "scalar")
    pairs = [a_pair(layout, torch.bfloat16) for layout in layouts]
    pairs.append((torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bfloat16)))
    copies = Copies(pairs)
    before = [bytes_of(target) for target, _ in pairs]

    def kinds(recorded: Calls) -> Counter[tuple[torch.dtype, torch.dtype, bool]]:
        return Counter(
            (target.dtype, source.dtype, target.stride() == source.stride() and is_dense(target))
            for _, _, [(target, source), *_] in recorded.calls
        )

    with Calls() as warmed:
        copies.warm()
    assert all(torch.equal(bytes_of(target), one) for (target, _), one in zip(pairs, before, strict=True))
    assert max(target.numel() for _, _, [(target, _), *_] in warmed.calls) <= 4
    with Calls() as run:
        copies.run()
    assert kinds(warmed) == kinds(run)
    assert len(kinds(run)) == 6


def test_copies_of_several_buckets_are_one_call() -> None:
    together = Copies([a_pair("contiguous", torch.bfloat16)])
    for dtype in (torch.float8_e4m3fn, torch.float32):
        together.extend(Copies([a_pair("contiguous", dtype)]))
    with Calls() as recorded:
        together.run()
    assert [len(pairs) for _, _, pairs in recorded.calls] == [3]
    assert len(list(together.sources())) == 3


def test_transposed_weights_are_hashed_as_they_lie_without_a_copy() -> None:
    table = memory(torch.float8_e4m3fn, 1)[:96].view(8, 12)
    found = digests_by_name({"as it lies": table, "transposed": table.t(), "a column": table[:, 1]})
    assert found["as it lies"] == found["transposed"]
    assert found["a column"] == digest.digests_of([table[:, 1].clone()])[0]
    flat = in_memory_order(table.t())
    assert (flat.shape, flat.data_ptr()) == ((96,), table.data_ptr())
