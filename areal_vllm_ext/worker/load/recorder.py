"""Records one load by vLLM's loaders, operator by operator, and makes a load plan of it.

``Recorder`` understands copies (of any strided slice, broadcast or cast) and constants. A plan results only if the load is
nothing else. Any of these means no plan, and the next load is layer by layer again:

- an operator computes with a weight, or reads its values;
- a weight ends elsewhere than in a live tensor, or also elsewhere: packed where no operator shows it, or kept aside
  (CPU packing is the exception: ``observe_packing`` tells the recorder of it);
- a live tensor is written in part, or twice with different slices;
- a layer has other attributes after the load, which may be made of its weights (the absorbed projections of MLA).

A plan is proven before it is used: each of its copies must find the bytes, where it would write, that the load put there.
"""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...integrity import digest
from .cpu_packing import ATTRIBUTE, IncomingWeight, Packing, pack
from .plan import LoadPlan, ModelFingerprint
from .strides import Copy, StridedSlice, slice_of, storage_key
from .targets import LiveTarget, NotPlanned, RecordedStorage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch.multiprocessing.reductions import StorageWeakRef

aten = torch.ops.aten

_FILLS = {aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default}
_COPIES = {aten.clone.default, aten._to_copy.default}  # noqa: SLF001 - the name of an operator
# These read what a tensor is, and none of its values.
_SHAPE_ONLY = {
    aten.empty_like.default,
    aten.is_pinned.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.zeros_like.default,
}
# Attributes that a reload itself changes on modules. Parameters and buffers are checked one by one.
_NOT_COMPARED = {"_parameters", "_buffers", "_modules", "_do_torchao_reload", "_original_do_torchao_reload"}


