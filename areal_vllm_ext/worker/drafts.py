"""The drafter of an engine that speculates: what it takes, and its new weights in one update, from the first to the commit."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ..integrity import checkpoint, digest
from ..protocol import DraftWeights, Weights
from ..transport.buckets import first_non_finite, total_bytes
from .load.drafter import PREFIX, DrafterWorker
from .load.dry_load import DryModel
from .load.intake import Intake
from .load.loader import Loader
from .load.shadow import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ..integrity.digest import Contents
    from .load.plan import PlanRun
    from .load.shadow import BuildOptions, Shadow
    from .load.written import Written

_NO_DRAFTER = (
    "nothing was applied: this engine has no drafter whose weights can be updated: leave draft=... out, or start the engine "
    "with --speculative-config and a model"
)


class Drafter:
    """The drafter of one worker.

    Attributes:
        worker: the worker, as the loading of its drafter sees it.
        loader: loads staged weights into the drafter.
        intake: what it takes; set by ``learn``.
        discarded: why its weights are gone until an update brings new ones; empty if they are not.
    """

    def __init__(self, worker: DrafterWorker) -> None:
        """To be called on the worker's own thread before it computes."""
        self.worker, self.loader = worker, Loader(worker)
        self.intake = Intake(Weights(tensors=()))
        self.discarded = ""
        self._dry = DryModel.of(worker)

    @classmethod
    def of(cls, worker: Any) -> Drafter | None:
        """Return the drafter of vLLM's worker; None if it has none."""
        found = DrafterWorker.of(worker)
        return cls(found) if found is not None else None

    def learn(self) -> DraftWeights | None:
        """Find out what the drafter takes. Returns it; None if that cannot be known, so that nothing is taken."""
        config, dry = self.worker.model_config, self._dry
        self._dry = None
        if dry is None:
            return None
        intake = Intake.of((config.model, config.revision), config, dry)
        if not intake.known:
            return None
        with_base = self.worker.in_base_checkpoint
        if with_base:  # the rest is the base model's
            weights = intake.weights
            intake = Intake(msgspec.structs.replace(weights, tensors=weights.required, optional=(), ties={}))
        self.intake = intake
        return DraftWeights.of(intake.weights, with_base=with_base)


class CommittedDraft(NamedTuple):
    """What a commit made live in a drafter. All names begin with ``draft.``.

    Attributes:
        contents: the checkpoint's tensors.
        digests: of the live tensors, where they are known.
        written: the live memory that a load plan wrote.
    """

    contents: Contents
    digests: dict[str, int]
    written: Written


