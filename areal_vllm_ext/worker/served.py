"""What a worker serves: digests of the checkpoint tensors that were applied last, and of the live tensors they became.

The digests after a commit are what later ones are compared with: weights change by commits only, so whatever differs was
damaged. They are taken while the engine generates already, on a thread of their own, so that no pause is longer for them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import threading
from typing import TYPE_CHECKING, Any

import torch

from ..integrity import checkpoint, digest
from ..integrity.digest import Contents
from ..protocol import WorkerWeights
from .load import proof

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

logger = logging.getLogger("vllm.areal_vllm_ext")


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """For threads beside the engine's: what they have the device do does not wait for the engine's steps, nor these for it."""
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else contextlib.nullcontext()


# After a commit; the engine runs again by then.
_REMEMBER_SECONDS = 0.2
_AT_EXIT_SECONDS = 5.0
# Of threads that read the live weights.
LOOK = "areal-digest"


@atexit.register
def _end_looks() -> None:
    """Python ends a thread that is inside of torch by ending the process (``terminate called without an active exception``)."""
    looks = [thread for thread in threading.enumerate() if thread.name == LOOK]
    for look in looks:
        if isinstance(look, threading.Timer):
            look.cancel()
    for look in looks:
        look.join(_AT_EXIT_SECONDS)


class WeightsChanged(RuntimeError):
    """A commit was under way meanwhile: ask again."""


class Served:
    """The weights of one worker."""

    def __init__(self, worker: Any, model: tuple[str, str | None]) -> None:
        """
        Args:
            worker: vLLM's worker.
            model: path or hub name of the checkpoint that it was started from, and the revision.
        """
        self._worker = worker
        self._model = model
        self._contents: Contents | None = None
        self._after_commit: dict[str, int] = {}
        # What the last commit copied: runs of live memory that must have the digests of the incoming tensors.
        self.copied: dict[str, torch.Tensor] = {}
        self._wrong: tuple[str, ...] = ()
        self._update = ""
        # Told the update's name and the reason where what was applied is not what was received.
        self.damaged: Callable[[str, str], None] = lambda *_: None
        # Whether an update is on its way: what is read and compared meanwhile would hold it up.
        self.busy: Callable[[], bool] = lambda: False
        self._proven: frozenset[str] = frozenset()
        # The manifest of what was applied, once the live weights were looked at.
        self._manifest = ""
        self._slept = False
        # Raised when a switch begins and when it has ended: odd meanwhile.
        self._changes = 0
        self._state = threading.Lock()
        self._taking = threading.Lock()

    # On the worker's own thread

    @contextlib.contextmanager
    def switching(self, contents: Contents, update: str = "") -> Iterator[None]:
        """The body puts weights with these digests into the live model; ``update`` names them."""
        with self._state:
            self._changes += 1
            self._update = update
            self._after_commit, self._wrong, self._manifest = {}, (), ""
            self._contents = {}  # nobody's, should the body fail
            self._slept = False
        try:
            yield
            self._contents = contents
        finally:
            self._changes += 1
        # Not now: in the pause it would take 6 ms from a commit of 16 GB.
        self._remember_later(self._changes)

    def sleeps(self) -> None:
        """vLLM's sleep mode takes the weights' memory, and maybe what was in it: nothing builds on it until a commit."""
        with self._state:
            self._slept, self._manifest = True, ""

    def can_be_proven(self) -> bool:
        """Whether the loader is still to be proven, and all staged weights could be loaded afresh for it. On any thread."""
        return not self._proven and not proof.obstacle(self._worker, ())

    def prove(self, weights: Iterable[tuple[str, torch.Tensor]], *, part: bool = False) -> str:
        """Prove the loader, inside ``switching``: at the first update, and when other tensors come than were proven.

        Args:
            weights: what was loaded; without staging it is gone, and cannot be loaded a second time.
            part: these are not all: others stayed as they were, or only this rank's parts of them were staged.

        Returns:
            why it could not be proven; empty where it is.

        Raises:
            proof.ProofFailed: the live weights are wrong.
        """
        if not isinstance(weights, list):
            return "" if self._proven else "without staging there is nothing left to compare with a fresh load"
        if part:
            return "" if self._proven else "not all weights were staged, so they cannot be loaded afresh"
        names = frozenset(name for name, _ in weights)
        if names == self._proven:
            return ""
        # Asked again with each update, so before anything that costs time in the pause.
        unproven = proof.obstacle(self._worker, weights)
        live = {} if unproven else proof.digests_of_model(self._worker.get_model())
        unproven = unproven or proof.prove(self._worker, weights, live)
        if unproven:
            logger.warning("areal_vllm_ext: not proven that a reload gives what a fresh load gives: %s", unproven)
        else:
            self._proven = names
        self._after_commit = live
        return unproven

    # On other threads

    def base(self) -> tuple[str, Contents]:
        """What was applied last, and its manifest: empty where the live weights are not known to be that."""
        with self._state:
            return (self._manifest, dict(self._contents or {})) if self._manifest else ("", {})

    def has(self, contents: Contents, runs: Mapping[str, torch.Tensor]) -> bool:
        """Whether these are served. What is one of the ``runs`` of live memory is read there; for others all is."""
        read = {name: run for name, run in runs.items() if name in contents}
        values = dict(zip(read, digest.digests_of(read.values()), strict=True))
        if any(contents[name][1] != value for name, value in values.items()):
            return False
        if len(read) == len(contents):
            return True
        live, after_commit, _ = self._take()
        return live == after_commit

    def describe(self, contents: bool) -> WorkerWeights:
        """Digests of what is served now. Takes as long as reading all weights once; with ``contents`` of weights that the
        worker was started with, as long as reading the checkpoint's files.

        Raises:
            WeightsChanged: a commit came in between.
        """
        live, after_commit, applied = self._take()
        if contents and applied is None:
            applied, manifest = checkpoint.contents(checkpoint.folder(*self._model)), ""
        else:
            manifest = digest.manifest(applied.values()) if applied else ""
        return WorkerWeights(
            rank=self._worker.rank,
            layout=self._layout(),
            manifest=manifest,
            live=live,
            changed=(*(name for name, value in live.items() if after_commit.get(name) != value), *self._wrong),
            contents=tuple(applied.values()) if contents and applied else (),
        )

    def _take(self) -> tuple[dict[str, int], dict[str, int], Contents | None]:
        """Live digests, those after the last commit, and what was applied then: all of one commit."""
        changes = self._changes
        with self._taking:
            try:
                live = proof.digests_of_model(self._worker.get_model())
            except Exception:
                if changes == self._changes and changes % 2 == 0:
                    raise
                live = {}
        with self._state:
            if changes != self._changes or changes % 2:
                raise WeightsChanged("the weights were switched meanwhile")
            self._after_commit = self._after_commit or live
            return live, self._after_commit, self._contents

    def _remember_later(self, changes: int) -> None:
        later = threading.Timer(_REMEMBER_SECONDS, self._remember, (changes,))
        later.name, later.daemon = LOOK, True
        later.start()

    def _remember(self, changes: int) -> None:
        if self._slept or changes != self._changes:
            return
        if self.busy():
            self._remember_later(changes)  # if it is given up; else there is another commit to look at
            return
        try:
            with beside(self._worker.device):
                if not self._after_commit:
                    self._take()
                self._compare()
        except WeightsChanged:
            pass  # the next commit has its own
        except Exception:
            logger.warning("areal_vllm_ext: no digests of the live weights could be taken", exc_info=True)

    def _compare(self) -> None:
        """Whether what was applied is what was received."""
        changes, contents, copied, update = self._changes, self._contents, self.copied, self._update
        values = dict(zip(copied, digest.digests_of(copied.values()), strict=True))
        with self._state:
            if changes != self._changes or changes % 2 or not contents:
                return
            self._wrong = tuple(
                name for name, value in values.items() if name in contents and contents[name][1] != value
            )
            self._manifest = "" if self._wrong or self._slept else digest.manifest(contents.values())
        if self._wrong:
            reason = f"{len(self._wrong)} tensors were not applied as they were received ({', '.join(self._wrong[:5])})"
            logger.error("areal_vllm_ext: %s: update this engine again, and report it", reason)
            self.damaged(update, reason)

    def _layout(self) -> str:
        """Workers with an equal layout hold equal live tensors: the same part of the model, for the same kind of device."""
        parallel = self._worker.vllm_config.parallel_config
        device: torch.device = self._worker.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        parts = [f"rank {self._worker.rank}", f"tp {parallel.tensor_parallel_size}"]
        parts += [f"pp {parallel.pipeline_parallel_size}", kind, str(self._worker.vllm_config.model_config.dtype)]
        if parallel.enable_expert_parallel and parallel.data_parallel_size > 1:
            parts.append(f"ep {parallel.data_parallel_rank} of {parallel.data_parallel_size}")
        return ", ".join(parts)
