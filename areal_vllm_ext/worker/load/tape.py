"""Tapes: the operators of a shadow's load, recorded once and replayed on other weights of the same names, dtypes and shapes.

A load that computes (quantises, packs, shuffles) has no plan. But its loaders call the same operators each time. A tape is
these calls, each tensor named by the storage that it lies in. Replaying it needs no model, no loader and little Python.

Two things could make a replay wrong: Python that looks at values, and kernels that torch does not see. An operator that returns
a number ends the recording. For the rest a tape is proven: it must give the bytes of a load by vLLM twice, of different
weights, before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .strides import StridedSlice, slice_of, storage_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.multiprocessing.reductions import StorageWeakRef

# Larger tensors that come from elsewhere are not kept for replays.
_CONSTANT_BYTES = 1 << 20


class NotTaped(Exception):
    """The load cannot be replayed; the message says why."""


class Ref(NamedTuple):
    """A tensor of a replay: a strided slice of a storage, or of an incoming tensor."""

    storage: int | str
    dtype: torch.dtype
    slice: StridedSlice


class Call(NamedTuple):
    """A call of an operator, with ``Ref`` in the place of tensors.

    ``made`` are the storages of its results that are new, in order. ``done`` are the storages that no later call needs.
    """

    func: Any
    args: Any
    kwargs: Any
    reads: frozenset[int]
    writes: frozenset[int]
    made: tuple[int | None, ...]
    done: tuple[int, ...] = ()


class TapeRecorder(TorchDispatchMode):
    """Watches the load of a model; then ``tape(...)``."""

    def __init__(self, tensors: Iterable[torch.Tensor], staged: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            tensors: what the model holds before its load.
            staged: the incoming tensors; contiguous.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._reason = ""
        self._storages: dict[StorageWeakRef, int] = {}
        # What a storage held before the load, if the load may read it: a copy, or only its size in bytes and device.
        self._before: dict[int, torch.Tensor | tuple[int, torch.device]] = {}
        self._of_weights: set[int] = set()
        self._calls: list[Call] = []
        self._spans: dict[StorageWeakRef, list[tuple[int, int, str]]] = {}
        for name, tensor in staged.items():
            start = slice_of(tensor).offset * tensor.itemsize
            self._spans.setdefault(storage_key(tensor), []).append((start, start + tensor.nbytes, name))
        for tensor in tensors:
            if not tensor.is_meta and storage_key(tensor) not in self._storages:
                self._add_storage(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._reason:
            return func(*args, **kwargs)
        given = list(_tensors((*args, *kwargs.values())))
        # Before the call, because it may write to them.
        for tensor in given:
            if not tensor.is_meta and not self._knows(tensor):
                self._add_storage(tensor)
        result = func(*args, **kwargs)
        # An error of the recorder must not fail the load.
        try:
            self._record(func, args, kwargs, given, result)
        except NotTaped as reason:
            self._reason = str(reason)
        except Exception as error:
            self._reason = f"{func} was not understood ({type(error).__name__}: {error})"
        return result

    def tape(self, finals: Iterable[torch.Tensor]) -> Tape:
        """Return the calls that make these tensors.

        Raises:
            NotTaped: the load cannot be replayed.
        """
        if self._reason:
            raise NotTaped(self._reason)
        refs = [self._ref(tensor) for tensor in finals]
        kept = {ref.storage for ref in refs if isinstance(ref.storage, int)}
        needed, calls = set(kept), list[Call]()
        for call in reversed(self._calls):
            if needed.isdisjoint(call.writes):
                continue
            new = (call.reads | call.writes) - needed
            needed |= new
            calls.append(call._replace(done=tuple(new)))
        calls.reverse()
        made = {storage for call in calls for storage in call.made if storage is not None}
        before = {storage: self._before[storage] for storage in needed - made}
        return Tape(calls, before, refs)

    def _knows(self, tensor: torch.Tensor) -> bool:
        key = storage_key(tensor)
        return key in self._storages or key in self._spans

    def _add_storage(self, tensor: torch.Tensor) -> None:
        """Register memory that was there before."""
        number = self._storages[storage_key(tensor)] = len(self._storages)
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes <= _CONSTANT_BYTES:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._before[number] = whole.clone()
        else:
            self._before[number] = (nbytes, tensor.device)

    def _record(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], result: Any) -> None:
        written = list(_written(func, args, kwargs))
        results = list(_tensors((result,)))
        if any(tensor.is_meta for tensor in (*written, *results)):
            return  # counts what it loads
        of_weights = any(self._is_of_weights(tensor) for tensor in given)
        if not results and not written:
            if of_weights:
                raise NotTaped(f"{func} tells the loader a value of the weights")
            return
        known = {storage_key(tensor) for tensor in given}
        new = [storage_key(tensor) not in known for tensor in results]
        if not written and not any(new):
            return  # another view
        call_args, call_kwargs = self._with_refs(args), self._with_refs(kwargs)
        reads = {self._storages[storage_key(one)] for one in given if storage_key(one) in self._storages}
        if any(storage_key(tensor) in self._spans for tensor in written):
            raise NotTaped("an incoming tensor is written to")
        made: list[int | None] = []
        for tensor, is_new in zip(results, new, strict=True):
            number = None
            if is_new and storage_key(tensor) not in self._storages:
                number = self._storages[storage_key(tensor)] = len(self._storages)
            made.append(number)
        writes = {self._storages[storage_key(tensor)] for tensor in written}
        writes |= {number for number in made if number is not None}
        if of_weights:
            self._of_weights |= writes
        self._calls.append(Call(func, call_args, call_kwargs, frozenset(reads), frozenset(writes), tuple(made)))

    def _is_of_weights(self, tensor: torch.Tensor) -> bool:
        key = storage_key(tensor)
        return key in self._spans or self._storages.get(key) in self._of_weights

    def _ref(self, tensor: torch.Tensor) -> Ref:
        key, place = storage_key(tensor), slice_of(tensor)
        if key in self._storages:
            return Ref(self._storages[key], tensor.dtype, place)
        low, high = (element * tensor.itemsize for element in place.span)
        for start, end, name in self._spans[key]:
            if start <= low and high <= end and start % tensor.itemsize == 0:
                return Ref(name, tensor.dtype, place.moved(-(start // tensor.itemsize)))
        raise NotTaped("a slice across several incoming tensors is loaded as one")

    def _with_refs(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._ref(value)
        if isinstance(value, dict):
            return {key: self._with_refs(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._with_refs(one) for one in value)
        return value


class Tape:
    """The calls of a load."""

    def __init__(
        self, calls: list[Call], before: Mapping[int, torch.Tensor | tuple[int, torch.device]], finals: list[Ref]
    ) -> None:
        """
        Args:
            calls: in order.
            before: by storage that no call makes, what it holds before the first.
            finals: the tensors that a replay returns.
        """
        self._calls, self._before, self._finals = calls, before, finals

    def replay(self, staged: Mapping[str, torch.Tensor], step: Callable[[], None]) -> list[torch.Tensor]:
        """Return the tensors that a load of ``staged`` makes.

        Args:
            staged: the incoming tensors; contiguous.
            step: called before each operator; it may raise.
        """
        storages: dict[int, torch.UntypedStorage] = {}

        def tensor_of(ref: Ref) -> torch.Tensor:
            offset = ref.slice.offset
            if isinstance(ref.storage, str):
                source = staged[ref.storage]
                storage = source.untyped_storage()
                offset += int(source.storage_offset()) * source.itemsize // ref.dtype.itemsize
            else:
                if ref.storage not in storages:
                    storages[ref.storage] = self._initial(ref.storage)
                storage = storages[ref.storage]
            tensor = torch.empty(0, dtype=ref.dtype, device=storage.device)
            return tensor.set_(storage, offset, ref.slice.shape, ref.slice.stride)

        for call in self._calls:
            step()
            result = call.func(*_filled(call.args, tensor_of), **_filled(call.kwargs, tensor_of))
            for number, tensor in zip(call.made, _tensors((result,)), strict=True):
                if number is not None:
                    storages[number] = tensor.untyped_storage()
            del result
            for number in call.done:
                storages.pop(number, None)
        return [tensor_of(ref) for ref in self._finals]

    def _initial(self, number: int) -> torch.UntypedStorage:
        """Return a storage as it was before the load. Of a large one nothing is kept: a proof fails if that matters."""
        held = self._before[number]
        if isinstance(held, torch.Tensor):
            return held.clone().untyped_storage()
        nbytes, device = held
        return torch.zeros(nbytes, dtype=torch.uint8, device=device).untyped_storage()


def _filled(value: Any, tensor_of: Callable[[Ref], torch.Tensor]) -> Any:
    if isinstance(value, Ref):
        return tensor_of(value)
    if isinstance(value, dict):
        return {key: _filled(one, tensor_of) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(one, tensor_of) for one in value)
    return value


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from _tensors((value,))


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
