"""Parameters that DeepSpeed's ZeRO stage 3 has partitioned over a trainer's ranks: gathered a bucket at a time."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

# Parameters are gathered ahead up to these bytes, so that their collectives follow each other.
_BUCKET_BYTES = 256 << 20


class Partitioned:
    """A parameter of which this rank has a part. ``full_tensor`` gathers it, which is a collective.

    Attributes:
        base: the parameter, which is empty while it is partitioned.
    """

    def __init__(self, gathering: Gathering, place: int, base: Any) -> None:
        """
        Args:
            gathering: gathers it, together with those after it.
            place: among all parameters of ``gathering``.
            base: the parameter.
        """
        self._gathering, self._place, self.base = gathering, place, base

    @property
    def shape(self) -> torch.Size:
        return self.base.ds_shape  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.base.device  # type: ignore[no-any-return]

    def full_tensor(self) -> torch.Tensor:
        """Return the whole parameter, in memory of its own. Every rank calls it, in the same order."""
        return self._gathering.full(self._place)


class Gathering:
    """Gathers the partitioned parameters of one model, in the order in which they were added."""

    def __init__(self) -> None:
        self._parameters: list[Any] = []
        self._full: dict[int, torch.Tensor] = {}

    def part(self, tensor: Any) -> Any:
        """Return what stands for ``tensor`` until it is gathered; itself if it is not partitioned."""
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        self._parameters.append(tensor)
        return Partitioned(self, len(self._parameters) - 1, tensor)

    def full(self, place: int) -> torch.Tensor:
        """Return the parameter at ``place``, and gather those after it up to a bucket's size with it."""
        if place not in self._full:
            self._full = {}  # before others are gathered
            together, nbytes = list[int](), 0
            for number in range(place, len(self._parameters)):
                together.append(number)
                nbytes += self._parameters[number].ds_numel * self._parameters[number].element_size()
                if nbytes >= _BUCKET_BYTES:
                    break
            with gathered_parameters(self._parameters[number] for number in together):
                self._full = {number: self._parameters[number].detach().clone() for number in together}
        return self._full.pop(place)


def is_partitioned(model: torch.nn.Module) -> bool:
    """Return whether ZeRO stage 3 has partitioned parameters of ``model``."""
    return "deepspeed" in sys.modules and any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def gathered_parameters(parameters: Iterable[Any]) -> Iterator[None]:
    """Have DeepSpeed gather ``parameters`` for the body, as it does where their values are needed.

    It is given one at a time, because of several it waits for the last collective only. The others may not have ended then: on
    gloo always (seen: 2 of 200 updates with a tensor of noise), on NCCL where experts have groups of their own.
    """
    import deepspeed

    with contextlib.ExitStack() as gathered:
        for parameter in {id(one): one for one in parameters}.values():
            gathered.enter_context(deepspeed.zero.GatheredParameters([parameter]))
        yield
