"""Load plans: how incoming tensors become the live model by a few batched copies, without vLLM's loaders.

``LoadPlan`` comes from a recorded load (``recorder.py``) and is used by many updates. ``PlanRun`` is its use by one update:
tensors are added to it as they arrive, beside generation, and the commit only copies.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...transport.buckets import aligned, view_as
from .copying import Copies
from .cpu_packing import ATTRIBUTE, IncomingWeight, Packing, pack
from .strides import Copy, StridedSlice, dense_strides, runs_across, storage_key
from .targets import LiveTarget
from .written import Written, written_by

if TYPE_CHECKING:
    from torch.multiprocessing.reductions import StorageWeakRef

    from .copying import Pair

# A rank that needs less than this fraction of the incoming bytes stages only its own slices.
_SHARD_FRACTION = 0.9


class ModelFingerprint:
    """The modules of a model and the addresses of their tensors, to notice that the model is no longer what it was.

    Every update compares it, once in the pause. It is therefore kept as flat lists, which ``map`` walks without a
    step of the interpreter for each tensor.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        own = ((module._parameters, module._buffers, module._modules) for module in model.modules())  # noqa: SLF001
        self._dicts: list[dict[str, Any]] = [held for kinds in own for held in kinds]
        self._lengths = list(map(len, self._dicts))
        entries = [(held, name, one) for held in self._dicts for name, one in held.items()]
        self._owners = [owner for owner, _, _ in entries]
        self._names = [name for _, name, _ in entries]
        self._held = [one for _, _, one in entries]
        self._tensors: list[torch.Tensor] = list({id(one): one for one in self._held if _has_address(one)}.values())
        self._addresses = list(map(torch.Tensor.data_ptr, self._tensors))

    def matches(self, model: torch.nn.Module) -> bool:
        """Return whether ``model`` has the same modules and the same tensors at the same addresses."""
        return (
            model is self._model
            and all(map(operator.eq, map(len, self._dicts), self._lengths))
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._held))
            and all(map(operator.eq, map(torch.Tensor.data_ptr, self._tensors), self._addresses))
        )

    def storages(self) -> set[StorageWeakRef]:
        """Return the identities of the memory that these tensors lie in."""
        return {storage_key(tensor) for tensor in self._tensors}


def _has_address(one: object) -> bool:
    return isinstance(one, torch.Tensor) and not isinstance(one, torch.nn.UninitializedParameter)


class LoadPlan:
    """How incoming tensors become the live model.

    Attributes:
        packings: what is packed for layers on a CPU.
        sources: dtype and shape that each incoming tensor must have.
        copies: by incoming tensor, the live views that it is copied to, each with the slice to copy (None: all of it).
        whole: by incoming tensor that is copied as it is to runs of live memory: these runs.
        nbytes: bytes of live memory that are written.
        slices_nbytes: bytes of the slices of incoming tensors that are read.
        of_a_shard: whether much of what arrives is for other ranks.
    """

    def __init__(
        self,
        targets: Iterable[LiveTarget],
        staged: Mapping[str, torch.Tensor],
        fingerprint: ModelFingerprint,
        packings: tuple[Packing, ...] = (),
    ) -> None:
        """
        Args:
            targets: the storages that are written, checked.
            staged: the incoming tensors of the recorded load.
            fingerprint: of the model, taken after the recorded load.
            packings: what is packed for layers.
        """
        self.packings = packings
        self._packed: dict[str, list[tuple[Packing, Copy]]] = {}
        self.sources = {name: (tensor.dtype, tensor.shape) for name, tensor in staged.items()}
        self.copies: dict[str, list[tuple[torch.Tensor, StridedSlice | None]]] = {name: [] for name in staged}
        self._fingerprint = fingerprint
        self.whole: dict[str, list[torch.Tensor]] = {}
        self.nbytes = self.slices_nbytes = 0
        for target in targets:
            for copy in target.copies:
                view = copy.target_slice.view(target.flat)
                self.nbytes += view.nbytes
                source = staged[copy.source]
                self.slices_nbytes += aligned(copy.source_slice.numel * source.itemsize)
                whole = copy.source_slice == StridedSlice(0, (source.numel(),), (1,)) and copy.target_slice.is_run
                self.copies[copy.source].append((view.view(source.shape), None) if whole else (view, copy.source_slice))
                if whole and source.dtype == view.dtype:
                    self.whole.setdefault(copy.source, []).append(view)
        for packing in packings:
            for copy in packing.copies:
                self.slices_nbytes += aligned(copy.source_slice.numel * staged[copy.source].itemsize)
                self._packed.setdefault(copy.source, []).append((packing, copy))
        self.of_a_shard = self.slices_nbytes < _SHARD_FRACTION * sum(tensor.nbytes for tensor in staged.values())

    def copies_of(self, tensors: Mapping[str, torch.Tensor]) -> CopyBatch | None:
        """Return the copies that the plan makes of some incoming tensors, which are contiguous.

        Returns:
            None if one of them is unknown to the plan, or has another dtype or shape.
        """
        pairs: list[Pair] = []
        to_pack: ToPack = {}
        slices: list[Slice] = []
        across: list[Pair] = []
        for name, tensor in tensors.items():
            if self.sources.get(name) != (tensor.dtype, tensor.shape):
                return None
            for view, part in self.copies[name]:
                source = tensor if part is None else part.view(tensor)
                pairs.append((view, source))
                if part is not None or view.dtype != tensor.dtype:
                    slices.append((name, view, source))
                if part is not None and view.device == source.device and runs_across(view, source):
                    across.append((view, source))
            for packing, copy in self._packed.get(name, ()):
                to_pack.setdefault(packing, []).append((copy, tensor))
        return CopyBatch(self, frozenset(tensors), pairs, Copies(pairs), to_pack, slices, across)

    def fits(self, model: torch.nn.Module) -> bool:
        """Return whether ``model`` still has the tensors that the plan was recorded on, at the same addresses."""
        return self._fingerprint.matches(model)


