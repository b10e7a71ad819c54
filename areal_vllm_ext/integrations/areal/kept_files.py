"""Files of a checkpoint that AReaL deletes as soon as its call is answered, kept until sleeping engines can read them."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from ...integrity.checkpoint import Checkpoint


class KeptFiles:
    """A copy of a checkpoint directory, of hard links where the file system has them.

    Attributes:
        path: of the copy, beside the original.
    """

    def __init__(self, path: str) -> None:
        """Check that ``path`` is a complete checkpoint, and keep it.

        Raises:
            NotACheckpoint: it is none.
            OSError: it cannot be copied.
        """
        Checkpoint(path).close()
        self.path = f"{os.fspath(path).rstrip('/')}.kept-{uuid.uuid4().hex[:8]}"
        try:
            shutil.copytree(path, self.path, copy_function=_link_or_copy)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self.path, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
