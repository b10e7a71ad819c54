"""Compares what engines serve: with each other, with their state after the last commit, and with a checkpoint. No I/O."""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING

from . import checkpoint as files
from . import digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..protocol import Status, TensorMeta, WeightDigests, Weights, WorkerWeights
    from .digest import Contents


@dataclasses.dataclass(frozen=True)
class Difference:
    """A tensor of one worker that is not what it should be, and why. An empty ``tensor`` means all tensors."""

    engine: str
    worker: int
    tensor: str
    reason: str

    def __str__(self) -> str:
        return f"{self.engine}, worker {self.worker}: {self.tensor or 'the weights'} {self.reason}"


@dataclasses.dataclass(frozen=True)
class Verification:
    """The result of a comparison.

    Attributes:
        differences: empty if everything is equal.
        engines: how many engines were compared.
        tensors: how many live tensors were compared.
        unproven: engines whose weights could not be compared with a fresh load at their first update, with the cause.
    """

    differences: tuple[Difference, ...]
    engines: int
    tensors: int
    unproven: Mapping[str, str]

    @property
    def equal(self) -> bool:
        """Return whether no difference was found."""
        return not self.differences


def compare(
    answers: Mapping[str, WeightDigests],
    statuses: Mapping[str, Status],
    checkpoint: Contents | None,
    taken: Weights | None = None,
    draft: Contents | None = None,
) -> Verification:
    """Compare the workers of all engines.

    Args:
        answers: each engine's digests, by its name.
        statuses: each engine's status, by its name.
        checkpoint: the tensors that all engines should serve, with their digests; None to skip this comparison.
        taken: what the engines' model takes of a checkpoint, and under which names; None if that is not known.
        draft: the tensors that the engines' drafter should serve. None: it is compared where ``checkpoint`` holds it too.
    """
    differences: list[Difference] = []
    workers = [(name, worker) for name, answer in answers.items() for worker in answer.workers]
    for name, worker in workers:
        if statuses[name].update_phase == "tainted":
            differences.append(Difference(name, worker.rank, "", f"are partially loaded: {statuses[name].error}"))
        if statuses[name].update_phase == "foreign":
            differences.append(Difference(name, worker.rank, "", f"are not from an update: {statuses[name].error}"))
        differences += [
            Difference(name, worker.rank, tensor, "has changed since it was loaded: its memory was damaged")
            for tensor in worker.changed
        ]
    differences += _manifests(workers)
    differences += _adapters(statuses)
    by_layout: dict[str, list[tuple[str, WorkerWeights]]] = collections.defaultdict(list)
    for name, worker in workers:
        by_layout[worker.layout].append((name, worker))
    known = {(one.engine, one.worker, one.tensor) for one in differences}
    for alike in by_layout.values():
        found = _live(alike)
        differences += [one for one in found if (one.engine, one.worker, one.tensor) not in known]
    if checkpoint is not None:
        drafted = _of_drafter(checkpoint, draft, taken)
        checkpoint, ignored = _as_taken(checkpoint, taken)
        for name, worker in workers:
            served, moved = files.without_drafters(digest.by_name(worker.contents))
            differences += _against(name, worker, served, checkpoint, ignored)
            if drafted and (moved or draft is not None):
                differences += _against(name, worker, moved, drafted)
    return Verification(
        differences=tuple(differences),
        engines=len(answers),
        tensors=sum(len(worker.live) for _, worker in workers),
        unproven={name: status.unproven for name, status in statuses.items() if status.unproven},
    )


def _manifests(workers: list[tuple[str, WorkerWeights]]) -> Iterator[Difference]:
    """Yield workers that serve another update's weights than most."""
    usual, holder = _usual([(worker.manifest, name) for name, worker in workers])
    for name, worker in workers:
        if worker.manifest != usual:
            yield Difference(name, worker.rank, "", f"belong to another update than those on {holder}")


