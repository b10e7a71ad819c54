"""Load plans: which part of which staged tensor becomes which part of which live tensor, so that the next load is a few
batched copies instead of vLLM's loaders, layer by layer.

``Recorder`` watches one load by those loaders, operator by operator, and keeps what it understands: copies (of any strided
part, broadcast or cast) and constants. A plan comes of it only where that is all there is. Each of these is a reason to go
on as before:

- an operator that computes with a weight, or looks at its values;
- a weight that does not end in a live tensor, or in another place too: packed, where no operator shows it, or kept aside
  (what vLLM packs on a CPU it is told: ``packing.py``);
- a live tensor that is written in part, or twice;
- a layer that has other attributes after the load: made of its weights, for all that can be told (the absorbed projections
  of MLA).

A plan is proven before it is used: each of its copies must find, where it would write, the bytes that the load has put there.
"""

from __future__ import annotations

import contextlib
import gc
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ...integrity import digest
from ...transport.buckets import aligned, placed, typed
from .packing import ATTRIBUTE, Packing, Weight, packed

aten = torch.ops.aten

_FILLS = {aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default}
_COPIES = {aten.clone.default, aten._to_copy.default}  # noqa: SLF001 - the name of an operator
# They take from a tensor what it is, and nothing of its values.
_SHAPE_ONLY = {
    aten.empty_like.default,
    aten.is_pinned.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_zeros.default,
    aten.zeros_like.default,
}
# What a reload itself leaves on the modules; parameters and buffers are looked at one by one.
_NO_STATE = {"_parameters", "_buffers", "_modules", "_do_torchao_reload", "_original_do_torchao_reload"}
# Marks an element that a loader set to a constant, such as padding; more than any element is copied to.
_CONSTANT = 128
# Of the bytes that come: where a rank needs less than this of them, it keeps no others.
_SHARD = 0.9
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NotPlanned(Exception):
    """The load cannot be replayed; says why."""


