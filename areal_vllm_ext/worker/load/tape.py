"""Tapes: the operators of a shadow's load, recorded once and replayed on other weights of the same names, dtypes and shapes.

A load that computes (quantises, packs, shuffles) has no plan. But its loaders call the same operators each time. A tape is
these calls, each tensor named by the storage that it lies in. Replaying it needs no model, no loader and little Python.

Two things could make a replay wrong: Python that looks at values, and kernels that torch does not see. An operator that returns
a number ends the recording. For the rest a tape is proven: it must give the bytes of a load by vLLM twice, of different
weights, before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .replay import CONSTANT_BYTES, Call, Ref, Tape, mapped, tensors_in
from .strides import slice_of, storage_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch.multiprocessing.reductions import StorageWeakRef

# Operators that change what a tensor is, not what it holds. A replay makes each tensor once, as it was when it was seen.
_RESHAPING = {"as_strided_", "resize_", "resize_as_", "set_", "squeeze_", "swapaxes_", "t_", "transpose_", "unsqueeze_"}


class NotTaped(Exception):
    """The load cannot be replayed; the message says why."""


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
        self._sizes: list[int] = []
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
        given = list(tensors_in((*args, *kwargs.values())))
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
        made = {ref.storage for call in calls for ref in call.made if ref is not None}
        before = {storage: self._before[storage] for storage in needed - made}
        return Tape(calls, before, refs, self._sizes)

    def _knows(self, tensor: torch.Tensor) -> bool:
        key = storage_key(tensor)
        return key in self._storages or key in self._spans

    def _add_storage(self, tensor: torch.Tensor) -> None:
        """Register memory that was there before."""
        number, storage = self._number(tensor), tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes <= CONSTANT_BYTES:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._before[number] = whole.clone()
        else:
            self._before[number] = (nbytes, tensor.device)

    def _number(self, tensor: torch.Tensor) -> int:
        """Number a storage that is not known yet."""
        number = self._storages[storage_key(tensor)] = len(self._storages)
        self._sizes.append(tensor.untyped_storage().nbytes())
        return number

    def _record(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], result: Any) -> None:
        written = list(_written(func, args, kwargs))
        results = list(tensors_in((result,)))
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
        call_args, call_kwargs = (mapped(one, torch.Tensor, self._ref) for one in (tuple(args), kwargs))
        reads = {self._storages[storage_key(one)] for one in given if storage_key(one) in self._storages}
        if any(storage_key(tensor) in self._spans for tensor in written):
            raise NotTaped("an incoming tensor is written to")
        if written and func.overloadpacket.__name__ in _RESHAPING:
            raise NotTaped(f"{func} changes a tensor's shape or memory")
        made: list[Ref | None] = []
        for tensor, is_new in zip(results, new, strict=True):
            if is_new and storage_key(tensor) not in self._storages:
                self._number(tensor)
                made.append(self._ref(tensor))
            else:
                made.append(None)
        writes = {self._storages[storage_key(tensor)] for tensor in written}
        writes |= {int(ref.storage) for ref in made if ref is not None}
        if of_weights:
            self._of_weights |= writes
        self._calls.append(
            Call(func, call_args, call_kwargs, frozenset(reads), frozenset(writes), tuple(made), of_weights)
        )

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


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from tensors_in((value,))
