"""Questions about an engine's weights: which tensors its checkpoint has, and the digests of what its workers serve."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

from ..errors import NotACheckpoint
from ..integrity import checkpoint
from ..protocol import DigestsTaken, DigestWeights, Error, WeightDigests, Weights, WorkerWeights
from .effects import Effect, Order, Reply

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..protocol import ErrorKind
    from ..protocol.server import ReplyTo


@dataclasses.dataclass
class _Digesting:
    """Who asked for digests, until when, and the answers of the workers so far."""

    caller: ReplyTo
    ends: float
    taken: dict[int, WorkerWeights] = dataclasses.field(default_factory=dict)


class WeightQueries:
    """The questions of one engine. Used from the endpoint's thread only."""

    def __init__(
        self,
        model: str,
        revision: str | None,
        workers: frozenset[int],
        post: Callable[[Callable[[], list[Effect]]], None],
    ) -> None:
        """Ask nothing yet.

        Args:
            model: the checkpoint's directory or its name on the hub.
            revision: of that name.
            workers: the ranks that answer.
            post: has the endpoint's thread run a function and carry out its effects.
        """
        self._model, self._revision = model, revision
        self._workers = workers
        self._post = post
        self._weights: Weights | None = None
        self._weights_waiting: list[ReplyTo] = []
        self._digesting: dict[str, _Digesting] = {}

    @property
    def waiting(self) -> bool:
        """True if a question about digests has a deadline to keep."""
        return bool(self._digesting)

    def describe(self, caller: ReplyTo) -> list[Effect]:
        """Answer with the checkpoint's tensors, read once."""
        if self._weights is not None:
            return [Reply(caller, self._weights)]
        self._weights_waiting.append(caller)
        if len(self._weights_waiting) == 1:
            # Not on this thread: reading many headers on a network file system takes seconds.
            threading.Thread(target=self._read_headers, name="areal-describe", daemon=True).start()
        return []

    def _read_headers(self) -> None:
        try:
            weights = Weights(tensors=tuple(checkpoint.describe(self._model, self._revision)))
        except NotACheckpoint as error:
            weights = Weights(tensors=(), error=str(error))
        except Exception as error:
            weights = Weights(tensors=(), error=f"{type(error).__name__}: {error}")
        self._post(lambda: self._described(weights))

    def _described(self, weights: Weights) -> list[Effect]:
        self._weights = weights
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
