"""What a worker serves: digests of the checkpoint tensors of the last commit, and of the live tensors that they became.

Later digests are compared with those taken after a commit. Weights change only by commits, so a difference is damage. The
digests are taken beside generation, on a thread of their own, so that no pause is longer for them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..integrity import digest
from ..integrity.digest import Contents
from ..protocol import WorkerWeights
from . import background
from .load import proof
from .load.drafter import PREFIX, is_prefixed, together
from .load.written import wrong_in
from .residency import NotResident
from .startup import StartupCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    from .load.drafter import DrafterWorker
    from .load.written import Written
    from .residency import Residency

logger = logging.getLogger("vllm.areal_vllm_ext")

# From a commit until its weights are read: the engine generates again by then.
_READ_AFTER_SECONDS = 0.2


class WeightsChanged(RuntimeError):
    """A commit ran while the weights were read; ask again."""


class _Reading(NamedTuple):
    """Digests of live tensors, now and after the last commit; what is not as that commit left it; and its contents."""

    live: dict[str, int]
    after_commit: dict[str, int]
    wrong: list[str]
    committed: Contents | None


class Served(NamedTuple):
    """What is live since a commit: digests of parameters and the checkpoint's tensors behind them.

    ``contents`` is None for what the worker was started with. ``compared``: all of it is known to be live. ``changes``: see
    ``LiveWeights.unchanged``.
    """

    changes: int
    digests: dict[str, int]
    contents: Contents | None
    compared: bool


class LiveWeights:
    """The weights of one worker.

    Attributes:
        on_damage: called with the update and the reason if what was committed is not what was received.
        is_busy: whether an update is in progress, which reading the weights would slow down.
    """

    def __init__(
        self,
        worker: Any,
        residency: Residency,
        model: tuple[str, str | None],
        drafter: DrafterWorker | None = None,
    ) -> None:
        """
        Args:
            worker: vLLM's worker.
            residency: whether its live weights are in memory.
            model: path or hub name of the checkpoint that it was started from, and the revision.
            drafter: the worker's drafter.
        """
        self._worker, self._residency, self._drafter = worker, residency, drafter
        # The drafter's tensors of the last commit that moved it. Their names begin with ``draft.``.
        self._draft: Contents = {}
        self._startup = StartupCheckpoint(*model)
        self._contents: Contents | None = None
        self._after_commit: dict[str, int] = {}
        # The live memory that a load plan wrote, which must still be what was received.
        self._written: Written = {}
        self._wrong: tuple[str, ...] = ()
        # The functions of layers whose weights are packed. A packed weight changes only with its function.
        self._linears = proof.packed_functions(self.model)
        # Whether a fresh load proved what the last commit made, and the digests of it were taken in the same pause.
        self._compared_with_fresh = False
        self._update = ""
        self.on_damage: Callable[[str, str], None] = lambda *_: None
        self.is_busy: Callable[[], bool] = lambda: False
        self._proven: frozenset[str] = frozenset()
        # The manifest of what was committed; empty until the live weights were read, and after a sleep.
        self._manifest = ""
        self._slept = False
        # Incremented when a commit begins and when it ends, so it is odd during a commit.
        self._changes = 0
        self._state = threading.Lock()
        self._reading = threading.Lock()
        self._read_later(self._changes)  # of the weights that it starts with

    @property
    def model(self) -> torch.nn.Module:
        """The live model, and its drafter."""
        return together(self._worker.get_model(), self._drafter)

    # On the worker's own thread

    @contextlib.contextmanager
    def committing(self, contents: Contents | None, update: str = "", *, draft: bool = False) -> Iterator[None]:
        """Mark the body as the commit of ``update``, which makes weights with these digests live.

        Args:
            contents: the digests of the base weights.
            update: its id.
            draft: whether it moves the drafter too.
        """
        with self._state:
            self._changes += 1
            self._update = update
            self._after_commit, self._wrong, self._manifest = self._of_drafter(draft), (), ""
            self._draft = {} if draft else self._draft
            self._contents = {}  # unknown, if the body fails
            self._compared_with_fresh = self._slept = False
        try:
            yield
            self._contents = contents
            if (
                self._worker.device.type == "cpu"
            ):  # elsewhere no backend packs, and this walks over all modules in the pause
                self._linears = proof.packed_functions(self.model)
        finally:
            self._changes += 1
        # Not now: for 16 GB it would lengthen the pause by 6 ms.
        self._read_later(self._changes)

    def begin_foreign_load(self) -> None:
        """Note that something else than a commit loads into the live model, until ``end_foreign_load``."""
        with self._state:
            self._changes += 1
            self._update, self._contents, self._draft, self._written = "", {}, {}, {}
            self._after_commit, self._wrong, self._manifest = {}, (), ""
            self._compared_with_fresh, self._proven = False, frozenset()

    def end_foreign_load(self) -> None:
        """Note that the live model is whole again."""
        self._linears = proof.packed_functions(self.model)
        self._changes += 1

    def set_written(self, written: Written | None, kept: Iterable[str] = ()) -> None:
        """Say, inside ``committing``, which live memory the commit wrote.

        Args:
            written: by checkpoint tensor; None if no load plan knows it.
            kept: the tensors that stay as they were.
        """
        before = self._written
        base = {} if written is None else {name: before[name] for name in kept if name in before} | written
        self._written = base | {name: runs for name, runs in before.items() if name in self._draft}

    def set_draft(
        self, contents: Contents, digests: Mapping[str, int] | None = None, written: Written | None = None
    ) -> None:
        """Say, inside ``committing`` and before ``set_written``, what is live in the drafter. All names begin with ``draft.``.

        Args:
            contents: the checkpoint's tensors.
            digests: of the live tensors, where they are known.
            written: the live memory that was written, where a load plan knows it.
        """
        self._draft = contents
        self._after_commit = self._after_commit | dict(digests or {})
        self._written = {name: runs for name, runs in self._written.items() if not is_prefixed(name)} | (written or {})

    def _of_drafter(self, moved: bool) -> dict[str, int]:
        """Return the digests of the drafter's own tensors that the next commit leaves as they are."""
        drafter = self._drafter
        if moved or drafter is None:
            return {}
        return {
            name: value
            for name, value in self._after_commit.items()
            if is_prefixed(name) and drafter.is_own(name.removeprefix(PREFIX))
        }

    def forget_base(self, *, lost: bool) -> None:
        """Build no update on the live weights until a commit.

        Args:
            lost: what is in them is discarded, also what no update brings. So the next commit is compared with a fresh load.
        """
        with self._state:
            self._slept, self._manifest = True, ""
        if lost:
            self._proven = frozenset()

    def can_be_proven(self) -> bool:
        """Return whether the loader is not proven yet and there is room for the proof. Safe on any thread."""
        return not self._proven and not proof.obstacle(self._worker, ())

    def set_proven(self, names: Iterable[str], digests: dict[str, int]) -> None:
        """Say, inside ``committing``, that the live tensors are those of a fresh load.

        Args:
            names: of the checkpoint tensors that were loaded.
            digests: of the fresh load's tensors, taken before the commit.
        """
        self._proven, self._compared_with_fresh = frozenset(names), True
        self._after_commit = self._after_commit | digests

    def set_fetched(self, digests: dict[str, int], *, compared: bool) -> None:
        """Say, inside ``committing``, that the live tensors are those of a peer.

        Args:
            digests: of the live tensors.
            compared: whether the peer's were known to be the checkpoint's tensors.
        """
        self._after_commit, self._compared_with_fresh = digests, compared

    def prove(self, weights: Sequence[tuple[str, torch.Tensor]], *, partial: bool = False) -> str:
        """Prove the loader, inside ``committing``: at the first update, and when other tensors arrive than were proven.

        Args:
            weights: what was loaded.
            partial: these are not all weights, because others are kept or only this rank's slices were staged.

        Returns:
            why it could not be proven; empty if it is proven.

        Raises:
            proof.ProofFailed: the live weights are wrong.
        """
        if partial:
            return "" if self._proven else "not all weights were staged, so they cannot be loaded afresh"
        names = frozenset(name for name, _ in weights)
        if names == self._proven:
            if self._written.keys() <= self._draft.keys():
                # Reloaded layer by layer: nothing tells later what the live weights must be, unless it is read now.
                self._after_commit = self._after_commit | proof.digests_of_model(self._worker.get_model())
                self._compared_with_fresh = True  # by the loader's proof
            return ""
        # Checked again with each update, so before anything that costs time in the pause.
        unproven = proof.obstacle(self._worker, weights)
        live = {} if unproven else proof.digests_of_model(self._worker.get_model())
        unproven = unproven or proof.prove(self._worker, weights, live)
        if unproven:
            logger.warning("areal_vllm_ext: not proven that a reload gives what a fresh load gives: %s", unproven)
        else:
            self._proven = names
            self._compared_with_fresh = True
        self._after_commit = self._after_commit | live
        return unproven

    # On other threads

    def base(self) -> tuple[str, Contents]:
        """Return manifest and contents of the last commit; both empty if the live weights are not known to be these."""
        with self._state:
            return (self._manifest, dict(self._contents or {})) if self._manifest else ("", {})

    def served(self) -> Served:
        """Return what is live, for another worker to serve it too.

        Raises:
            WeightsChanged: a commit runs, or its result has not been read yet; ask again.
            RuntimeError: what is live is not what was received.
            NotResident: the engine sleeps.
        """
        if not self._after_commit:
            self._read()
        parameters = frozenset(proof.parameter_names(self.model))
        with self._state:
            contents, unread = self._contents, not (self._manifest or self._slept)
            if self._wrong or contents == {}:
                raise RuntimeError("its live weights are not what it received")
            if self._changes % 2 or not self._after_commit or (contents is not None and unread):
                raise WeightsChanged("its live weights have not been read since its last commit")
            digests = {name: value for name, value in self._after_commit.items() if name in parameters}
            compared = contents is not None and not self._uncompared(contents)
            return Served(self._changes, digests, None if contents is None else contents | self._draft, compared)

    def unchanged(self, changes: int) -> bool:
        """Return whether no commit has begun since ``served`` gave ``changes``."""
        return self._changes == changes

    def started_with(self, names: Container[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors of the checkpoint that the worker was started from.

        Raises:
            NotACheckpoint: its files are not, or no longer, those that the worker loaded.
        """
        return self._startup.read(names)

    def as_committed(self, contents: Contents) -> list[str]:
        """Return those of ``contents``, read by ``started_with``, that commits have changed since."""
        with self._state:
            committed = self._contents
        return [] if committed is None else [name for name, one in contents.items() if committed.get(name) != one]

    def holds(self, contents: Contents) -> bool:
        """Return whether these checkpoint tensors of the last commit are still live."""
        written = {name: self._written[name] for name in contents if name in self._written}
        with self._residency.access():
            if wrong_in(written):
                return False
        if len(written) == len(contents):
            return True
        reading = self._read()
        return reading.live == reading.after_commit

    def describe(self, contents: bool) -> WorkerWeights:
        """Return digests of what is served now.

        It takes as long as reading all weights twice; with ``contents`` of the weights that the worker was started with, as
        long as reading the checkpoint's files.

        Raises:
            WeightsChanged: a commit ran meanwhile.
            NotResident: the engine sleeps.
        """
        changes = self._changes
        live, after_commit, wrong, committed = self._read()
        manifest = digest.manifest(committed.values()) if committed else ""
        uncompared: dict[str, str] = {}
        if contents and committed is None:
            committed, reason = self._startup.contents()
            uncompared = {"": reason} if reason else {}
        elif contents and committed:
            uncompared = self._uncompared(committed)
        if changes != self._changes:
            raise WeightsChanged("a commit changed the weights while they were read")
        changed = (*(name for name, value in live.items() if after_commit.get(name) != value), *wrong)
        return WorkerWeights(
            rank=self._worker.rank,
            layout=self.layout,
            manifest=manifest,
            live=live,
            changed=tuple(dict.fromkeys(changed)),
            contents=(*committed.values(), *self._draft.values()) if contents and committed else (),
            uncompared=uncompared,
        )

    def _uncompared(self, committed: Contents) -> dict[str, str]:
        """Return the checkpoint tensors of which nothing tells whether they are live, with the reason."""
        if self._compared_with_fresh:
            return {}
        reason = "no load plan, and no comparison with a fresh load, tells which live memory it is in"
        # What the base model ignores is compared as the drafter's.
        return {name: reason for name in committed if name not in self._written and PREFIX + name not in self._draft}

    def _read(self) -> _Reading:
        """Read the live weights, all of one commit.

        Raises:
            WeightsChanged: a commit ran meanwhile.
            NotResident: the engine sleeps.
        """
        changes, live, wrong = self._changes, dict[str, int](), list[str]()
        with self._reading, self._residency.access():
            try:
                live = proof.digests_of_model(self.model)
                wrong = wrong_in(self._written)
                linears = proof.packed_functions(self.model)
                wrong += [name for name, linear in linears.items() if self._linears.get(name) is not linear]
            except Exception:
                if changes == self._changes and changes % 2 == 0:
                    raise
        with self._state:
            if changes != self._changes or changes % 2:
                raise WeightsChanged("a commit changed the weights while they were read")
            self._after_commit = live | self._after_commit
            return _Reading(live, self._after_commit, wrong, self._contents)

    def _read_later(self, changes: int) -> None:
        background.run_later(_READ_AFTER_SECONDS, self._read_after_commit, changes)

    def _read_after_commit(self, changes: int) -> None:
        if self._slept or changes != self._changes:
            return
        if self.is_busy():
            self._read_later(changes)  # needed only if that update is given up
            return
        try:
            with background.on_side_stream(self._worker.device):
                reading = self._read()
        except (WeightsChanged, NotResident):
            return  # a commit is to come, and its weights are read then
        except Exception:
            if self._worker.get_model() is not None:  # else vLLM has shut the worker down
                logger.warning("areal_vllm_ext: no digests of the live weights could be taken", exc_info=True)
            return
        with self._state:
            if changes != self._changes or not reading.committed:
                return
            # Only parameters: generation may change buffers, such as the scales of a KV cache.
            weights = proof.parameter_names(self.model)
            differ = (name for name in weights if reading.live.get(name) != reading.after_commit.get(name))
            self._wrong = tuple(dict.fromkeys((*reading.wrong, *differ)))
            self._manifest = "" if self._wrong or self._slept else digest.manifest(reading.committed.values())
        if self._wrong:
            named = ", ".join(self._wrong[:5])
            reason = f"{len(self._wrong)} live tensors differ from what was received ({named})"
            logger.error("areal_vllm_ext: %s: update this engine again, and report it", reason)
            self.on_damage(self._update, reason)

    @property
    def layout(self) -> str:
        """Name what of the model this worker holds. Workers of an equal layout hold equal live tensors."""
        parallel = self._worker.vllm_config.parallel_config
        device: torch.device = self._worker.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        parts = [f"rank {self._worker.rank}", f"tp {parallel.tensor_parallel_size}"]
        parts += [f"pp {parallel.pipeline_parallel_size}", kind, str(self._worker.vllm_config.model_config.dtype)]
        if parallel.enable_expert_parallel and parallel.data_parallel_size > 1:
            parts.append(f"ep {parallel.data_parallel_rank} of {parallel.data_parallel_size}")
        if self._drafter is not None:
            parts.append("with a drafter")
        return ", ".join(parts)
