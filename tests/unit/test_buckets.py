"""Buckets: what is packed comes out again, bit for bit, and nothing reaches beyond its bucket."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from areal_vllm_ext.integrity import digest
from areal_vllm_ext.protocol import Segment, TensorMeta
from areal_vllm_ext.transport import host_memory
from areal_vllm_ext.transport.buckets import Bucket, default_bucket_bytes, filled_buckets, unpack
from examples import examples

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]
Named = tuple[TensorMeta, torch.Tensor]


def meta(name: str, tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits, but for NaN and infinite values, which are refused."""
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    values = bits.to(torch.uint8).view(dtype)
    whole = values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    whole *= torch.isfinite(values.to(torch.float64))
    return values.view(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.contiguous().view(-1)
    return tensor.dtype, tensor.shape, flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


tensors = st.lists(
    st.builds(
        tensor_of,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 7), max_size=3).map(tuple),
        st.integers(0, 2**16),
    ),
    max_size=12,
)


def memory(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def through(weights: list[Named], bucket_bytes: int) -> dict[str, torch.Tensor]:
    """As a sink sends and a source receives."""
    received: dict[str, torch.Tensor] = {}
    for bucket in filled_buckets(iter(weights), bucket_bytes, memory):
        received.update(unpack(bucket.segments(), bucket.filled))
    return received


@examples(50)
@given(tensors=tensors, bucket_bytes=st.sampled_from([1, 256, 300, 1024, 1 << 20]))
def test_what_goes_in_comes_out_bit_for_bit(tensors: list[torch.Tensor], bucket_bytes: int) -> None:
    weights = [(meta(f"t{place}", tensor), tensor) for place, tensor in enumerate(tensors)]
    received = through(weights, bucket_bytes)
    assert list(received) == [known.name for known, _ in weights], "the order is kept"
    for known, tensor in weights:
        assert bits(received[known.name]) == bits(tensor)


@examples(30)
@given(tensors=tensors, bucket_bytes=st.sampled_from([256, 512, 1024]))
def test_a_bucket_is_as_large_as_asked_but_for_one_large_tensor(tensors: list[torch.Tensor], bucket_bytes: int) -> None:
    for bucket in filled_buckets(((meta("t", t), t) for t in tensors), bucket_bytes, memory):
        assert bucket.nbytes <= bucket_bytes or sum(0 not in one.tensor.shape for one in bucket.segments()) == 1


@examples(30)
@given(tensors=tensors, bucket_bytes=st.sampled_from([256, 1024, 1 << 20]))
def test_what_lasts_is_copied_together_and_comes_out_bit_for_bit(
    tensors: list[torch.Tensor], bucket_bytes: int
) -> None:
    weights = [(meta(f"t{place}", tensor), tensor) for place, tensor in enumerate(tensors)]
    # Every second one only: the others are copied at once.
    lasting = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors[::2])
    received: dict[str, torch.Tensor] = {}
    for bucket in filled_buckets(iter(weights), bucket_bytes, memory, lasting):
        received.update(unpack(bucket.segments(), bucket.filled))
    assert [bits(received[known.name]) for known, _ in weights] == [bits(tensor) for tensor in tensors]


@examples(50)
@given(data=st.data(), first=tensors, bucket_bytes=st.sampled_from([256, 1024, 1 << 20]))
def test_buckets_are_filled_again_with_the_same_tensors_or_with_others(
    data: st.DataObject, first: list[torch.Tensor], bucket_bytes: int
) -> None:
    slots: dict[int, torch.Tensor] = {}
    kept: dict[int, Bucket] = {}

    def filled(values: list[torch.Tensor]) -> list[Bucket]:
        """Each of two slots is written again as soon as it was read."""
        number = itertools.count()

        def slot(nbytes: int) -> torch.Tensor:
            place = next(number) % 2
            if place not in slots or slots[place].numel() < nbytes:
                slots[place] = memory(nbytes)
            return slots[place][:nbytes]

        weights = [(meta(f"t{place}", tensor), tensor) for place, tensor in enumerate(values)]
        lasting = frozenset(tensor.untyped_storage().data_ptr() for tensor in values[::2])
        received: dict[str, torch.Tensor] = {}
        buckets = []
        for bucket in filled_buckets(iter(weights), bucket_bytes, slot, lasting, kept):
            named = unpack(bucket.segments(), bucket.filled)
            received.update((name, tensor.clone()) for name, tensor in named)
            assert bucket.digests() == digest.digests_of(
                [tensor for _, tensor in unpack(bucket.segments(), bucket.filled)]
            )
            buckets.append(bucket)
        assert list(received) == [known.name for known, _ in weights]
        assert [bits(received[known.name]) for known, _ in weights] == [bits(tensor) for tensor in values]
        return buckets

    once = filled(first)
    again = filled([torch.zeros_like(tensor) for tensor in first])
    largest = max((bucket._buffer.numel() for bucket in once), default=0)
    if all(bucket._buffer.numel() == largest for bucket in once):
        assert all(one is other for one, other in zip(once, again, strict=True))
    filled(data.draw(tensors))
    filled(first[1:])
    filled(first)


