"""Checkpoint directories: which files vLLM would load of one, and whether a tensor fits the engines' checkpoint."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..errors import NotACheckpoint
from .safetensors_file import SafetensorsFile, read_file

if TYPE_CHECKING:
    import os
    from collections.abc import Container, Iterable, Iterator, Mapping

    import torch
    from typing_extensions import Self

    from ..protocol import TensorMeta
    from .digest import Contents

# Dtypes in which an engine may compute, and so may take a tensor instead of the checkpoint's dtype.
FLOATS = frozenset({"float64", "float32", "bfloat16", "float16"})
# A buffer that older models save, and that every model computes from its configuration.
COMPUTED = "rotary_emb.inv_freq"
# Before the names of a drafter's tensors, where they stand beside the base model's.
DRAFT = "draft."
_INDEX = "model.safetensors.index.json"
_MISTRAL = "consolidated"  # vLLM loads files that begin with it instead of all others


# A file's device, inode, size and time of the last write.
_Identity = tuple[int, int, int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def names_of_files(directory: Path) -> list[str]:
    """Return the names of the safetensors files that vLLM loads from a directory: those in its index, otherwise all.

    Raises:
        NotACheckpoint: there are none, or a file that the index names is missing.
    """
    if not directory.is_dir():
        raise NotACheckpoint(f"{directory} is not a directory (on this node)")
    present = _present(directory)
    index = directory / _INDEX
    if not index.exists():
        if not present:
            raise NotACheckpoint(
                f"{directory} holds no *.safetensors file: it is not a checkpoint that engines can load"
            )
        return present
    try:
        named = sorted(set(msgspec.json.decode(read_file(index), type=_Index).weight_map.values()))
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        raise NotACheckpoint(f"{index} is no safetensors index: {error}") from None
    if not named:
        raise NotACheckpoint(f"{index} names no file")
    if missing := [name for name in named if name not in present]:
        others = [name for name in present if name not in named]
        hint = f"; if {others[0]} is the checkpoint, remove the index" if others else ""
        raise NotACheckpoint(f"{directory}: {missing[0]}, which {_INDEX} names, is missing{hint}")
    return named


def _present(directory: Path) -> list[str]:
    """Return the names of all safetensors files, as ``glob`` does it for vLLM: without hidden ones."""
    return sorted(path.name for path in directory.glob("*.safetensors") if path.is_file() and path.name[0] != ".")


class Checkpoint:
    """The files that vLLM would load from a directory, open until ``close``, so that they stay the same files.

    Attributes:
        tensors: all tensors by name.
    """

    def __init__(self, directory: str | os.PathLike[str], *, check_ambiguity: bool = True) -> None:
        """Open the files and read their headers.

        Args:
            directory: of a Hugging Face checkpoint.
            check_ambiguity: refuse a directory that holds a second checkpoint, such as the shards of an earlier save. vLLM
                would load one of them silently.

        Raises:
            NotACheckpoint: there is no complete checkpoint, or there are two.
        """
        self._directory = Path(directory)
        self._files: list[SafetensorsFile] = []
        try:
            self._listing = self._listed()
            names = names_of_files(self._directory)
            for name in names:
                self._files.append(SafetensorsFile(self._directory / name))
            if check_ambiguity:
                self._refuse_second(names)
        except OSError as error:
            self.close()
            raise NotACheckpoint(f"{self._directory} cannot be read: {error}") from None
        except NotACheckpoint:
            self.close()
            raise
        self.tensors: dict[str, TensorMeta] = {}
        for file in self._files:
            self.tensors.update(file.tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files:
            file.close()

    def read(self, names: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors, or those of ``names``, each in memory of its own.

        Raises:
            NotACheckpoint: the directory changed meanwhile. It is known only at the end: use nothing before.
        """
        for file in self._files:
            for name in file.tensors:
                if names is None or name in names:
                    yield name, file.read(name)
        if changed := self.changed():
            raise NotACheckpoint(
                f"{changed}: save each checkpoint to a directory of its own, and send it when it is complete"
            )

    def changed(self) -> str | None:
        """Return what has changed in the directory since it was opened; None if nothing has."""
        before, now = self._listing, self._listed()
        different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        return f"{self._directory / different[0]} changed while it was read" if different else None

    def _listed(self) -> dict[str, _Identity]:
        """Return which files there are, and in which state."""
        found: dict[str, _Identity] = {}
        for name in (*_present(self._directory), _INDEX):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                one = (self._directory / name).stat()
                found[name] = one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns
        return found

    def _refuse_second(self, names: list[str]) -> None:
        """Raise if a tensor is in two files, used or not, because either can be meant."""
        used = {name: file.path.name for file in self._files for name in file.tensors}
        for file in self._files:
            for name in file.tensors:
                if used[name] != file.path.name:
                    self._refuse(name, file.path.name, used[name])
        present = _present(self._directory)
        mistral = [name for name in present if name.startswith(_MISTRAL)]
        if mistral and (others := [name for name in names if name not in mistral]):
            raise NotACheckpoint(
                f"{self._directory} holds two checkpoints: vLLM would load {mistral[0]} instead of {others[0]}; "
                "remove one of them"
            )
        for other in present:
            if other in names:
                continue
            unused = SafetensorsFile(self._directory / other)
            unused.close()
            if both := sorted(unused.tensors.keys() & used.keys()):
                self._refuse(both[0], used[both[0]], other, f" ({_INDEX} names {used[both[0]]})")

    def _refuse(self, tensor: str, first: str, second: str, detail: str = "") -> None:
        raise NotACheckpoint(
            f"{self._directory} holds two checkpoints: {tensor} is in {first} and in {second}{detail}; remove one of them"
        )


