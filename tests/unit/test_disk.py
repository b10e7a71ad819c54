"""Disk: a checkpoint is read completely or refused, and does not change after it was read."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from areal_vllm_ext.errors import NotACheckpoint
from areal_vllm_ext.protocol import Bucket, Disk
from areal_vllm_ext.transport.base import Cancelled
from areal_vllm_ext.transport.disk import DiskSource

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.randn(5, 3), "b": torch.randn(7).to(torch.bfloat16)},
    "model-00002-of-00002.safetensors": {"c": torch.arange(4), "scalar": torch.tensor(2.5)},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for file, tensors in SHARDS.items():
        save_file(tensors, tmp_path / file)
    index = {"weight_map": {name: file for file, tensors in SHARDS.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def source(folder: Path) -> DiskSource:
    return DiskSource(Disk(path=str(folder)), threading.Event())


def test_every_tensor_of_every_shard_is_read_as_it_is(folder: Path) -> None:
    read = dict(source(folder).load_all())
    wanted = {name: tensor for tensors in SHARDS.values() for name, tensor in tensors.items()}
    assert set(read) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


def test_what_was_read_does_not_change_with_the_file(folder: Path) -> None:
    read = dict(source(folder).load_all())
    before = read["a"].clone()
    for file in SHARDS:
        path = folder / file
        with path.open("r+b") as stream:  # in place, as a trainer that writes the next checkpoint over it
            stream.write(bytes(path.stat().st_size))
    assert torch.equal(read["a"], before)


@pytest.mark.parametrize("cut", [1, 20, 300])
def test_a_half_written_shard_is_refused_before_anything_is_read(folder: Path, cut: int) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(NotACheckpoint, match="model-00002"):
        source(folder)


def test_a_shard_that_is_not_there_yet_is_refused(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotACheckpoint, match=r"model-00002.* is missing"):
        source(folder)


def test_a_path_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="is not a directory"):
        source(tmp_path / "absent")


def test_an_update_from_disk_has_no_buckets_and_its_values_are_checked_by_the_worker(folder: Path) -> None:
    disk = source(folder)
    assert disk.unchecked
    assert not disk.reusable, "the folder may hold other weights next time"
    with pytest.raises(ValueError, match="no buckets"):
        disk.start(Bucket(epoch=1, update="u", index=0, nbytes=0, segments=()), torch.empty(0), 1.0, lambda: False)


def test_a_large_checkpoint_is_not_read_to_its_end_when_the_update_is_given_up(folder: Path) -> None:
    cancelled = threading.Event()
    reading = DiskSource(Disk(path=str(folder)), cancelled).load_all()
    next(reading)
    cancelled.set()
    with pytest.raises(Cancelled):
        next(reading)


def test_a_shard_that_is_replaced_between_begin_and_vote_is_refused(folder: Path) -> None:
    disk = source(folder)
    file = folder / "model-00002-of-00002.safetensors"
    save_file({name: tensor + 1 for name, tensor in SHARDS[file.name].items()}, folder / "new")
    (folder / "new").rename(file)
    with pytest.raises(
        NotACheckpoint, match=r"00002-of-00002\.safetensors changed while it was read: .*directory of its own"
    ):
        list(disk.load_all())


def test_all_descriptors_are_closed(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        disk = source(folder)
        list(disk.load_all())
        disk.close()
        disk.close()
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    for _ in range(5):
        with pytest.raises(NotACheckpoint):
            source(folder)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
