"""One update in this worker: what has arrived, whether it is complete and right, and the vote.

It runs no thread of its own. The threads of its senders (``sender_stream.py``) call it.
"""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING

import torch

from .. import errors
from ..errors import NotACheckpoint
from ..integrity import checkpoint, digest
from ..observability.spans import SpanRecorder
from ..protocol import WorkerDone
from ..transport import host_memory
from ..transport.base import Cancelled
from ..transport.buckets import UnpackedBucket, contents_of, first_non_finite
from . import staging
from .adapters.staged import StagedAdapters
from .drafts import StagedDraft
from .load.shadow import BuildOptions, Refused
from .pace import Pace
from .residency import NotResident

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..integrity.digest import Contents
    from ..protocol import Begin, Prepare, Segment
    from ..transport.base import Source
    from .context import WorkerContext
    from .load.plan import CopyBatch, PlanRun
    from .load.shadow import Shadow
    from .staging import Buckets, Place

# Buckets of one sender that are in flight at once.
IN_FLIGHT = 2
# Tensors that arrive without buckets are checked together, up to these bytes or this number.
_BATCH_BYTES, _BATCH_TENSORS = 64 << 20, 256


class StagedUpdate:
    """What one update has staged.

    Attributes:
        tensors: staged tensors by name. Without those of which only this rank's slices are kept.
        manifest: of each tensor that arrived or is kept: what it is, and the digest of its bytes.
        run: the load plan's run, to which tensors are added; None without a plan.
        shadow: the new weights as kernels read them; None where a plan copies them, or the commit reloads.
        no_shadow: why there is no shadow, where one was wanted.
        buckets: unpacked buckets whose memory the next update may use, if this one asked to keep it.
        adapters: the LoRA adapters that arrived.
        draft: what arrived for the drafter.
        received: how many buckets have arrived, by sender.
        stamps: where the trainer shows whether it still shares its memory, by the value that means yes.
        cancelled: set when the update is given up.
    """

    def __init__(self, context: WorkerContext, begin: Begin, senders: Iterable[int]) -> None:
        self.context, self.begin = context, begin
        self.spans = SpanRecorder(begin.spans)
        self.tensors: dict[str, torch.Tensor] = {}
        self.manifest: Contents = {}
        self.run: PlanRun | None = None
        self.shadow: Shadow | None = None
        self.no_shadow = ""
        self.buckets: Buckets = {}
        self.adapters = StagedAdapters()
        self.draft = StagedDraft(context.drafter)
        self.received = dict.fromkeys(senders, 0)
        self.stamps: dict[int, torch.Tensor] = {}
        self.cancelled = threading.Event()
        self._deadline = monotonic() + begin.timeout
        self._kept = context.memory.take_kept()
        # The base of a delta update: contents and manifest of the live weights, if this worker can accept changed tensors only.
        self._base: Contents = {}
        self.base_manifest = ""
        # Digests of what arrived under second names of tied tensors.
        self._second_names: dict[str, int] = {}
        # Whether only this rank's slices of each bucket are kept.
        self._slices_only = False
        self._sources: dict[int, Source] = {}
        self._opening = threading.Lock()
        self._place: Place | None = None

    @property
    def seconds_left(self) -> float:
        return self._deadline - monotonic()

    def report(self, step: str, error: str = "", manifest: str = "") -> None:
        """Tell the engine the outcome of a step."""
        self.context.report(
            WorkerDone(update=self.begin.update, rank=self.context.rank, step=step, error=error, manifest=manifest)
        )

    def free(self) -> None:
        """Free the staging. The connections to the senders stay for the next update."""
        self.tensors, self.run, self.stamps = {}, None, {}
        self.buckets, self._kept = {}, {}
        self.adapters.free()
        shadow, self.shadow = self.shadow, None
        self.context.memory.give_back_later(shadow.free if shadow is not None else None)
        if self.draft:
            self.context.memory.give_back_later(self.draft.free)

    # Begin

    def add_source(self, sender: int, source: Source) -> bool:
        """Add an opened source; the last one makes all ready to receive.

        Returns:
            whether this was the last.

        Raises:
            RuntimeError: there is no room to stage.
            NotResident: the live weights are not in memory.
        """
        context = self.context
        with self._opening:
            self._sources[sender] = source
            if len(self._sources) < len(self.received):
                return False
            self.run = context.loader.begin_run()
            self._check_resident(planned=self.run is not None)
            if self.run:
                if not self.run.plan.packings:  # packed weights cannot be compared with what they were
                    self.base_manifest, self._base = context.live_weights.base()
                self._slices_only = self.run.plan.of_a_shard and not context.live_weights.can_be_proven()
            nbytes, of_shard = self._needed()
            device = context.device
            beside = context.loader.shadow_room() if self.run is None and device.type != "cpu" else 0
            self._place = staging.choose(self.begin.staging, nbytes, of_shard, device, beside)
            # Staging in host memory for a GPU keeps whole tensors.
            self._slices_only = self._slices_only and (self._place == "device" or device.type == "cpu")
            return True

    def _needed(self) -> tuple[int, int]:
        """Return the bytes that staging still lacks: for all that arrives, and for what stays on the worker's device."""
        sources = self._sources.values()
        asked = self.begin.staging
        of_draft = self.draft.announced_bytes(asked.nbytes, self.context.intake, self.context.dtype)
        nbytes = of_shard = asked.nbytes or max(source.nbytes for source in sources)
        if all(source.sharing is not None and source.sharing.in_place for source in sources):
            nbytes = of_shard = of_draft
        elif self._slices_only and self.run and asked.bucket:
            # The buckets in flight, and one that is checked. The drafter's are kept whole.
            in_flight = len(sources) * (IN_FLIGHT + 1) * asked.bucket
            of_shard = min(nbytes, self.run.plan.slices_nbytes + in_flight + of_draft)
        kept = sum(piece.memory.numel() for piece in self._kept.values())
        return max(nbytes - kept, 0), max(of_shard - kept, 0)

    # Buckets

    def buffer(
        self, key: tuple[int, int], segments: tuple[Segment, ...], nbytes: int, device: torch.device
    ) -> tuple[UnpackedBucket | None, torch.Tensor]:
        """Return memory for an arriving bucket.

        Args:
            key: the bucket's sender and index.
            segments: its layout.
            nbytes: its size.
            device: where it arrives.

        Returns:
            the unpacked bucket of the last update that lies there, if it was kept and has the same layout; and the memory.
        """
        kept = self._kept.pop(key, None)
        if kept is not None and (kept.segments, kept.memory.numel(), kept.memory.device) == (segments, nbytes, device):
            return kept, kept.memory
        del kept
        if device == self.context.device:
            return None, self.context.memory.pool.empty(nbytes)
        return None, host_memory.zeros(nbytes)

    def put(self, buffer: torch.Tensor) -> torch.Tensor:
        """Return ``buffer`` where this update stages."""
        assert self._place is not None
        return staging.put(buffer, self._place, self.context.device)

    def add(self, bucket: UnpackedBucket, contents: Contents, *, unchecked: bool, shared: bool = False) -> bool:
        """Check tensors that have arrived, and stage them.

        Args:
            bucket: the tensors.
            contents: what each is, and its digest.
            unchecked: whether the trainer did not check their values.
            shared: whether they lie in the trainer's memory.

        Returns:
            whether their memory is kept as it is, rather than slices of it.

        Raises:
            ValueError: the engine cannot load one of them.
        """
        known, dtypes = self.context.intake.known, (self.context.dtype,)
        for meta, _ in contents.values() if known else ():
            if known.get(meta.name) != meta and (problem := checkpoint.mismatch_reason(meta, known, dtypes)):
                raise ValueError(problem)
        if unchecked and (name := first_non_finite(bucket.tensors.items())):
            raise ValueError(f"{name} holds NaN or infinite values")
        self.manifest.update(contents)
        if (run := self.run) is None:
            self.tensors.update(bucket.tensors)
            return True
        if bucket.copies is None or bucket.copies.plan is not run.plan:
            bucket.copies = run.plan.copies_of(bucket.tensors)
        copies: CopyBatch | None = bucket.copies
        digests = {name: value for name, (_, value) in contents.items()}
        if self._slices_only and not shared and run.fits and copies is not None:
            run.partial = True
            run.add(copies.moved(self.context.memory.pool.empty), digests)
            return False
        self.tensors.update(bucket.tensors)
        if copies is not None and copies.across and self._has_room(sum(one.nbytes for _, one in copies.across)):
            copies = copies.moved(self.context.memory.pool.empty, across=True)
            if self.context.device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the commit reads on another stream
        run.add(copies, digests)
        return True

    def _has_room(self, nbytes: int) -> bool:
        """Return whether this worker's device has room for ``nbytes`` beside what is staged."""
        return staging.fits(nbytes * self.begin.staging.on_device, self.context.device)

    # The vote

    def vote(self, order: Prepare) -> str:
        """Check that all units are here. Returns their manifest.

        Raises:
            RuntimeError: buckets, or the base of a delta update, are missing.
            ValueError: tensors are missing, or do not fit this engine.
            NotResident: the live weights are not in memory.
        """
        manifest = self._vote_weights(order) if order.units.weights else ""
        for number in self._sources:
            self._check_arrived(number, order)
        draft = self.draft.vote(self._build_options, wanted=order.units.draft)
        adapters = self.adapters.vote(order.units, self.context.adapters, self.context.intake)
        return digest.units_manifest(manifest, adapters, draft)

    def _check_arrived(self, number: int, order: Prepare) -> None:
        if self.received[number] != (sent := order.buckets.get(number, 0)):
            raise RuntimeError(f"{sent} buckets were sent, {self.received[number]} arrived: {errors.SEND_AGAIN}")

    def _vote_weights(self, order: Prepare) -> str:
        """Check that all base weights are here. Returns their manifest. Raises as ``vote`` does."""
        self._check_resident(planned=self.run is not None and self.context.loader.fits(self.run))
        for number, source in self._sources.items():
            for tensors in batches(source.load_all()):
                self.add_loaded(tensors, unchecked=source.unchecked)
            self._check_arrived(number, order)
        if order.base:
            self._keep_unchanged(order.base)
        elif self.run and self.run.partial and not order.kept:
            self._check_run(self.run)
        if order.kept and not order.base:
            self._keep_from_files(order.kept)
        intake = self.context.intake
        if problem := checkpoint.missing_reason(self.manifest, intake.required):
            raise ValueError(problem)
        if problem := intake.broken_tie({name: one for name, (_, one) in self.manifest.items()} | self._second_names):
            raise ValueError(problem)
        planned = self.run is not None and self.run.complete
        if self.context.dry_model and not planned and (refusal := self.context.dry_model.refusal(self.tensors)):
            raise ValueError(f"nothing was applied: {refusal}")
        if not planned:
            self._build_shadow()
        if (ready := self.run if planned else self.shadow) is not None:
            ready.warm()
        return digest.manifest(self.manifest.values())

    def _build_shadow(self) -> None:
        """Build the new weights beside generation. Without a shadow the commit reloads.

        Raises:
            ValueError: the model does not take them.
        """
        context = self.context
        context.memory.free_now()
        try:
            with self.spans.span(f"worker {context.rank}", "build shadow"):
                shadow, self.no_shadow = context.loader.build_shadow(
                    list(self.tensors.items()), self.manifest, self._build_options()
                )
        except Refused as refusal:
            raise ValueError(f"nothing was applied: {refusal}") from None
        self.shadow = shadow
        if shadow is not None:
            self.confirm_shared()

    def _build_options(self) -> BuildOptions:
        context = self.context
        return BuildOptions(
            step=Pace(context.loader.serves, self._check_time),
            timeout=max(self.seconds_left, 0.0),
            access=context.residency.access,
            memory=context.memory.shadows.allocating,
        )

    def _check_time(self) -> None:
        """Raise if the update is given up or its time is over."""
        if self.cancelled.is_set():
            raise Cancelled
        if self.seconds_left < 0:
            raise TimeoutError("the new weights were not loaded in time: raise the update's timeout")

    def _check_resident(self, *, planned: bool) -> None:
        """Refuse weights that are not in memory. ``planned``: a plan fits the model, and knows where each tensor is."""
        residency = self.context.residency
        if reason := residency.asleep_reason() if planned else residency.absent_reason():
            raise NotResident(f"nothing was applied: {reason}")

    def add_loaded(self, tensors: dict[str, torch.Tensor], *, unchecked: bool) -> None:
        """Stage tensors that came without digests, under the trainer's or a file's names. Raises as ``add`` does."""
        intake = self.context.intake
        named = {intake.find(name): tensor for name, tensor in tensors.items()}
        ignored = {name: named.pop(name) for name in tensors if intake.ignores(name)}
        self._second_names |= zip(ignored, digest.digests_of(ignored.values()), strict=True)
        staged = {name: self.put(tensor) for name, tensor in named.items()}
        contents = contents_of(staged)
        if of_drafter := [name for name in staged if self.draft.takes(name)]:
            own = {name: staged[name] for name in of_drafter}
            self.draft.add(own, {name: contents[name] for name in of_drafter}, unchecked=unchecked)
            for name in own.keys() - intake.required.keys():  # the base model ignores it
                del staged[name]
                self.manifest[name] = contents.pop(name)
        self.add(UnpackedBucket((), None, staged), contents, unchecked=unchecked)

    def _keep_unchanged(self, base: str) -> None:
        """Keep the live tensors that did not arrive, after comparing them with the base that the trainer assumes."""
        run, kept = self.run, {name: one for name, one in self._base.items() if name not in self.manifest}
        if run is None or base != self.base_manifest:
            raise RuntimeError(
                "delta update refused: this worker does not have the base that the trainer assumed: "
                + errors.SEND_AGAIN
            )
        run.keep(kept)
        self._check_run(run)
        if not self.context.live_weights.holds(kept):
            raise RuntimeError(
                "delta update refused: tensors that were not sent have changed on this worker: " + errors.SEND_AGAIN
            )
        self.manifest |= kept

    def _keep_from_files(self, names: tuple[str, ...]) -> None:
        """Stage tensors that were not sent, and that are still as this worker was started with, from its files.

        Raises:
            RuntimeError: a commit has changed them, or the files are gone.
        """
        advice = "send all weights once; later updates keep what is not sent where a load plan fits"
        try:
            for tensors in batches(self.context.live_weights.started_with(frozenset(names))):
                self._check_time()
                self.add_loaded(tensors, unchecked=False)
        except NotACheckpoint as error:
            raise RuntimeError(
                f"this engine cannot keep the {len(names)} tensors that were not sent: {error}; {advice}"
            ) from None
        if absent := [name for name in names if name not in self.manifest]:
            raise RuntimeError(f"this engine cannot keep {absent[0]}: its checkpoint does not hold it; {advice}")
        if changed := self.context.live_weights.as_committed({name: self.manifest[name] for name in names}):
            raise RuntimeError(
                f"this engine cannot keep {changed[0]}: an update has changed it since the engine was started; {advice}"
            )
        if self.run and self.run.partial:
            self._check_run(self.run)

    def _check_run(self, run: PlanRun) -> None:
        """Check that the plan can be carried out, where a layerwise load cannot."""
        if not run.complete:
            self.context.loader.forget()  # the next update stages all tensors
            raise RuntimeError(f"other tensors were sent than in the last update: {errors.SEND_AGAIN}")
        if self.context.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # slices may still be copied out of their buckets

    # After the commit

    def confirm_shared(self) -> None:
        """Check, after the staged tensors were read for the last time, that the trainer's memory was shared until now.

        Raises:
            RuntimeError: the trainer revoked it, so it may have changed before it was read.
        """
        if any(int(shown) != stamp for stamp, shown in self.stamps.items()):
            raise RuntimeError("the trainer revoked its memory before it was loaded: update this engine again")


def batches(pairs: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Group tensors, because checking a group costs little for each tensor."""
    batch: dict[str, torch.Tensor] = {}
    nbytes = 0
    for name, tensor in pairs:
        batch[name] = tensor
        nbytes += tensor.nbytes
        if nbytes >= _BATCH_BYTES or len(batch) >= _BATCH_TENSORS:
            yield batch
            batch, nbytes = {}, 0
    if batch:
        yield batch
