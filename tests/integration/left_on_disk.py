"""What servers must not leave on disk when they have ended."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from areal_vllm_ext.process.leftovers import left_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Check that what runs meanwhile leaves no socket, scratch folder or segment behind."""
    before = left_on_disk()
    yield
    ends = time.monotonic() + 15
    while left := left_on_disk() - before:
        assert time.monotonic() < ends, f"left on disk: {', '.join(map(str, sorted(left)))}"
        time.sleep(0.2)
