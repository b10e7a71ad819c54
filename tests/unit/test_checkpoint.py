"""Checkpoints: read from the headers of real safetensors files, refused where they are not complete."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from areal_vllm_ext.errors import NotACheckpoint
from areal_vllm_ext.integrity import checkpoint, safetensors_file
from areal_vllm_ext.integrity.checkpoint import Checkpoint
from areal_vllm_ext.integrity.safetensors_file import SafetensorsFile
from areal_vllm_ext.protocol import TensorMeta

TENSORS = {
    "embed.weight": torch.zeros(8, 4, dtype=torch.bfloat16),
    "norm.weight": torch.zeros(4),
    "scale": torch.zeros(()),
    "empty": torch.zeros(0, 3),
    "ids": torch.zeros(2, dtype=torch.int64),
    "mask": torch.zeros(2, dtype=torch.bool),
    "half": torch.zeros(1, dtype=torch.float16),
    "quantised": torch.zeros(2, 2).to(torch.float8_e4m3fn),
}


def metas(tensors: dict[str, torch.Tensor]) -> dict[str, TensorMeta]:
    return {name: TensorMeta(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}


def described(folder: Path) -> dict[str, TensorMeta]:
    return {tensor.name: tensor for tensor in checkpoint.describe(str(folder))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    names = list(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:4], "model-00002-of-00002.safetensors": names[4:]}
    for file, part in shards.items():
        save_file({name: TENSORS[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


# What is read


def test_names_shapes_and_dtypes_come_from_the_header(folder: Path) -> None:
    assert described(folder) == metas(TENSORS)


def test_a_sharded_checkpoint_is_read_as_its_index_says(sharded: Path) -> None:
    save_file({"stray": torch.zeros(1)}, sharded / "consolidated.safetensors")
    assert described(sharded) == metas(TENSORS)


def test_shards_without_an_index_are_read_all(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert described(sharded) == metas(TENSORS)


def test_every_dtype_name_is_one_of_torch() -> None:
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in safetensors_file.DTYPES.values())


# What is refused


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotACheckpoint, match=r"model-00002-of-00002\.safetensors, which .* names, is missing"):
        checkpoint.names_of_files(sharded)


@pytest.mark.parametrize(
    "left", ["all but one byte", "header only", "half a header", "length only", "three bytes", "none"]
)
def test_a_file_that_is_cut_off_is_refused(folder: Path, left: str) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    sizes = {"all but one byte": len(whole) - 1, "header only": 8 + header, "half a header": 8 + header // 2}
    file.write_bytes(whole[: sizes.get(left, {"length only": 8, "three bytes": 3, "none": 0}.get(left, 0))])
    with pytest.raises(NotACheckpoint, match=r"model\.safetensors (is truncated|cannot be read)"):
        checkpoint.describe(str(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"GIF89a" + bytes(100),
        b"\xff" * 64,
        struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc",
        b"version https://git-lfs.github.com/",
    ],
    ids=["image", "ones", "not-utf8", "lfs-pointer"],
)
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(NotACheckpoint, match=r"cannot be read as safetensors|is not a safetensors file"):
        checkpoint.describe(str(folder))


@pytest.mark.parametrize(
    "header",
    [
        [1, 2],
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": []}},
    ],
)
def test_a_header_of_another_form_is_refused(folder: Path, header: object) -> None:
    encoded = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    with pytest.raises(NotACheckpoint):
        checkpoint.describe(str(folder))


def test_an_unknown_dtype_is_named(folder: Path) -> None:
    encoded = json.dumps({"w": {"dtype": "F2", "shape": [], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    with pytest.raises(NotACheckpoint, match="w has dtype F2, which is not supported"):
        checkpoint.describe(str(folder))


@pytest.mark.parametrize("text", ["", "{", '{"metadata": {}}', '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(NotACheckpoint, match="is no safetensors index"):
        checkpoint.names_of_files(sharded)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {"a": 1}}', "null"])
def test_an_index_of_another_form_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(NotACheckpoint, match="is no safetensors index"):
        checkpoint.names_of_files(sharded)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(NotACheckpoint, match=r"holds no \*\.safetensors file"):
        checkpoint.names_of_files(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"absent is not a directory \(on this node\)"):
        checkpoint.names_of_files(tmp_path / "absent")


def test_a_model_that_is_nowhere_says_both_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotACheckpoint, match="nobody/nothing is neither a directory nor in the local hub cache"):
        checkpoint.describe("nobody/nothing")


# What fits

EXPECTED = metas(TENSORS)


def test_what_fits_has_no_misfit() -> None:
    assert [checkpoint.mismatch_reason(tensor, EXPECTED, ()) for tensor in EXPECTED.values()] == [None] * len(EXPECTED)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (TensorMeta("norm.wieght", "float32", (4,)), "norm.wieght is not a weight .* did you mean norm.weight?"),
        (TensorMeta("zzz", "float32", (4,)), r"zzz is not a weight of the engines' checkpoint \(8 tensors\)$"),
        (TensorMeta("norm.weight", "float32", (5,)), r"norm.weight has shape \[5\], the engines' checkpoint \[4\]"),
        (TensorMeta("norm.weight", "float32", (4, 1)), r"norm.weight has shape \[4, 1\]"),
        (TensorMeta("embed.weight", "float64", (8, 4)), "has dtype float64, .* send with dtype='auto'"),
    ],
)
def test_a_misfit_says_what_and_the_way_out(tensor: TensorMeta, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(checkpoint.mismatch_reason(tensor, EXPECTED, ("float16",)))


def test_the_dtype_that_engines_compute_in_is_welcome() -> None:
    assert checkpoint.mismatch_reason(TensorMeta("embed.weight", "float32", (8, 4)), EXPECTED, ("float32",)) is None


def test_missing_tensors_are_counted_and_some_named() -> None:
    assert checkpoint.missing_reason(EXPECTED, EXPECTED) is None
    assert checkpoint.missing_reason(["embed.weight", "unknown", *list(EXPECTED)[2:]], EXPECTED) == (
        "1 of 8 tensors are missing: norm.weight"
    )
    assert checkpoint.missing_reason(["ids", "mask"], EXPECTED) == (
        "6 of 8 tensors are missing: embed.weight, empty, half and 3 more"
    )


# Two checkpoints in one folder


def rewritten(folder: Path, name: str, tensors: dict[str, torch.Tensor] = TENSORS) -> None:
    save_file({tensor: values.clone() for tensor, values in tensors.items()}, folder / name)


SECOND = r"holds two checkpoints: \S+ is in model.* and in .*; remove one of them"


def test_shards_of_an_earlier_save_beside_a_single_file_are_refused(sharded: Path) -> None:
    rewritten(sharded, "model.safetensors")
    with pytest.raises(NotACheckpoint, match=SECOND) as refused:
        Checkpoint(sharded)
    assert "(model.safetensors.index.json names model-00001-of-00002.safetensors)" in str(refused.value)


def test_an_old_index_beside_new_shards_is_refused(sharded: Path) -> None:
    for number in (1, 2, 3):
        part = dict(list(TENSORS.items())[number - 1 :: 3])
        rewritten(sharded, f"model-0000{number}-of-00003.safetensors", part)
    with pytest.raises(NotACheckpoint, match=SECOND):
        Checkpoint(sharded)


def test_an_old_index_whose_shards_are_gone_is_said_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    wanted = (
        r"model-00001-of-00001\.safetensors, .* is missing; if model\.safetensors is the checkpoint, remove the index"
    )
    with pytest.raises(NotACheckpoint, match=wanted):
        Checkpoint(folder)


@pytest.mark.parametrize("name", ["model_ema.safetensors", "ema.safetensors", "a-copy.safetensors"])
def test_a_copy_beside_the_checkpoint_is_refused(folder: Path, name: str) -> None:
    rewritten(folder, name, {"embed.weight": TENSORS["embed.weight"]})
    with pytest.raises(NotACheckpoint, match=r"embed\.weight is in .*\.safetensors and in .*; remove one of them"):
        Checkpoint(folder)


def test_one_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    rewritten(sharded, "model-00002-of-00002.safetensors")
    with pytest.raises(NotACheckpoint, match=SECOND):
        Checkpoint(sharded)


def test_the_files_that_vllm_would_load_instead_are_named(folder: Path) -> None:
    rewritten(folder, "consolidated.00.safetensors", {"tok_embeddings.weight": torch.zeros(2)})
    with pytest.raises(
        NotACheckpoint, match=r"vLLM would load consolidated\.00\.safetensors instead of model\.safetensors"
    ):
        Checkpoint(folder)


def test_a_half_written_file_beside_the_checkpoint_is_refused(sharded: Path) -> None:
    rewritten(sharded, "model.safetensors")
    whole = (sharded / "model.safetensors").read_bytes()
    (sharded / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(NotACheckpoint, match=r"model\.safetensors is truncated"):
        Checkpoint(sharded)


def test_an_engines_own_folder_is_described_as_vllm_loaded_it(sharded: Path) -> None:
    rewritten(sharded, "model.safetensors", TENSORS | {"more": torch.zeros(3)})
    assert described(sharded) == metas(TENSORS)


@pytest.mark.parametrize("beside", ["adapter_model.safetensors", ".model.safetensors", "model.safetensors.tmp"])
def test_files_that_hold_no_second_checkpoint_do_no_harm(sharded: Path, beside: str) -> None:
    if beside.startswith("adapter"):
        rewritten(sharded, beside, {"base_model.model.embed.lora_A.weight": torch.zeros(2)})
    else:
        rewritten(sharded, beside)
    with Checkpoint(sharded) as checkpoint:
        assert checkpoint.tensors == metas(TENSORS)


def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, folder: Path) -> None:
    (folder / "deeper").mkdir()
    rewritten(folder / "deeper", "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "deeper/model.safetensors"}}')
    with pytest.raises(NotACheckpoint, match=r"deeper/model\.safetensors, .* is missing"):
        Checkpoint(tmp_path)


def test_vllm_takes_the_same_files(sharded: Path, tmp_path: Path) -> None:
    """The oracle is vLLM's own choice, where vLLM is installed."""
    weight_utils = pytest.importorskip("vllm.model_executor.model_loader.weight_utils")
    rewritten(sharded, "model.safetensors")
    present = [str(path) for path in sorted(sharded.glob("*.safetensors"))]
    chosen = weight_utils.filter_duplicate_safetensors_files(present, str(sharded), "model.safetensors.index.json")
    assert [Path(path).name for path in chosen] == checkpoint.names_of_files(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    chosen = weight_utils.filter_duplicate_safetensors_files(present, str(sharded), "model.safetensors.index.json")
    assert [Path(path).name for path in chosen] == checkpoint.names_of_files(sharded)


# A folder that changes while it is read


def replaced(path: Path) -> None:
    save_file({name: torch.ones_like(tensor) for name, tensor in load_file(path).items()}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def overwritten(path: Path) -> None:
    """With other values of the same size, in place."""
    content = path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(content[:-1] + bytes([content[-1] ^ 255]))


def shortened(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 3)


CHANGES: dict[str, Callable[[Path], object]] = {
    "replaced": lambda folder: replaced(folder / "model-00002-of-00002.safetensors"),
    "overwritten": lambda folder: overwritten(folder / "model-00002-of-00002.safetensors"),
    "truncated": lambda folder: shortened(folder / "model-00002-of-00002.safetensors"),
    "removed": lambda folder: (folder / "model-00001-of-00002.safetensors").unlink(),
    "touched": lambda folder: os.utime(folder / "model-00001-of-00002.safetensors", ns=(1, 1)),
    "another index": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
    "no index": lambda folder: (folder / "model.safetensors.index.json").unlink(),
    "one more file": lambda folder: rewritten(folder, "model.safetensors"),
}


@pytest.mark.parametrize("already_read", [0, 1, len(TENSORS)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_changes_between_begin_and_vote_is_refused(sharded: Path, change: str, already_read: int) -> None:
    with Checkpoint(sharded) as checkpoint:
        read = checkpoint.read()
        for _ in range(already_read):
            next(read)
        CHANGES[change](sharded)
        with pytest.raises(NotACheckpoint, match=r"while it was read"):
            list(read)


def test_what_is_read_is_of_the_files_that_were_opened(sharded: Path) -> None:
    """So two saves are never mixed within one file."""
    with Checkpoint(sharded) as checkpoint:
        for name in checkpoint.tensors:
            assert any(name in file.tensors for file in checkpoint._files)
        replaced(sharded / "model-00001-of-00002.safetensors")
        assert not checkpoint._files[0].read("embed.weight").any()
        assert load_file(sharded / "model-00001-of-00002.safetensors")["embed.weight"].all()


def test_a_pipe_is_refused_without_waiting_for_a_writer(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(NotACheckpoint, match=r"is not a file"):
        SafetensorsFile(folder / "model.safetensors")


def test_a_file_that_ends_within_its_header_is_truncated(folder: Path) -> None:
    """Also where what there is of the header is valid."""
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10) + b"{}")
    with pytest.raises(NotACheckpoint, match="truncated within its header"):
        Checkpoint(folder)


@pytest.mark.parametrize("index", ["pipe", "device"])
def test_an_index_that_is_no_file_is_refused_without_reading_it(sharded: Path, index: str) -> None:
    """A pipe would block, and a device has no end."""
    path = sharded / "model.safetensors.index.json"
    path.unlink()
    if index == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(NotACheckpoint, match="no regular file"):
        Checkpoint(sharded)


@pytest.mark.parametrize("offsets", [[0, 3], [4, 0], [-4, 0]])
def test_a_tensor_of_another_size_than_its_shape_is_refused(folder: Path, offsets: list[int]) -> None:
    encoded = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(4))
    with pytest.raises(NotACheckpoint, match="does not have the size of its shape"):
        Checkpoint(folder)