def folder(model: str, revision: str | None = None) -> str:
    """Return a checkpoint's directory: ``model`` itself, or a hub model's directory in the local cache.

    Raises:
        NotACheckpoint: there is neither.
    """
    if Path(model).is_dir():
        return model
    try:
        from huggingface_hub import snapshot_download

        cached: str = snapshot_download(model, revision=revision, local_files_only=True)
    except Exception as error:
        raise NotACheckpoint(f"{model} is neither a directory nor in the local hub cache: {error}") from None
    return cached


def describe(model: str, revision: str | None = None) -> list[TensorMeta]:
    """Return the tensors of the checkpoint that an engine was started with.

    Args:
        model: its directory, or a hub model in the local cache.
        revision: of the hub model.

    Raises:
        NotACheckpoint: there is no complete safetensors checkpoint.
    """
    with Checkpoint(folder(model, revision), check_ambiguity=False) as checkpoint:
        return list(checkpoint.tensors.values())


def contents(directory: str | os.PathLike[str], *, check_ambiguity: bool = True) -> dict[str, tuple[TensorMeta, int]]:
    """Return each tensor of a checkpoint directory with the digest of its bytes. This reads all of it.

    Raises:
        NotACheckpoint: it is none, is ambiguous, or changed meanwhile.
    """
    from . import digest

    with Checkpoint(directory, check_ambiguity=check_ambiguity) as checkpoint:
        return {name: (checkpoint.tensors[name], digest.digests_of([tensor])[0]) for name, tensor in checkpoint.read()}


def as_drafters(contents: Contents) -> Contents:
    """Return a drafter's tensors under the names that they have beside the base model's."""
    return {
        DRAFT + name: (msgspec.structs.replace(meta, name=DRAFT + name), value)
        for name, (meta, value) in contents.items()
    }


def without_drafters(contents: Contents) -> tuple[Contents, Contents]:
    """Return the base model's tensors, and those of its drafter, which keep their names."""
    drafters = {name: one for name, one in contents.items() if name.startswith(DRAFT)}
    return {name: one for name, one in contents.items() if name not in drafters}, drafters


def mismatch_reason(tensor: TensorMeta, expected: Mapping[str, TensorMeta], dtypes: Iterable[str]) -> str | None:
    """Return why engines whose checkpoint is ``expected`` cannot load ``tensor``; None if they can.

    Args:
        tensor: the tensor to be sent.
        expected: the checkpoint's tensors by name.
        dtypes: dtypes that the engines accept in place of a floating-point dtype of the checkpoint, such as the one that
            they compute in. A quantized tensor (int8, float8) is accepted in its own dtype only.
    """
    if (known := expected.get(tensor.name)) is None:
        near = difflib.get_close_matches(tensor.name, expected, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{tensor.name} is not a weight of the engines' checkpoint ({len(expected)} tensors){hint}"
    if tensor.shape != known.shape:
        return f"{tensor.name} has shape {list(tensor.shape)}, the engines' checkpoint {list(known.shape)}"
    if tensor.dtype != known.dtype and not (known.dtype in FLOATS and tensor.dtype in dtypes):
        castable = known.dtype in FLOATS and tensor.dtype in FLOATS
        hint = "send with dtype='auto'" if castable else f"send it as {known.dtype}"
        return f"{tensor.name} has dtype {tensor.dtype}, the engines' checkpoint {known.dtype}: {hint}"
    return None


def known_name(name: str, known: Mapping[str, object], prefixes: Iterable[str]) -> str:
    """Return the engines' name for ``name``, which can lack one of ``prefixes`` or have one more; else ``name`` itself."""
    if name not in known:
        for prefix in prefixes:
            other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
            if other in known:
                return other
    return name


def broken_tie(second: str, first: str) -> str:
    """Return a message about two names that engines load to one tensor, and that have different values."""
    return (
        f"{second} differs from {first}, and the engines' model has one tensor for both (tie_word_embeddings): "
        "tie them in the trainer, or start the engines from a checkpoint whose config.json does not tie them"
    )


def broken_tie_reason(ties: Mapping[str, str], digests: Mapping[str, int]) -> str | None:
    """Return which two names of one tensor have different digests; None if there are none.

    Args:
        ties: the first name of a tensor by each second one.
        digests: of tensors by name.
    """
    for second, first in ties.items():
        if second in digests and first in digests and digests[second] != digests[first]:
            return broken_tie(second, first)
    return None


def missing_reason(sent: Iterable[str], expected: Mapping[str, TensorMeta]) -> str | None:
    """Return a message that names ``expected`` tensors that were not sent; None if all were."""
    absent = sorted(set(expected) - set(sent))
    if not absent:
        return None
    more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
    return f"{len(absent)} of {len(expected)} tensors are missing: {', '.join(absent[:3])}{more}"
