"""Checkpoints: read from the headers of real safetensors files, refused where they are not complete."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from areal_vllm_ext.errors import NotACheckpoint
from areal_vllm_ext.integrity import checkpoint
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
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in checkpoint._DTYPES.values())


# What is refused


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotACheckpoint, match=r"model-00002-of-00002\.safetensors, which the index names, is missing"):
        checkpoint.files(sharded)


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
        checkpoint.files(sharded)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {"a": 1}}', "null"])
def test_an_index_of_another_form_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(NotACheckpoint, match="is no safetensors index"):
        checkpoint.files(sharded)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(NotACheckpoint, match=r"holds no \*\.safetensors file"):
        checkpoint.files(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"absent is not a directory \(on this node\)"):
        checkpoint.files(tmp_path / "absent")


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
        (TensorMeta("embed.weight", "float64", (8, 4)), "has dtype float64, .* send with dtype='bfloat16'"),
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
