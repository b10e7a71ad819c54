"""Paths that a trainer gives."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InvalidWeights


def checkpoint_path(path: str | os.PathLike[str]) -> str:
    """Return the path of a checkpoint directory, as engines can open it.

    Raises:
        InvalidWeights: it is no path that a message can carry.
    """
    text: str | bytes = os.fspath(path)
    if isinstance(text, bytes) or not text or "\0" in text:
        raise InvalidWeights(f"send(...) got the path {path!r}: give the path of a checkpoint directory as text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidWeights(
            f"send(...) got the path {path!r}, which is no valid Unicode: rename the directory"
        ) from None
    return str(Path(text).absolute())