class StagedDraft:
    """What one update brings for the drafter."""

    def __init__(self, drafter: Drafter | None) -> None:
        self._drafter = drafter
        self._tensors: dict[str, torch.Tensor] = {}
        self._contents: Contents = {}
        self._run: PlanRun | None = None
        self._shadow: Shadow | None = None
        self._voted = False
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether the update moves the drafter, and this worker can."""
        return self._voted

    def add(self, tensors: Mapping[str, torch.Tensor], contents: Contents, *, unchecked: bool) -> None:
        """Stage tensors that have arrived and were compared with ``contents``.

        Raises:
            ValueError: the drafter cannot load one of them.
        """
        if self._drafter is None:
            raise ValueError(_NO_DRAFTER)
        known = self._drafter.intake.known
        for meta, _ in contents.values():
            if problem := checkpoint.mismatch_reason(meta, known, _dtypes(self._drafter)):
                raise ValueError(f"draft: {problem}")
        if unchecked and (name := first_non_finite(tensors.items())):
            raise ValueError(f"draft: {name} holds NaN or infinite values")
        with self._lock:
            self._tensors.update(tensors)
            self._contents.update(contents)

    def announced_bytes(self, nbytes: int, base: Intake, dtype: str) -> int:
        """Return how many of the announced ``nbytes`` come for the drafter: what is more than the base model takes.

        Args:
            nbytes: most bytes that the update brings.
            base: what the base model takes.
            dtype: in which it computes.
        """
        if self._drafter is None:
            return 0
        own = total_bytes(self._drafter.intake.required.values(), dtype)
        return min(own, max(nbytes - total_bytes(base.required.values(), dtype), 0))

    def takes(self, name: str) -> bool:
        """Return whether a tensor of the base model's checkpoint is the drafter's too."""
        drafter = self._drafter
        return drafter is not None and drafter.worker.in_base_checkpoint and name in drafter.intake.known

    def vote(self, options: Callable[[], BuildOptions], *, wanted: bool) -> str:
        """Check that all is here, and build it. Returns its manifest; empty if the update leaves the drafter as it is.

        Args:
            options: returns how the new weights are built.
            wanted: whether the update brings a drafter.

        Raises:
            RuntimeError: the drafter's weights are gone.
            ValueError: tensors are missing, or the drafter does not take them.
        """
        drafter = self._drafter
        if not wanted:
            if drafter is not None and drafter.discarded:
                raise RuntimeError(f"nothing was applied: {drafter.discarded}: send the drafter too (draft=...)")
            return ""
        if drafter is None:
            raise ValueError(_NO_DRAFTER)
        if problem := checkpoint.missing_reason(self._contents, drafter.intake.required):
            raise ValueError(f"nothing was applied: draft: {problem}")
        self._run = self._planned(drafter)
        if self._run is None:
            try:
                self._shadow, why = drafter.loader.build_shadow(list(self._tensors.items()), self._contents, options())
            except Refused as refusal:
                raise ValueError(f"nothing was applied: draft: {refusal}") from None
            if self._shadow is None:
                raise ValueError(f"nothing was applied: the drafter cannot be built beside the live one: {why}")
        ready = self._run or self._shadow
        assert ready is not None
        ready.warm()
        self._voted = True
        return digest.manifest(self._contents.values())

    def _planned(self, drafter: Drafter) -> PlanRun | None:
        """Return the run of a load plan that brings all of it; None without one."""
        if (run := drafter.loader.begin_run()) is None:
            return None
        run.add(run.plan.copies_of(self._tensors), {name: value for name, (_, value) in self._contents.items()})
        return run if run.complete else None

    def check_fits(self) -> None:
        """Raise RuntimeError if the live drafter is no longer the one that was voted on. Before anything is touched."""
        drafter = self._drafter
        if not self._voted or drafter is None:
            return
        if self._run is not None:
            fits = drafter.loader.fits(self._run)
        else:
            fits = self._shadow is not None and drafter.loader.fits_shadow(self._shadow)
        if not fits:
            raise RuntimeError("the live drafter has moved since the vote: nothing was applied; send again")

    def commit(self) -> CommittedDraft:
        """Make it live. Runs on the worker's own thread while its engine is paused."""
        drafter, weights = self._drafter, list(self._tensors.items())
        assert drafter is not None
        digests: dict[str, int] = {}
        written: Written | None
        if self._run is not None:
            written = drafter.loader.load(weights, self._run, planned=True)
        else:
            assert self._shadow is not None
            written = drafter.loader.load_shadow(self._shadow, weights)
            made = self._shadow.digests.items()  # what is shared moves with the base weights
            digests = {PREFIX + name: value for name, value in made if drafter.worker.is_own(name)}
        drafter.discarded = ""
        contents = checkpoint.as_drafters(self._contents)
        return CommittedDraft(contents, digests, {PREFIX + name: runs for name, runs in (written or {}).items()})

    def free(self) -> None:
        """Free the staging."""
        shadow, self._shadow, self._run, self._tensors = self._shadow, None, None, {}
        if shadow is not None:
            shadow.free()


def _dtypes(drafter: Drafter) -> tuple[str, ...]:
    return (str(drafter.worker.model_config.dtype).removeprefix("torch."),)