# The slices that some incoming tensors add to the weights that are packed.
ToPack = dict[Packing, list[tuple[Copy, torch.Tensor]]]


# The name of an incoming tensor, a view of live memory, and the slice that is copied to it.
Slice = tuple[str, torch.Tensor, torch.Tensor]


class CopyBatch(NamedTuple):
    """The copies that a plan makes of some incoming tensors.

    ``copies`` are ``pairs``, prepared. ``slices`` are those whose live bytes differ from the tensor's: slices and casts.
    ``across`` are those pairs whose neighbours in memory differ, of which a copy takes five times as long.
    """

    plan: LoadPlan
    names: frozenset[str]
    pairs: list[Pair]
    copies: Copies
    packed: ToPack
    slices: list[Slice]
    across: list[Pair]

    def written(self, digests: Mapping[str, int]) -> Written:
        """Return the live memory that these copies write. ``digests``: of the incoming tensors."""
        return written_by(self.names, self.plan.whole, self.slices, digests)

    def moved(self, allocate: Callable[[int], torch.Tensor], *, across: bool = False) -> CopyBatch:
        """Return the same copies with their sources moved into memory of their own, in the order of their targets' memory.

        Args:
            allocate: returns a buffer of that many bytes on the tensors' device. The device may still be copying into it
                when this method returns.
            across: move only the sources that run across their targets, so that the commit need not turn them round.
                Otherwise all, so that the tensors can be freed.
        """
        chosen = {id(source): (target, source) for target, source in (self.across if across else self.pairs)}
        buffer = allocate(sum(aligned(source.nbytes) for _, source in chosen.values()))
        wholes: dict[torch.dtype, torch.Tensor] = {}
        moved: dict[int, torch.Tensor] = {}
        end = 0
        for key, (target, source) in chosen.items():
            if (whole := wholes.get(source.dtype)) is None:
                whole = wholes[source.dtype] = view_as(buffer, source.dtype)
            strides, start = dense_strides(target), whole.storage_offset() + end // whole.itemsize
            moved[key] = whole.as_strided(source.shape, strides, start)
            end += aligned(source.nbytes)
        Copies((moved[key], source) for key, (_, source) in chosen.items()).run()
        pairs = [(target, moved.get(id(source), source)) for target, source in self.pairs]
        slices = [(name, target, moved.get(id(source), source)) for name, target, source in self.slices]
        return CopyBatch(self.plan, self.names, pairs, Copies(pairs), self.packed, slices, [])


class PlanRun:
    """The use of a plan by one update. Work that costs time for each tensor is done here, beside generation.

    Attributes:
        fits: whether all that arrived so far is known to the plan.
        partial: whether less is staged than a full load needs: unchanged tensors stay, or only this rank's slices are kept.
        written: the live memory that the commit writes.
        kept: the tensors that stay as they are.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan
        self._missing = set(plan.sources)
        self._copies = Copies()
        self._weights = {packing: IncomingWeight(packing) for packing in plan.packings}
        # By layer, the function that it computes with after the commit; and the functions of before, to be freed.
        self._linears: dict[torch.nn.Module, Callable[..., torch.Tensor]] = {}
        self._replaced: list[Any] = []
        self.fits = True
        self.partial = False
        self.written: Written = {}
        self.kept: frozenset[str] = frozenset()
        self._lock = threading.Lock()  # each sender has a thread

    def add(self, copies: CopyBatch | None, digests: Mapping[str, int] | None = None) -> None:
        """Add the copies of tensors that have arrived.

        Args:
            copies: None if the plan does not know these tensors.
            digests: of these tensors, so that the live memory can be compared after the commit.
        """
        written = copies.written(digests) if copies is not None and digests is not None else {}
        with self._lock:
            self.fits = self.fits and copies is not None and copies.names <= self._missing
            if not self.fits or copies is None:
                return
            self._missing -= copies.names
            self.written |= written
            self._copies.extend(copies.copies)
            complete = [
                self._weights[packing]
                for packing, slices in copies.packed.items()
                if self._weights[packing].add(slices)
            ]
        for weight in complete:
            self._linears[weight.packing.layer] = pack(weight.take())

    def keep(self, names: Collection[str]) -> None:
        """Leave the live memory of these tensors as it is: they do not arrive."""
        with self._lock:
            self.kept = frozenset(names)
            self.partial = bool(names) or self.partial
            self.fits = self.fits and self._missing.issuperset(names)
            self._missing.difference_update(names)

    @property
    def complete(self) -> bool:
        """Whether exactly the tensors of the plan have arrived or are kept."""
        return self.fits and not self._missing and len(self._linears) == len(self._weights)

    def warm(self) -> None:
        """Have the device load the kernels that ``copy`` launches."""
        self._copies.warm()

    def copy(self) -> None:
        """Copy to the live model. The device may not have finished when this method returns."""
        self._copies.run()
        for layer, linear in self._linears.items():
            self._replaced.append(getattr(layer, ATTRIBUTE))  # freed with this run, after the pause
            setattr(layer, ATTRIBUTE, linear)
