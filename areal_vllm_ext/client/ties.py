"""``SecondNames``: a tensor that the engines' model has under two names must have one value in the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import InvalidWeights
from ..integrity import checkpoint, digest
from ..integrity.hugging_face import identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .modules import Named
    from .names import NameFinder


class SecondNames:
    """Compares what a trainer gives under the two names of one tensor. Only the first is sent."""

    def __init__(self, ties: Mapping[str, str], names: NameFinder) -> None:
        """
        Args:
            ties: the first name of a tensor by each second name.
            names: finds the engines' name for a trainer's.
        """
        self._ties, self._names = ties, names
        self._concerned = {*ties, *ties.values()}

    def compare(self, parts: Iterable[Named]) -> None:
        """Compare tensors that are all alive.

        Raises:
            InvalidWeights: two names of one tensor have different values.
        """
        held: dict[str, torch.Tensor] = {}
        for name, tensor in parts if self._ties else ():
            if (known := self._names.find(name)) in self._concerned and known is not None:
                held[known] = tensor
        for second, first in self._ties.items():
            if second in held and first in held and not _equal(held[second], held[first]):
                raise InvalidWeights(checkpoint.broken_tie(second, first))

    def compared(self, weights: Iterable[Named]) -> Iterator[Named]:
        """Yield full tensors, of which one may be freed before the next comes, and compare their digests.

        Raises:
            InvalidWeights: two names of one tensor have different values.
        """
        digests: dict[str, int] = {}
        for name, tensor in weights:
            if self._ties and (known := self._names.find(name)) in self._concerned and known is not None:
                digests[known] = digest.digests_of([tensor])[0]
                if reason := checkpoint.broken_tie_reason(self._ties, digests):
                    raise InvalidWeights(reason)
            yield name, tensor


def _equal(second: Any, first: Any) -> bool:
    """Return whether two tensors are equal. Of sharded ones, this rank has a part only, which it compares."""
    if identity(second) == identity(first):
        return True
    if hasattr(second, "to_local") and hasattr(first, "to_local"):
        second, first = second.to_local(), first.to_local()
    if not isinstance(second, torch.Tensor) or not isinstance(first, torch.Tensor) or second.shape != first.shape:
        return False
    return torch.equal(second.to(first.device, first.dtype), first)