class Recorder(TorchDispatchMode):
    """Watches a load: ``with Recorder(model, live, staged) as recorder: ...``, then ``recorder.plan()``."""

    def __init__(
        self, model: torch.nn.Module, live: Mapping[str, torch.Tensor], staged: Mapping[str, torch.Tensor]
    ) -> None:
        """
        Args:
            model: the model that is loaded.
            live: the tensors that kernels read, by name; tied ones under each of their names.
            staged: the incoming tensors; contiguous. Several may share a storage.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._live, self._staged = model, live, staged
        self._attributes = dict(_attributes(model))
        self._reason = ""
        self._watches = True
        self._packings: dict[int, Packing] = {}  # by the layer's id
        self._storages: dict[StorageWeakRef, RecordedStorage] = {}
        names: dict[StorageWeakRef, list[str]] = {}
        for name, tensor in live.items():
            names.setdefault(storage_key(tensor), []).append(name)
        for key, together in names.items():
            self._storages[key] = RecordedStorage(names=tuple(together))
        # By storage of incoming tensors (a bucket has many): start, end and name of each.
        self._spans: dict[StorageWeakRef, list[tuple[int, int, str]]] = {}
        for name, tensor in staged.items():
            start = slice_of(tensor).offset * tensor.itemsize
            self._spans.setdefault(storage_key(tensor), []).append((start, start + tensor.nbytes, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._watches and not self._reason:
            # An error of the recorder must not fail the load.
            try:
                self._record(func, args, kwargs or {}, result)
            except NotPlanned as reason:
                self._reason = str(reason)
            except Exception as error:
                self._reason = f"{func} was not understood ({type(error).__name__}: {error})"
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in the body; its effect is reported by ``add_packing``."""
        self._watches = False
        try:
            yield
        finally:
            self._watches = True

    def add_packing(self, layer: torch.nn.Module, weight: torch.Tensor) -> None:
        """Record that vLLM packed ``weight`` for ``layer``."""
        storage = self._storages.get(storage_key(weight))
        whole = weight.is_contiguous() and weight.nbytes == weight.untyped_storage().nbytes()
        if storage is None or not storage.copies or storage.dtype != weight.dtype or not whole:
            self._reason = self._reason or "a weight is packed that was not seen to be loaded"
            return
        with self.paused():
            copies = tuple(copy.simplified() for copy in storage.copies)
            self._packings[id(layer)] = Packing(layer, weight, copies)
        if not storage.names:
            storage.handed_on = len(storage.copies)

    def plan(self) -> LoadPlan:
        """Make a plan of the recording, and prove it. Call it after the load, with both sets of tensors unchanged.

        Raises:
            NotPlanned: the load cannot be replayed.
        """
        if self._reason:
            raise NotPlanned(self._reason)
        gc.collect()
        self._check_temporary_storages()
        self._check_attributes()
        packings = tuple(self._packings.values())
        for packing in packings:
            self._check_packing(packing)
        targets = [
            LiveTarget(self._flat(storage), storage)
            for storage in self._storages.values()
            if storage.names and storage.copies
        ]
        for target in targets:
            target.check({name: self._live[name] for name in target.names}, self._staged)
        return LoadPlan(targets, self._staged, ModelFingerprint(self._model), packings)

    def _check_temporary_storages(self) -> None:
        for key, storage in self._storages.items():
            if not storage.names and storage.copies and not key.expired():
                raise NotPlanned(f"the loaders keep a copy of {storage.copies[0].source} aside")
            if not storage.names and len(storage.copies) > storage.handed_on:
                raise NotPlanned(f"{storage.copies[-1].source} is loaded into memory that no live tensor shows")

    def _check_attributes(self) -> None:
        linears = {f"{name}.{ATTRIBUTE}" for name, layer in self._model.named_modules() if id(layer) in self._packings}
        for name, value in _attributes(self._model):
            if not _same(self._attributes.pop(name, _attributes), value) and name not in linears:
                raise NotPlanned(f"{name} is made anew with each load")

    def _check_packing(self, packing: Packing) -> None:
        weight = IncomingWeight(packing)
        weight.add([(copy, self._staged[copy.source]) for copy in packing.copies])
        whole, source = weight.take(), packing.copies[0].source
        if digest.digests_of([whole]) != [packing.digest]:
            raise NotPlanned(f"{source} is changed before it is packed")
        try:
            pack(whole)
        except Exception as error:
            raise NotPlanned(f"{source} cannot be packed apart from its layer: {error}") from error

    def _flat(self, storage: RecordedStorage) -> torch.Tensor:
        """Return all of a live storage as one tensor."""
        tensor = self._live[storage.names[0]]
        if storage.dtype != tensor.dtype or any(self._live[name].dtype != tensor.dtype for name in storage.names):
            raise NotPlanned(f"{storage.names[0]} is written as another dtype than it has")
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())

    # One operator

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is aten.copy_.default:
            self._record_copy(args[0], args[1])
            return
        inputs = list(_tensors((*args, *kwargs.values())))
        known = [tensor for tensor in inputs if self._is_known(tensor)]
        if not known or func in _SHAPE_ONLY:
            return
        outputs = list(_tensors((result,)))
        if func in _FILLS:
            self._record_fill(args[0])
        elif func in _COPIES:
            self._record_copy(outputs[0], args[0])
        elif not (_only_views(func, inputs, outputs) or (all(tensor.is_meta for tensor in outputs) and outputs)):
            raise NotPlanned(f"{func} computes with {self._name(known[0])}")

    def _is_known(self, tensor: torch.Tensor) -> bool:
        key = storage_key(tensor)
        return key in self._storages or key in self._spans

    def _name(self, tensor: torch.Tensor) -> str:
        if (storage := self._storages.get(storage_key(tensor))) is None:
            return self._source(tensor)
        if storage.names:
            return storage.names[0]
        return storage.copies[0].source if storage.copies else "a temporary tensor"

    def _source(self, part: torch.Tensor) -> str:
        """Return the name of the incoming tensor that contains ``part``."""
        low, high = (element * part.itemsize for element in slice_of(part).span)
        for start, end, name in self._spans[storage_key(part)]:
            if start <= low and high <= end:
                return name
        raise NotPlanned("a slice across several incoming tensors is loaded as one")

    def _record_fill(self, target: torch.Tensor) -> None:
        storage = self._storages.get(storage_key(target))
        if storage is None or not target.numel() or target.is_meta:
            return
        self._set_dtype(storage, target)
        self._add_constant(storage, slice_of(target))

    def _add_constant(self, storage: RecordedStorage, constant: StridedSlice) -> None:
        low, high = constant.span
        if any(copy.target_slice.span[0] < high and low < copy.target_slice.span[1] for copy in storage.copies):
            raise NotPlanned(f"{storage.copies[0].source} is overwritten by a constant")
        storage.constants.append(constant)

    def _record_copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.is_meta or not target.numel():
            # vLLM has a loader copy into a meta tensor first, to count what it loads.
            if (between := self._storages.get(storage_key(source))) is not None:
                between.handed_on = len(between.copies)
            return
        source = source.expand(target.shape)
        target_slice, key = slice_of(target), storage_key(target)
        if key == storage_key(source) and target_slice == slice_of(source) and target.dtype == source.dtype:
            return  # onto itself
        if key in self._spans:
            raise NotPlanned(f"the incoming {self._source(target)} is written to")
        storage = self._storages.get(key)
        if storage_key(source) in self._spans:
            name = self._source(source)
            staged = self._staged[name]
            if source.dtype != staged.dtype:
                raise NotPlanned(f"{name} is read as {source.dtype}")
            if storage is None:
                storage = self._storages[key] = RecordedStorage()
            self._set_dtype(storage, target)
            source_slice = slice_of(source).moved(-slice_of(staged).offset)
            storage.add([Copy(target_slice, name, source_slice)])
            return
        between = self._storages.get(storage_key(source))
        if between is None:
            if storage is not None and (storage.names or storage.copies):
                raise NotPlanned(f"{self._name(target)} is written from an unknown tensor")
            return
        if between.names:
            raise NotPlanned(f"the live {self._name(source)} is copied")
        if storage is None:
            storage = self._storages[key] = RecordedStorage()
        self._set_dtype(storage, target)
        self._hand_on(between, source, storage, target_slice)

    def _hand_on(
        self, between: RecordedStorage, source: torch.Tensor, storage: RecordedStorage, target_slice: StridedSlice
    ) -> None:
        """Record a copy of all of a temporary tensor: what was written to it counts as written to the target."""
        source_slice = slice_of(source)
        whole = source.numel() * source.itemsize == source.untyped_storage().nbytes()
        same_layout = (source_slice.shape, source_slice.stride) == (target_slice.shape, target_slice.stride)
        if not whole or not same_layout or between.dtype != storage.dtype:
            raise NotPlanned(
                f"{between.copies[0].source if between.copies else 'a tensor'} is loaded by way of another layout"
            )
        shift = target_slice.offset - source_slice.offset
        for constant in between.constants:
            self._add_constant(storage, constant.moved(shift))
        storage.add(copy._replace(target_slice=copy.target_slice.moved(shift)) for copy in between.copies)
        between.handed_on = len(between.copies)

    def _set_dtype(self, storage: RecordedStorage, target: torch.Tensor) -> None:
        if storage.dtype not in (None, target.dtype):
            raise NotPlanned(f"{self._name(target)} is written as {storage.dtype} and as {target.dtype}")
        storage.dtype = target.dtype


