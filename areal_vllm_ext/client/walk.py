"""``Walk``: an iterator of the user's that is taken to its end if the update fails. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from typing import Any

from .options import checked_seconds

# After the update's deadline, an iterator is still taken for this long, and for no longer than the update's timeout.
_DRAIN_SECONDS = 10.0


class Walk:
    """An iterator that several ranks of a trainer walk at the same time, because it gathers a tensor at each step.

    If one rank stopped half-way, the others would hang in the next collective. So a rank that stops takes the rest first.
    """

    def __init__(self, items: Iterator[Any], timeout: float) -> None:
        """
        Args:
            items: the user's iterator.
            timeout: of the update, in seconds.
        """
        self._items = items
        self._timeout = timeout
        self._ends = time.monotonic() + timeout
        self._drained = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._items)

    def drain(self) -> None:
        """Take the rest, until the update's deadline; if that is near or over, for at most 10 s and at most the timeout."""
        if self._drained:
            return
        self._drained = True
        ends = max(self._ends, time.monotonic() + min(self._timeout, _DRAIN_SECONDS))
        # The update's own error is raised afterwards. It says more than the iterator's.
        with contextlib.suppress(Exception):
            for _ in self._items:
                if time.monotonic() > ends:
                    break


def walk(weights: Any, timeout: Any) -> Any:
    """Return ``weights``, as a ``Walk`` if it may gather a tensor at each step.

    Args:
        weights: see ``AsyncUpdate.send``.
        timeout: of the update, in seconds, checked or not.
    """
    if isinstance(weights, (Walk, str, Mapping, ItemsView, list, tuple)) or hasattr(weights, "state_dict"):
        return weights
    if hasattr(weights, "shape") or not isinstance(weights, Iterable):
        return weights  # a path, or an error that the check of the weights names
    try:
        seconds = checked_seconds(timeout)
    except (TypeError, ValueError):  # of which the update makes an error
        seconds = _DRAIN_SECONDS
    return Walk(iter(weights), seconds)


@contextlib.contextmanager
def drained_on_error(weights: Any, failed: Callable[[BaseException], object] = lambda _: None) -> Iterator[None]:
    """If the body raises, take the rest of ``weights`` before the error goes on.

    Args:
        weights: what ``walk`` returned.
        failed: called with the error first, so that the other ranks fail too.
    """
    try:
        yield
    except BaseException as error:
        failed(error)
        # Not after Ctrl-C, because the user wants to get out.
        if isinstance(weights, Walk) and isinstance(error, Exception):
            weights.drain()
        raise
