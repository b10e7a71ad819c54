"""The drafter's part of an update: where its tensors come from, and whether the update moves it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Literal

from ..errors import InvalidWeights, NotACheckpoint
from ..integrity.checkpoint import Checkpoint, describe
from ..transport.buckets import total_bytes
from .modules import is_sharded
from .weights import Cast, Checker, WeightSource, is_lasting, named_parts

if TYPE_CHECKING:
    import torch

    from ..protocol import TensorMeta, Weights

logger = logging.getLogger("vllm.areal_vllm_ext")

DraftSource = WeightSource | str | os.PathLike[str]

_NO_DRAFTER = (
    "send(..., draft=...) needs engines that draft with a model, and these do not: leave draft out, or start the engines with "
    "--speculative-config"
)
_NOT_UPDATABLE = (
    "send(..., draft=...) cannot update these engines' drafter (%s): parallel drafting, pipeline stages, or a drafter that "
    "vLLM cannot load twice, as their logs say; leave draft out, so that it keeps its weights, or start the engines without"
)


class DraftPart:
    """What one update does to the engines' drafter.

    Attributes:
        outcome: ``sent``, ``kept`` where the drafter stays as it is, or empty where the engines have none.
    """

    def __init__(self, dtype: Cast | None = None, given: DraftSource | None = None) -> None:
        """
        Args:
            dtype: the dtype to send in.
            given: the drafter's weights; None if they are in the base model's, or stay as they are.
        """
        self.outcome: Literal["sent", "kept", ""] = ""
        self._dtype, self._given = dtype, given
        self._pairs: Iterator[tuple[TensorMeta, torch.Tensor]] | None = None
        self._aside: dict[str, torch.Tensor] = {}
        self._with_base = False

    def fit(self, taken: Weights, engine_dtype: str, method: str) -> int:
        """Check the weights that were given for the drafter.

        Args:
            taken: what the engines take.
            engine_dtype: the dtype in which they compute.
            method: how they draft with a model; empty if they do not.

        Returns:
            the most bytes that the update brings for the drafter, also where the base model's weights may hold it (MTP).

        Raises:
            InvalidWeights: the engines have no drafter that can be updated, or it does not take these weights.
        """
        given = self._given
        if taken.draft is None:
            if given is not None:
                raise InvalidWeights(_NOT_UPDATABLE % method if method else _NO_DRAFTER)
            return 0
        self.outcome = "kept"
        self._checker = Checker(taken.draft.weights, engine_dtype, self._dtype)
        self._names = frozenset(meta.name for meta in taken.draft.weights.required)
        self._with_base = taken.draft.with_base and given is None
        if given is not None:
            self._pairs = self._checked(_from_path(given) if isinstance(given, (str, os.PathLike)) else given)
        may_come = given is not None or self._with_base
        return total_bytes(taken.draft.weights.required, engine_dtype) if may_come else 0

    def watch(self, checker: Checker, weights: WeightSource) -> None:
        """Set aside what ``checker`` sees of ``weights`` that is the drafter's, in one checkpoint with the base model."""
        if not self._with_base:
            return
        lasting = is_lasting(weights)

        def set_aside(name: str, tensor: torch.Tensor) -> None:
            if name in self._names:
                self._aside[name] = tensor if lasting else tensor.detach().to("cpu", copy=True)

        checker.set_aside = set_aside

    def pairs(self) -> Iterator[tuple[TensorMeta, torch.Tensor]] | None:
        """Return the drafter's tensors, after the base model's were sent; None if the update leaves the drafter as it is.

        Raises:
            InvalidWeights: the base model's weights hold only some of them.
        """
        if self._aside:
            self._pairs = self._checked(self._aside)
        if self._pairs is not None:
            self.outcome = "sent"
        return self._pairs

    def look_into(self, path: str) -> None:
        """Find out whether a checkpoint directory, which engines read, holds the drafter too."""
        if not self._with_base:
            return
        try:
            held = {meta.name for meta in describe(path)}
        except NotACheckpoint:
            held = set(self._names)  # on other hosts only: the engines refuse it if it is incomplete
        if held & self._names:
            self.outcome = "sent"

    def _checked(self, source: WeightSource) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        parts = list(named_parts(source))
        if sharded := next((name for name, tensor in parts if is_sharded(tensor)), None):
            raise InvalidWeights(f"draft: {sharded} is sharded: give send(..., draft=...) full tensors")
        try:
            return self._checker.check_source(parts)
        except InvalidWeights as error:
            raise InvalidWeights(f"draft: {error}") from None


def say_kept(method: str, versions: Collection[object]) -> None:
    """Log that updates leave the engines' drafter as it is. ``versions``: what engines have, which differs after a restart."""
    named = ("the weights that it was started with" if one is None else f"version {one}" for one in versions)
    since = " or, on other engines, ".join(sorted(named))
    logger.warning(
        "the engines draft with a model (%s) that this update does not bring: it keeps %s, so fewer of its tokens will be "
        "accepted; send(..., draft=...) moves it too",
        method,
        since,
    )


def _from_path(path: str | os.PathLike[str]) -> list[tuple[str, torch.Tensor]]:
    """Read a checkpoint directory in this process."""
    try:
        with Checkpoint(path) as checkpoint:
            return list(checkpoint.read())
    except NotACheckpoint as error:
        raise InvalidWeights(f"draft: {error}") from None