def test_a_tensor_that_comes_as_it_came_reuses_its_view() -> None:
    kept: dict[int, Bucket] = {}
    slot = memory(1 << 12)
    weights = [(meta(f"t{place}", tensor), tensor) for place, tensor in enumerate(torch.randn(3, 8, 4).unbind())]

    def views(pairs: list[Named]) -> list[torch.Tensor]:
        (bucket,) = filled_buckets(iter(pairs), 1 << 12, lambda _: slot, frozenset(), kept)
        return [view for _, _, view in bucket._views]

    before = views(weights)
    assert all(one is other for one, other in zip(before, views(weights), strict=True))
    other = (meta("t1", torch.zeros(2)), torch.zeros(2))
    changed = views([weights[0], other, weights[2]])
    assert changed[0] is before[0]
    assert changed[2] is not before[2]
    assert len(views(weights[:2])) == 2


@pytest.mark.parametrize(
    ("device", "transport", "total", "mib"),
    [
        ("cpu", "broadcast", 1 << 40, 32),
        ("cuda", "ipc", 1 << 40, 256),
        ("cuda", "broadcast", 0, 1024),
        ("cuda", "broadcast", 16 << 30, 1024),
        ("cuda", "broadcast", 2 << 30, 512),
        ("cuda", "broadcast", 100 << 20, 128),
    ],
)
def test_buckets_of_nccl_are_large_but_several(device: str, transport: str, total: int, mib: int) -> None:
    assert default_bucket_bytes(torch.device(device), transport, total) == mib << 20


def test_memory_that_the_sender_uses_again_does_no_harm() -> None:
    def gather() -> Iterator[Named]:
        again = torch.empty(8)
        for value in range(5):
            yield meta(f"w{value}", again), again.fill_(value)

    received = {}
    for bucket in filled_buckets(gather(), 1024, memory):
        received.update(unpack(bucket.segments(), bucket.filled))
    assert [float(received[f"w{value}"].unique()) for value in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalars_and_empty_tensors_keep_their_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = tensor_of(dtype, shape, 1)
    received = through([(meta("odd", torch.zeros(3)), torch.zeros(3)), (meta("t", tensor), tensor)], 1 << 20)
    assert bits(received["t"]) == bits(tensor)


def test_tensors_that_are_not_contiguous_are_packed_by_value() -> None:
    base = torch.arange(24.0).view(4, 6)
    for tensor in (base.t(), base[:, ::2], base[1:3, 1:4], base.expand(2, 4, 6)):
        assert torch.equal(through([(meta("t", tensor), tensor)], 1 << 20)["t"], tensor)


def test_nothing_makes_no_bucket() -> None:
    assert list(filled_buckets(iter(()), 1024, memory)) == []


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(TensorMeta("w", "float32", (65,)), 0), "w does not lie inside its bucket"),
        (Segment(TensorMeta("w", "float32", (1,)), 256), "w does not lie inside its bucket"),
        (Segment(TensorMeta("w", "float32", (1,)), -256), "w does not lie inside its bucket"),
        (Segment(TensorMeta("w", "uint8", (1,)), 2**63), "w does not lie inside its bucket"),
        (Segment(TensorMeta("w", "uint8", (2**62, 2**62)), 0), "w does not lie inside its bucket"),
        (Segment(TensorMeta("w", "float32", (1,)), 2), "w does not lie inside its bucket"),
        (Segment(TensorMeta("w", "float32", (-1, -1)), 0), "w has a negative size"),
        (Segment(TensorMeta("w", "float31", (1,)), 0), "w has unknown dtype 'float31'"),
        (Segment(TensorMeta("w", "Tensor", (1,)), 0), "w has unknown dtype 'Tensor'"),
        (Segment(TensorMeta("w", "load", (1,)), 0), "w has unknown dtype 'load'"),
    ],
)
def test_a_segment_outside_of_its_bucket_is_refused(segment: Segment, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(unpack([segment], torch.zeros(256, dtype=torch.uint8)))


def test_what_is_pushed_is_as_long_as_what_is_announced() -> None:
    small = torch.zeros(44, dtype=torch.uint8)
    (bucket,) = filled_buckets([(meta("a", small), small), (meta("b", small), small)], 300, memory)
    assert bucket.filled.numel() == bucket.nbytes


@pytest.mark.parametrize("nbytes", [0, 1, 4095, (2 << 20) + 1])
def test_host_memory_is_zero_on_a_page_and_nobody_elses(nbytes: int) -> None:
    one, other = host_memory.zeros(nbytes), host_memory.zeros(nbytes)
    assert one.numel() == nbytes
    assert not one.any()
    assert one.data_ptr() % 4096 == 0
    one.fill_(7)
    assert not other.any()


def test_host_memory_that_is_not_there_is_said() -> None:
    with pytest.raises(RuntimeError, match="host memory has no room for 1073741824 MiB more"):
        host_memory.zeros(1 << 50)
