"""Digests: equal for equal bytes only, and the same however the tensors are laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from areal_vllm_ext.integrity import digest, digest_torch
from areal_vllm_ext.protocol import TensorMeta
from areal_vllm_ext.transport.buckets import filled_buckets, first_corrupt
from examples import examples

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["compiled", "operators"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to compute them on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "operators":
            patch.setattr(digest, "has_kernel", lambda _device: False)
        else:
            assert digest.compile_cpu_kernel().result(timeout=100)
            assert digest.has_kernel(torch.device("cpu"))
        yield


def one(tensor: torch.Tensor) -> int:
    return digest.digests_of([tensor])[0]


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@examples(100)
@given(first=st.binary(max_size=1100), second=st.binary(max_size=1100))
def test_equal_exactly_where_the_bytes_are(first: bytes, second: bytes) -> None:
    values = [one(torch.frombuffer(bytearray(data), dtype=torch.uint8)) if data else 0 for data in (first, second)]
    assert (values[0] == values[1]) == (first == second)


@examples(100)
@given(count=st.integers(1, 3000), data=st.data())
def test_a_flipped_bit_is_seen(count: int, data: st.DataObject) -> None:
    before = random_bytes(count)
    after = before.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        after[data.draw(st.integers(0, count - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert (one(before) == one(after)) == torch.equal(before, after)


FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zeros": torch.zeros_like,
    "swapped rows": lambda tensor: tensor[[1, 0, *range(2, len(tensor))]],
    "swapped elements": lambda tensor: tensor.flatten()[[1, 0, *range(2, tensor.numel())]],
    "rows turned around": lambda tensor: tensor.flip(0),
    "transposed": lambda tensor: tensor.t(),
    "all signs": lambda tensor: -tensor,
    "two signs": lambda tensor: torch.cat([-tensor[:2, :1], tensor[:2, 1:]], 1).contiguous().clone(),
    "truncated": lambda tensor: tensor[:-1],
    "one row twice": lambda tensor: tensor[[0, 0, *range(2, len(tensor))]],
    "zeros behind": lambda tensor: torch.cat([tensor, torch.zeros_like(tensor[:1])]),
    "a row in the wrong place": lambda tensor: tensor.roll(1, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("columns", [64, 100, 128])
def test_faults_are_seen(fault: str, columns: int) -> None:
    tensor = torch.randn(96, columns, generator=torch.Generator().manual_seed(1))
    broken = FAULTS[fault](tensor)
    if fault == "two signs":
        broken = torch.cat([broken, tensor[2:]])
    assert one(broken) != one(tensor)


def test_zeros_of_different_lengths_differ() -> None:
    lengths = [0, 1, 2, 255, 256, 257, 511, 512, 4096]
    assert len({one(torch.zeros(length, dtype=torch.uint8)) for length in lengths}) == len(lengths)


@examples(40)
@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(0, 9)), max_size=12),
    bucket_bytes=st.sampled_from([1, 300, 1024, 1 << 20]),
)
def test_a_bucket_gives_what_each_tensor_gives(shapes: list[tuple[torch.dtype, int, int]], bucket_bytes: int) -> None:
    tensors = {
        f"t{place}": random_bytes(rows * columns * dtype.itemsize, place).bitwise_and(1).view(dtype).view(rows, columns)
        for place, (dtype, rows, columns) in enumerate(shapes)
    }
    weights = [
        (TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), tensor)
        for name, tensor in tensors.items()
    ]
    # What a buffer held before lies between the tensors.
    for bucket in filled_buckets(weights, bucket_bytes, lambda nbytes: random_bytes(nbytes, 7)):
        for segment, value in zip(bucket.segments(), bucket.digests(), strict=True):
            assert value == one(tensors[segment.tensor.name])
        assert first_corrupt(bucket.segments(), bucket.digests(), bucket.filled) is None


def test_many_pieces_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_bytes(100_000)
    spans = [(0, 1000), (1024, 50_000), (51_200, 48_800)]
    at_once = digest.digests(data, spans)
    monkeypatch.setattr(digest_torch, "_PIECE_BYTES", {"cpu": 1024})
    assert digest.digests(data, spans) == at_once
    monkeypatch.setattr(digest_torch, "_SMALL_BYTES", 1000)
    assert digest.digests_of([data[start : start + nbytes] for start, nbytes in spans]) == at_once


def test_a_view_counts_as_its_elements() -> None:
    table = torch.randn(40, 30)
    assert one(table.t()) == one(table.t().contiguous()) != one(table)
    assert one(table[3:7, 5:11]) == one(table[3:7, 5:11].clone())
    assert one(random_bytes(1000)[3:900]) == one(random_bytes(1000)[3:900].clone())


@pytest.mark.parametrize("span", [(1, 10), (-256, 10), (0, 1025), (768, 257), (0, -1)])
def test_a_span_outside_of_its_buffer_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not lie on rows"):
        digest.digests(random_bytes(1024), [span])


def test_one_damaged_tensor_of_a_bucket_is_named() -> None:
    weights = [(TensorMeta(f"t{i}", "float32", (100,)), torch.randn(100)) for i in range(50)]
    (bucket,) = filled_buckets(weights, 1 << 20, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    segments, announced = bucket.segments(), bucket.digests()
    bucket.filled[37 * 512 + 399] ^= 128
    assert first_corrupt(segments, announced, bucket.filled) == "t37"
    bucket.filled[37 * 512 + 399] ^= 128
    bucket.filled[37 * 512 + 400] ^= 128  # between two tensors
    assert first_corrupt(segments, announced, bucket.filled) is None


def test_a_manifest_is_of_names_dtypes_shapes_and_digests_in_any_order() -> None:
    entries = [(TensorMeta("a", "float32", (2, 3)), 5), (TensorMeta("b", "bfloat16", ()), 6)]
    whole = digest.manifest(entries)
    assert len(whole) == 32
    assert digest.manifest(reversed(entries)) == whole
    for other in (
        (TensorMeta("A", "float32", (2, 3)), 5),
        (TensorMeta("a", "int32", (2, 3)), 5),
        (TensorMeta("a", "float32", (3, 2)), 5),
        (TensorMeta("a", "float32", (2, 3)), 4),
    ):
        assert digest.manifest([other, entries[1]]) != whole
    assert digest.manifest(entries[:1]) != whole


def test_values_stay_what_they_are() -> None:
    """Trainer and engines compare values made by different processes, so of different releases too, one day."""
    assert one(torch.arange(1000, dtype=torch.int32)) == 12140714549338873538


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("count", [1, 255, 256, 4097, (64 << 20) + 13])
def test_cuda_gives_what_the_cpu_gives(count: int) -> None:
    data = random_bytes(count)
    assert one(data.cuda()) == one(data)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])])
def test_digests_that_were_started_are_the_same(device: str) -> None:
    table = torch.randn(64, 32).to(device)
    for tensors in ([table, table[2:].clone()], [table.t()], [table[:0], table.to(torch.bfloat16)]):
        assert digest.digests_of_async(tensors)() == digest.digests_of(tensors)
    assert digest.digests_of_async([])() == []


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from areal_vllm_ext.integrity import digest_numba

    check, right = digest._is_right.__wrapped__, digest_numba.digest
    assert check(torch.device("cpu"))
    monkeypatch.setattr(digest_numba, "digest", lambda data, *more: right(data, *more) ^ 1)
    assert not check(torch.device("cpu"))
    monkeypatch.setattr(digest_numba, "digest", lambda *_: 1 / 0)
    assert not check(torch.device("cpu"))
