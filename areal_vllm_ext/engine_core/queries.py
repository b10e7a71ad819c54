"""Questions about an engine's weights: which tensors its model takes, and the digests of what its workers serve."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from ..protocol import (
    DigestsTaken,
    DigestWeights,
    DraftWeights,
    Error,
    WeightDigests,
    Weights,
    WeightsTaken,
    WorkerWeights,
)
from .effects import Effect, Order, Reply

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..protocol import ErrorKind, TensorMeta
    from ..protocol.server import ReplyTo

logger = logging.getLogger("vllm.areal_vllm_ext")


@dataclasses.dataclass
class _Digesting:
    """Who asked for digests, until when, and the answers of the workers so far."""

    caller: ReplyTo
    ends: float
    taken: dict[int, WorkerWeights] = dataclasses.field(default_factory=dict)


class WeightQueries:
    """The questions of one engine. Used from the endpoint's thread only."""

    def __init__(self, workers: frozenset[int]) -> None:
        """Ask nothing yet. ``workers``: the ranks that answer."""
        self._workers = workers
        self._taken: dict[int, Weights] = {}
        self._weights: Weights | None = None
        self._weights_waiting: list[ReplyTo] = []
        self._digesting: dict[str, _Digesting] = {}

    @property
    def waiting(self) -> bool:
        """True if a question about digests has a deadline to keep."""
        return bool(self._digesting)

    def describe(self, caller: ReplyTo) -> list[Effect]:
        """Answer with what the model takes, as soon as every worker has said what its part takes."""
        if self._weights is not None:
            return [Reply(caller, self._weights)]
        self._weights_waiting.append(caller)
        return []

    def weights_taken(self, message: WeightsTaken) -> list[Effect]:
        """Note what a worker's part of the model takes."""
        self._taken[message.rank] = message.weights
        if self._workers - set(self._taken):
            return []
        weights = self._weights = together([self._taken[rank] for rank in sorted(self._taken)])
        waiting, self._weights_waiting = self._weights_waiting, []
        return [Reply(caller, weights) for caller in waiting]

    def digest(self, caller: ReplyTo, message: DigestWeights, now: float) -> list[Effect]:
        """Ask every worker for digests; ``caller`` is answered when all have taken theirs."""
        self._digesting[message.request] = _Digesting(caller, now + message.timeout)
        return [Order(message)]

    def digests_taken(self, message: DigestsTaken) -> list[Effect]:
        """Take a worker's digests, or its reason why there are none."""
        if (asked := self._digesting.get(message.request)) is None:
            return []
        if message.weights is None:
            del self._digesting[message.request]
            kind: ErrorKind = "busy" if message.busy else "failed"
            return [Reply(asked.caller, Error(kind=kind, message=f"worker {message.rank}: {message.error}"))]
        asked.taken[message.rank] = message.weights
        if len(asked.taken) < len(self._workers):
            return []
        del self._digesting[message.request]
        return [Reply(asked.caller, WeightDigests(workers=tuple(asked.taken[rank] for rank in sorted(asked.taken))))]

    def tick(self, now: float) -> list[Effect]:
        """Answer those whose time is over."""
        late = {request: asked for request, asked in self._digesting.items() if now >= asked.ends}
        effects: list[Effect] = []
        for request, asked in late.items():
            del self._digesting[request]
            missing = sorted(self._workers - set(asked.taken))
            problem = f"no digests from worker {', '.join(map(str, missing))} in time"
            effects.append(Reply(asked.caller, Error(kind="timeout", message=problem)))
        return effects


def together(parts: Iterable[Weights]) -> Weights:
    """Return what a model takes whose workers take ``parts``: it ignores what every worker ignores."""
    parts = list(parts)
    if unknown := next((part for part in parts if not part.tensors), None):
        return Weights(tensors=(), error=unknown.error)
    tensors: dict[str, TensorMeta] = {}
    ties: dict[str, str] = {}
    for part in parts:
        tensors |= {tensor.name: tensor for tensor in part.tensors}
        ties |= part.ties
    optional = frozenset(tensors).intersection(*(part.optional for part in parts))
    return Weights(
        tensors=tuple(tensors.values()),
        optional=tuple(name for name in tensors if name in optional),
        ties={second: first for second, first in ties.items() if second in optional or second not in tensors},
        prefixes=tuple(prefix for prefix in parts[0].prefixes if all(prefix in part.prefixes for part in parts)),
        config=parts[0].config,
        draft=_drafts_together(parts),
    )


def _drafts_together(parts: list[Weights]) -> DraftWeights | None:
    """Return what a drafter takes that every worker has; None else: with pipeline stages, only the last one drafts."""
    drafts = [part.draft for part in parts if part.draft is not None]
    if len(drafts) < len(parts):
        if drafts:
            logger.warning(
                "areal_vllm_ext: this engine's drafter cannot be updated: only %d of %d workers have it (pipeline stages)",
                len(drafts),
                len(parts),
            )
        return None
    return DraftWeights.of(together(draft.weights for draft in drafts), with_base=drafts[0].with_base)