@contextlib.contextmanager
def observe_packing(recorder: Recorder) -> Iterator[None]:
    """Tell ``recorder`` of each weight that vLLM packs on a CPU while the body loads."""
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    def observed(layer: Any, remove_weight: bool) -> None:
        before, weight = getattr(layer, ATTRIBUTE, None), layer.weight
        with recorder.paused():
            original(layer, remove_weight)
        if getattr(layer, ATTRIBUTE, None) not in (before, torch.nn.functional.linear):
            recorder.add_packing(layer, weight.detach())

    utils.dispatch_cpu_unquantized_gemm = observed
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def _attributes(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what modules hold besides parameters and buffers, and what those objects hold: kernels, quantisation methods."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _NOT_COMPARED or isinstance(value, torch.nn.Module):
                continue
            yield f"{name}.{key}", value
            for inner, held in getattr(value, "__dict__", {}).items():
                yield f"{name}.{key}.{inner}", held


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before is not after:
        # Default scales. The recorder has seen every operator that computes one from weights.
        return after.numel() == 1 and before.dtype == after.dtype and torch.equal(before, after)
    return before is after or (isinstance(after, (bool, int, float, str)) and bool(before == after))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _only_views(func: Any, inputs: Iterable[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Return whether an operator only gave other names to memory."""
    if not outputs or any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments):  # noqa: SLF001
        return False
    return {storage_key(tensor) for tensor in outputs} <= {storage_key(tensor) for tensor in inputs}