class Part(NamedTuple):
    """A strided part of a tensor or a storage; offset and strides in elements."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """Between which elements it lies."""
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset, self.offset + reach + 1

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of ``tensor``, which is contiguous."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


class Copy(NamedTuple):
    """A copy into a storage, out of the tensor ``source``."""

    to: Part
    source: str
    part: Part


class _Storage:
    """What was written into one storage."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        """That of the live tensors ``names``, or a temporary one."""
        self.names = names
        self.dtype: torch.dtype | None = None
        self.copies: list[Copy] = []
        self.constants: list[Part] = []
        # How many of the copies were handed on to another storage.
        self.handed_on = 0


class Recorder(TorchDispatchMode):
    """Watches a load: ``with Recorder(model, live, staged) as recorder: ...``, then ``recorder.plan()``."""

    def __init__(
        self, model: torch.nn.Module, live: Mapping[str, torch.Tensor], staged: Mapping[str, torch.Tensor]
    ) -> None:
        """
        Args:
            model: what is loaded into.
            live: the tensors that kernels read, by name; tied ones under each of their names.
            staged: the tensors that are loaded; contiguous. Several may lie in one storage.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._model, self._live, self._staged = model, live, staged
        self._attributes = dict(_attributes(model))
        self._reason = ""
        self._watches = True
        self._packings: dict[int, Packing] = {}  # by the layer's id
        self._storages: dict[StorageWeakRef, _Storage] = {}
        names: dict[StorageWeakRef, list[str]] = {}
        for name, tensor in live.items():
            names.setdefault(_key(tensor), []).append(name)
        for key, together in names.items():
            self._storages[key] = _Storage(names=tuple(together))
        # A bucket is one storage of many tensors.
        self._spans: dict[StorageWeakRef, list[tuple[int, int, str]]] = {}
        for name, tensor in staged.items():
            start = _part(tensor).offset * tensor.itemsize
            self._spans.setdefault(_key(tensor), []).append((start, start + tensor.nbytes, name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._watches and not self._reason:
            # Whatever this file makes of it, the load itself goes on.
            try:
                self._note(func, args, kwargs or {}, result)
            except NotPlanned as reason:
                self._reason = str(reason)
            except Exception as error:
                self._reason = f"{func} was not understood ({type(error).__name__}: {error})"
        return result

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """The body does what is told of otherwise."""
        self._watches = False
        try:
            yield
        finally:
            self._watches = True

    def packed(self, layer: torch.nn.Module, weight: torch.Tensor) -> None:
        """``weight`` was packed for ``layer`` (``packing.py``)."""
        storage = self._storages.get(_key(weight))
        whole = weight.is_contiguous() and weight.nbytes == weight.untyped_storage().nbytes()
        if storage is None or not storage.copies or storage.dtype != weight.dtype or not whole:
            self._reason = self._reason or "a weight is packed that was not seen to be loaded"
            return
        with self.unwatched():
            self._packings[id(layer)] = Packing(layer, weight, tuple(_simplified(copy) for copy in storage.copies))
        if not storage.names:
            storage.handed_on = len(storage.copies)

    def plan(self) -> Plan:
        """What was recorded, proven. To be called when the load is over, with both sets of tensors as they were left.

        Raises:
            NotPlanned: it cannot be replayed.
        """
        if self._reason:
            raise NotPlanned(self._reason)
        gc.collect()
        for key, storage in self._storages.items():
            if not storage.names and storage.copies and not key.expired():
                raise NotPlanned(f"the loaders keep a copy of {storage.copies[0].source} aside")
            if not storage.names and len(storage.copies) > storage.handed_on:
                raise NotPlanned(f"{storage.copies[-1].source} is loaded into what no live tensor shows")
        linears = {f"{name}.{ATTRIBUTE}" for name, layer in self._model.named_modules() if id(layer) in self._packings}
        for name, value in _attributes(self._model):
            if not _same(self._attributes.pop(name, _attributes), value) and name not in linears:
                raise NotPlanned(f"{name} is made anew with each load")
        packings = tuple(self._packings.values())
        for packing in packings:
            weight = Weight(packing)
            weight.add([(copy, self._staged[copy.source]) for copy in packing.copies])
            whole = weight.whole()
            if digest.digests_of([whole]) != [packing.digest]:
                raise NotPlanned(f"{packing.copies[0].source} is changed before it is packed")
            try:
                packed(whole)
            except Exception as error:
                raise NotPlanned(
                    f"{packing.copies[0].source} cannot be packed apart from its layer: {error}"
                ) from error
        targets = [
            Target(self._flat(storage), storage)
            for storage in self._storages.values()
            if storage.names and storage.copies
        ]
        for target in targets:
            target.check({name: self._live[name] for name in target.names}, self._staged)
        return Plan(targets, self._staged, Tree(self._model), packings)

    def _flat(self, storage: _Storage) -> torch.Tensor:
        """All of a live storage, as one tensor."""
        tensor = self._live[storage.names[0]]
        if storage.dtype != tensor.dtype or any(self._live[name].dtype != tensor.dtype for name in storage.names):
            raise NotPlanned(f"{storage.names[0]} is written as another dtype than it has")
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())

    # One operator

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func is aten.copy_.default:
            self._copied(args[0], args[1])
            return
        inputs = list(_tensors((*args, *kwargs.values())))
        known = [tensor for tensor in inputs if self._is_known(tensor)]
        if not known or func in _SHAPE_ONLY:
            return
        outputs = list(_tensors((result,)))
        if func in _FILLS:
            self._filled(args[0])
        elif func in _COPIES:
            self._copied(outputs[0], args[0])
        elif not (_only_views(func, inputs, outputs) or (all(tensor.is_meta for tensor in outputs) and outputs)):
            raise NotPlanned(f"{func} computes with {self._name(known[0])}")

    def _is_known(self, tensor: torch.Tensor) -> bool:
        key = _key(tensor)
        return key in self._storages or key in self._spans

    def _name(self, tensor: torch.Tensor) -> str:
        if (storage := self._storages.get(_key(tensor))) is None:
            return self._source(tensor)
        return (
            storage.names[0] if storage.names else storage.copies[0].source if storage.copies else "a temporary tensor"
        )

    def _source(self, part: torch.Tensor) -> str:
        """The staged tensor that ``part`` is of."""
        low, high = (place * part.itemsize for place in _part(part).span)
        for start, end, name in self._spans[_key(part)]:
            if start <= low and high <= end:
                return name
        raise NotPlanned("a part of several incoming tensors is loaded as one")

    def _filled(self, target: torch.Tensor) -> None:
        storage = self._storages.get(_key(target))
        if storage is None or not target.numel() or target.is_meta:
            return
        self._typed(storage, target)
        self._constant(storage, _part(target))

    def _constant(self, storage: _Storage, part: Part) -> None:
        low, high = part.span
        if any(copy.to.span[0] < high and low < copy.to.span[1] for copy in storage.copies):
            raise NotPlanned(f"{storage.copies[0].source} is overwritten by a constant")
        storage.constants.append(part)

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.is_meta or not target.numel():
            # vLLM has a loader copy into a meta tensor first, to count what it loads.
            if (between := self._storages.get(_key(source))) is not None:
                between.handed_on = len(between.copies)
            return
        source = source.expand(target.shape)
        to, key = _part(target), _key(target)
        if key == _key(source) and to == _part(source) and target.dtype == source.dtype:
            return  # onto itself
        if key in self._spans:
            raise NotPlanned(f"the incoming {self._source(target)} is written to")
        storage = self._storages.get(key)
        if _key(source) in self._spans:
            name = self._source(source)
            staged = self._staged[name]
            if source.dtype != staged.dtype:
                raise NotPlanned(f"{name} is read as {source.dtype}")
            part = _part(source)
            if storage is None:
                storage = self._storages[key] = _Storage()
            self._typed(storage, target)
            storage.copies.append(Copy(to, name, _moved(part, -_part(staged).offset)))
            return
        between = self._storages.get(_key(source))
        if between is None:
            if storage is not None and (storage.names or storage.copies):
                raise NotPlanned(f"{self._name(target)} is written from an unknown tensor")
            return
        if between.names:
            raise NotPlanned(f"the live {self._name(source)} is copied")
        if storage is None:
            storage = self._storages[key] = _Storage()
        self._typed(storage, target)
        self._hand_on(between, source, storage, to)

    def _hand_on(self, between: _Storage, source: torch.Tensor, storage: _Storage, to: Part) -> None:
        """All of a temporary tensor is copied: what was written into it counts as written into where it goes."""
        part = _part(source)
        whole = source.numel() * source.itemsize == source.untyped_storage().nbytes()
        if not whole or part.shape != to.shape or part.stride != to.stride or between.dtype != storage.dtype:
            raise NotPlanned(
                f"{between.copies[0].source if between.copies else 'a tensor'} is loaded by way of another layout"
            )
        shift = to.offset - part.offset
        for constant in between.constants:
            self._constant(storage, _moved(constant, shift))
        storage.copies += [copy._replace(to=_moved(copy.to, shift)) for copy in between.copies]
        between.handed_on = len(between.copies)

    def _typed(self, storage: _Storage, target: torch.Tensor) -> None:
        if storage.dtype not in (None, target.dtype):
            raise NotPlanned(f"{self._name(target)} is written as {storage.dtype} and as {target.dtype}")
        storage.dtype = target.dtype


class Target:
    """One storage of live tensors, and what is copied into it."""

    def __init__(self, flat: torch.Tensor, storage: _Storage) -> None:
        self.flat = flat
        self.names = storage.names
        self.copies = tuple(_simplified(copy) for copy in storage.copies)
        self._constants = storage.constants

    def check(self, live: Mapping[str, torch.Tensor], staged: Mapping[str, torch.Tensor]) -> None:
        """Every element is written exactly once, or constant, or part of a tensor that is not loaded; and the copies give
        the bytes that are there.

        Raises:
            NotPlanned: naming the tensor where they do not.
        """
        if self._overlaps():
            raise NotPlanned(f"{self.names[0]} is written through overlapping parts")
        # Device memory is scarce beside an engine: a byte for each element, and as much again for a moment.
        written = torch.zeros(self.flat.shape, dtype=torch.uint8, device=self.flat.device)
        for constant in self._constants:
            constant.of(written).fill_(_CONSTANT)
        for copy in self.copies:
            copy.to.of(written).add_(1)
        for name, tensor in live.items():
            counts = _part(tensor).of(written)
            least, most = (int(one) for one in counts.aminmax()) if counts.numel() else (1, 1)
            if (least, most) in ((0, 0), (1, 1)):
                continue
            if least == 0:
                raise NotPlanned(f"{name} is written in part only")
            if most > _CONSTANT + 1 or bool(((counts > 1) & (counts < _CONSTANT)).any()):
                raise NotPlanned(f"{name} is written more than once")
        del written
        for copy in self.copies:
            there, sent = copy.to.of(self.flat), copy.part.of(staged[copy.source]).to(self.flat.device, self.flat.dtype)
            bits = _BITS[self.flat.itemsize]
            if not torch.equal(there.view(bits), sent.view(bits)):
                raise NotPlanned(f"{self.names[0]} is changed after it was loaded")

    def _overlaps(self) -> bool:
        """Whether a part of this storage has an element twice: a copy of it could write either value there."""
        return any(
            step == 0 and size > 1
            for copy in self.copies
            for size, step in zip(copy.to.shape, copy.to.stride, strict=True)
        )


class Tree:
    """The modules of a model, and where the tensors of each lie. Looked at with every update, so no name is made for any."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        own = ((module._parameters, module._buffers, module._modules) for module in model.modules())  # noqa: SLF001
        self._held: list[tuple[dict[str, Any], dict[str, Any]]]
        self._held = [(held, dict(held)) for kinds in own for held in kinds]
        tensors = {id(one): one for _, then in self._held for one in then.values() if _is_placed(one)}
        self._places = [(one, one.data_ptr()) for one in tensors.values()]

    def is_of(self, model: torch.nn.Module) -> bool:
        return (
            model is self._model
            and all(len(held) == len(then) for held, then in self._held)
            and all(held.get(name) is one for held, then in self._held for name, one in then.items())
            and all(tensor.data_ptr() == place for tensor, place in self._places)
        )


def _is_placed(one: object) -> bool:
    return isinstance(one, torch.Tensor) and not isinstance(one, torch.nn.UninitializedParameter)


class Plan:
    """How staged tensors become the live model."""

    def __init__(
        self,
        targets: Iterable[Target],
        staged: Mapping[str, torch.Tensor],
        tree: Tree,
        packings: tuple[Packing, ...] = (),
    ) -> None:
        """
        Args:
            targets: what is written, checked.
            staged: what it was recorded on.
            tree: the model then.
            packings: what is packed for layers.
        """
        self.packings = packings
        self._packed: dict[str, list[tuple[Packing, Copy]]] = {}
        # Of each incoming tensor what it must be, and which parts of it are copied where.
        self.sources = {name: (tensor.dtype, tensor.shape) for name, tensor in staged.items()}
        # Of tensors that are copied whole no part.
        self.copies: dict[str, list[tuple[torch.Tensor, Part | None]]] = {name: [] for name in staged}
        self._tree = tree
        # Of incoming tensors that are copied whole, and into one run of memory: that run.
        self.whole: dict[str, torch.Tensor] = {}
        # Of what is written, and of the parts of incoming tensors that become it.
        self.nbytes = self.parts_nbytes = 0
        for target in targets:
            for copy in target.copies:
                view = copy.to.of(target.flat)
                self.nbytes += view.nbytes
                source = staged[copy.source]
                self.parts_nbytes += aligned(copy.part.numel * source.itemsize)
                whole = copy.part == Part(0, (source.numel(),), (1,)) and _is_run(copy.to)
                self.copies[copy.source].append((view.view(source.shape), None) if whole else (view, copy.part))
                if whole and source.dtype == view.dtype:
                    self.whole[copy.source] = view
        for packing in packings:
            for copy in packing.copies:
                self.parts_nbytes += aligned(copy.part.numel * staged[copy.source].itemsize)
                self._packed.setdefault(copy.source, []).append((packing, copy))
        # Whether much of what comes is for other ranks.
        self.of_a_shard = self.parts_nbytes < _SHARD * sum(tensor.nbytes for tensor in staged.values())

    def parts(self, tensors: Mapping[str, torch.Tensor]) -> Parts | None:
        """What is copied of staged tensors; contiguous. None where they are not those of the plan."""
        batches: Batches = {}
        to_pack: Packed = {}
        for name, tensor in tensors.items():
            if self.sources.get(name) != (tensor.dtype, tensor.shape):
                return None
            for view, part in self.copies[name]:
                source = tensor if part is None else part.of(tensor)
                kind = (view.dtype, tensor.dtype, view.is_contiguous() and source.is_contiguous())
                targets, sources = batches.setdefault(kind, ([], []))
                targets.append(view)
                sources.append(source)
            for packing, copy in self._packed.get(name, ()):
                to_pack.setdefault(packing, []).append((copy, tensor))
        return Parts(self, frozenset(tensors), batches, to_pack)

    def fits(self, model: torch.nn.Module) -> bool:
        """Whether the tensors of ``model`` are those that it was recorded on, where they were."""
        return self._tree.is_of(model)


# A batch has one pair of dtypes, and is either contiguous throughout or not: that decides which kernel copies it.
Batches = dict[tuple[torch.dtype, torch.dtype, bool], tuple[list[torch.Tensor], list[torch.Tensor]]]

# What some tensors bring to the weight of each layer that is packed.
Packed = dict[Packing, list[tuple[Copy, torch.Tensor]]]


class Parts(NamedTuple):
    """What a plan copies of some staged tensors: live tensors, and what becomes of them."""

    plan: Plan
    names: frozenset[str]
    batches: Batches
    packed: Packed

    def apart(self, memory: Callable[[int], torch.Tensor]) -> Parts:
        """The same with copies of the parts, one after the other in memory of their own, so that the tensors can go.

        Args:
            memory: gives so many bytes, where the tensors lie. The device may not have finished on return.
        """
        sources = [source for _, batch in self.batches.values() for source in batch]
        buffer = memory(sum(aligned(source.nbytes) for source in sources))
        batches: Batches = {}
        end = 0
        for (to_dtype, dtype, _), (targets, parts) in self.batches.items():
            whole, copies = typed(buffer, dtype), []
            for target, part in zip(targets, parts, strict=True):
                copies.append(placed(whole, end, part.shape))
                end += aligned(part.nbytes)
                all_targets, all_copies = batches.setdefault((to_dtype, dtype, target.is_contiguous()), ([], []))
                all_targets.append(target)
                all_copies.append(copies[-1])
            torch._foreach_copy_(copies, parts, non_blocking=True)
        return Parts(self.plan, self.names, batches, self.packed)


class BoundPlan:
    """A plan whose sources have come. What costs time for each tensor is done here, beside the running engine."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._missing = set(plan.sources)
        self._batches: Batches = {}
        self._weights = {packing: Weight(packing) for packing in plan.packings}
        # What layers compute with from the switch on, and what they did until then.
        self._linears: dict[torch.nn.Module, Callable[..., torch.Tensor]] = {}
        self._replaced: list[Any] = []
        # Whether nothing has come that the plan does not know.
        self.fits = True
        # Whether the staged tensors are not all that a load needs: others stay as they are, or parts of them only are staged.
        self.part = False
        # Several senders have a thread each.
        self._lock = threading.Lock()

    def add(self, parts: Parts | None) -> None:
        """Take in what the plan has made of staged tensors, None where it does not know them."""
        with self._lock:
            self.fits = self.fits and parts is not None and parts.names <= self._missing
            if not self.fits or parts is None:
                return
            self._missing -= parts.names
            for kind, (targets, sources) in parts.batches.items():
                all_targets, all_sources = self._batches.setdefault(kind, ([], []))
                all_targets += targets
                all_sources += sources
            there = [
                self._weights[packing] for packing, copies in parts.packed.items() if self._weights[packing].add(copies)
            ]
        for weight in there:
            self._linears[weight.packing.layer] = packed(weight.whole())

    def keep(self, names: Collection[str]) -> None:
        """Leave what these became as it is: they do not come."""
        with self._lock:
            self.part = bool(names) or self.part
            self.fits = self.fits and self._missing.issuperset(names)
            self._missing.difference_update(names)

    @property
    def complete(self) -> bool:
        """Whether exactly the tensors of the plan have come, or stay."""
        return self.fits and not self._missing and len(self._linears) == len(self._weights)

    def copy(self) -> None:
        """Switch the live model to the staged tensors; the device may not have finished on return."""
        for targets, sources in self._batches.values():
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for layer, linear in self._linears.items():
            self._replaced.append(getattr(layer, ATTRIBUTE))  # freed with this plan
            setattr(layer, ATTRIBUTE, linear)


def _key(tensor: torch.Tensor) -> StorageWeakRef:
    # As long as the reference is held, no other storage gets this one's identity.
    return StorageWeakRef(tensor.untyped_storage())


def _part(tensor: torch.Tensor) -> Part:
    """What ``tensor`` is of its storage."""
    return Part(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _moved(part: Part, by: int) -> Part:
    return part._replace(offset=part.offset + by)


def _simplified(copy: Copy) -> Copy:
    """Runs of memory are copied faster than shapes."""
    if _is_run(copy.to) and _is_run(copy.part):
        run = ((copy.to.numel,), (1,))
        return Copy(Part(copy.to.offset, *run), copy.source, Part(copy.part.offset, *run))
    return copy


def _is_run(part: Part) -> bool:
    expected = 1
    for size, step in zip(reversed(part.shape), reversed(part.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _attributes(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules hold beside parameters and buffers, and what that holds: kernels, implementations, quantisation methods."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in _NO_STATE or isinstance(value, torch.nn.Module):
                continue
            yield f"{name}.{key}", value
            for inner, held in getattr(value, "__dict__", {}).items():
                yield f"{name}.{key}.{inner}", held


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before is not after:
        # Default scales; operators that computed them from weights were seen.
        return after.numel() == 1 and before.dtype == after.dtype and torch.equal(before, after)
    return before is after or (isinstance(after, (bool, int, float, str)) and bool(before == after))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _only_views(func: Any, inputs: Iterable[torch.Tensor], outputs: list[torch.Tensor]) -> bool:
    """Whether an operator only gave other names to memory."""
    if not outputs or any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments):  # noqa: SLF001
        return False
    return {_key(tensor) for tensor in outputs} <= {_key(tensor) for tensor in inputs}