def _adapters(statuses: Mapping[str, Status]) -> Iterator[Difference]:
    """Yield adapters that an engine serves otherwise than most."""
    held = {name: {one: it.manifest for one, it in status.adapters.items()} for name, status in statuses.items()}
    for adapter in sorted({adapter for one in held.values() for adapter in one}):
        usual, holder = _usual([(one.get(adapter), name) for name, one in held.items()])
        for name, one in held.items():
            if one.get(adapter) != usual:
                yield Difference(name, 0, f"adapter {adapter}", f"is not as on {holder}")


def _live(alike: list[tuple[str, WorkerWeights]]) -> Iterator[Difference]:
    """Yield live tensors that differ from those of most workers of the same layout."""
    for tensor in dict.fromkeys(tensor for _, worker in alike for tensor in worker.live):
        usual, holder = _usual([(worker.live.get(tensor), name) for name, worker in alike])
        for name, worker in alike:
            if worker.live.get(tensor) != usual:
                yield Difference(name, worker.rank, tensor, f"differs from the one on {holder}")


def _usual(values: list[tuple[object, str]]) -> tuple[object, str]:
    """Return the most frequent value (the first one of a tie), and the name of an engine that has it."""
    usual = collections.Counter(value for value, _ in values).most_common(1)[0][0]
    return usual, next(holder for value, holder in values if value == usual)


def _as_taken(checkpoint: Contents, taken: Weights | None) -> tuple[Contents, frozenset[str]]:
    """Return a checkpoint under the engines' names, and the names in it that their model ignores.

    The second name of a tensor is ignored if its value is that of the first; else the engines cannot serve both.
    """
    if taken is None:
        return checkpoint, frozenset()
    known = {tensor.name: tensor for tensor in taken.tensors}
    named = {files.known_name(name, known, taken.prefixes): one for name, one in checkpoint.items()}
    untied = {
        second
        for second, first in taken.ties.items()
        if second in named and first in named and named[second][1] != named[first][1]
    }
    computed = {name for name in named if name.endswith(files.COMPUTED)}
    return named, (frozenset(taken.optional) | frozenset(taken.ties) | computed) - untied


def _of_drafter(checkpoint: Contents, draft: Contents | None, taken: Weights | None) -> Contents:
    """Return what the drafter should serve, under the names that it has beside the base model's."""
    if taken is None or taken.draft is None:
        return {}
    if draft is None:
        draft = checkpoint if taken.draft.with_base else {}
    drafter = taken.draft.weights
    named, _ = _as_taken(draft, drafter)
    return files.as_drafters({meta.name: named[meta.name] for meta in drafter.required if meta.name in named})


def _against(
    name: str, worker: WorkerWeights, served: Contents, checkpoint: Contents, ignored: frozenset[str] = frozenset()
) -> Iterator[Difference]:
    """Compare ``served``, which ``worker`` serves, with ``checkpoint``. What cannot be compared is a difference."""
    for tensor, reason in worker.uncompared.items():
        yield Difference(name, worker.rank, tensor, f"cannot be compared with the checkpoint: {reason}")
    if "" in worker.uncompared:
        return
    if served and digest.manifest(served.values()) == digest.manifest(checkpoint.values()):
        return
    for tensor in sorted(served.keys() | checkpoint.keys()):
        if tensor in ignored and not (tensor in served and tensor in checkpoint):
            continue
        if tensor not in served:
            yield Difference(name, worker.rank, tensor, "is in the checkpoint but was never applied")
        elif tensor not in checkpoint:
            yield Difference(name, worker.rank, tensor, "is not in the checkpoint")
        elif (problem := _unlike(served[tensor], checkpoint[tensor])) is not None:
            yield Difference(name, worker.rank, tensor, problem)


def _unlike(served: tuple[TensorMeta, int], expected: tuple[TensorMeta, int]) -> str | None:
    (meta, value), (other, other_value) = served, expected
    if meta.dtype != other.dtype:
        return f"was applied as {meta.dtype}, the checkpoint has {other.dtype}: values cannot be compared"
    if meta.shape != other.shape:
        return f"was applied with shape {list(meta.shape)}, the checkpoint has {list(other.shape)}"
    return None if value == other_value else "differs from the one in the checkpoint"
