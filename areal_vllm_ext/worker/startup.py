"""The checkpoint that a worker was started from, as long as its files are still those that vLLM loaded."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import NotACheckpoint
from ..integrity import checkpoint

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    import torch

    from ..integrity.digest import Contents

# vLLM imports the worker extension, and with it this module, before it loads the model.
_IMPORTED_NS = time.time_ns()

# Inode, size, and the times of the last change of data and of the inode.
_Identity = tuple[int, int, int, int]


class StartupCheckpoint:
    """The files that vLLM loaded at startup. Their weights are live until the first commit."""

    def __init__(self, model: str, revision: str | None) -> None:
        """
        Args:
            model: path or hub name of the checkpoint.
            revision: of a hub model.
        """
        self._name, self._files, self._problem = model, dict[Path, _Identity](), ""
        try:
            self._folder = Path(checkpoint.folder(model, revision))
            self._files = {file: _identity(file) for file in self._loaded()}
        except (NotACheckpoint, OSError) as error:
            self._problem = str(error)
            return
        # The hub's local cache never changes a file, but may get it from the hub only when the model is loaded.
        newer = [file for file, (*_, changed) in self._files.items() if changed > _IMPORTED_NS]
        if Path(model).is_dir() and newer:
            self._problem = f"{newer[0]} was written while the engine loaded it"

    def contents(self) -> tuple[Contents, str]:
        """Read the files' tensors and digests.

        Returns:
            the tensors, and why they are not known to be live; the tensors are empty then.
        """
        if reason := self._problem or self._changed():
            return {}, reason
        try:
            contents = checkpoint.contents(self._folder, check_ambiguity=False)
        except (NotACheckpoint, OSError) as error:
            return {}, str(error)
        return ({}, reason) if (reason := self._changed()) else (contents, "")

    def read(self, names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of ``names``.

        Raises:
            NotACheckpoint: the files are not, or no longer, those that the engine loaded.
        """
        if reason := self._problem or self._changed():
            raise NotACheckpoint(reason)
        with checkpoint.Checkpoint(self._folder, check_ambiguity=False) as files:
            yield from files.read(names)
        if reason := self._changed():
            raise NotACheckpoint(reason)

    def _loaded(self) -> list[Path]:
        return [self._folder / name for name in checkpoint.names_of_files(self._folder)]

    def _changed(self) -> str:
        for file, identity in self._files.items():
            try:
                same = _identity(file) == identity
            except OSError:
                same = False
            if not same:
                return f"{file} has changed since the engine loaded it"
        if set(self._loaded()) != set(self._files):
            return f"{self._folder} has other files than when the engine loaded it"
        return ""


def _identity(file: Path) -> _Identity:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
