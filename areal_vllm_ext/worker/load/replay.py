"""Replays of a tape: a load's operators, called again on other weights.

A load of a large model calls thousands of operators, and each costs Python. So what a replay needs is prepared once: every
tensor has a slot, which is filled once, and what depends on no weight is computed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .strides import StridedSlice

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    # What a storage holds before the first call: a copy, or only its size in bytes and device.
    Before = torch.Tensor | tuple[int, torch.device]
    Storages = dict[int, torch.UntypedStorage]

# Larger tensors that come from elsewhere, or depend on no weight, are not kept for replays.
CONSTANT_BYTES = 1 << 20


class Ref(NamedTuple):
    """A tensor of a replay: a strided slice of a storage, or of an incoming tensor."""

    storage: int | str
    dtype: torch.dtype
    slice: StridedSlice


class Call(NamedTuple):
    """A call of an operator, with ``Ref`` in the place of tensors.

    Attributes:
        made: its results, in order: those with memory of their own, and None for others.
        of_weights: whether it reads what depends on weights.
        done: the storages that no later call needs.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    made: tuple[Ref | None, ...]
    of_weights: bool
    done: tuple[int, ...] = ()


class Tape:
    """The calls of a load.

    Attributes:
        nbytes: the most memory that a replay uses at once.
    """

    def __init__(
        self, calls: Sequence[Call], before: Mapping[int, Before], finals: Sequence[Ref], sizes: Sequence[int]
    ) -> None:
        """
        Args:
            calls: in order.
            before: by storage that no call makes, what it holds before the first.
            finals: the tensors that a replay returns.
            sizes: bytes of each storage.
        """
        constant = _constant(calls, before, sizes)
        varying = [call for call in calls if not constant.issuperset(call.writes)]
        written = {storage for call in varying for storage in call.writes}
        self._constants: Storages = {}
        for storage, held in before.items():
            if isinstance(held, torch.Tensor) and storage not in written:
                self._constants[storage] = held.clone().untyped_storage()
        folded = [call._replace(done=()) for call in calls if constant.issuperset(call.writes)]
        _Program(folded, ()).run({}, self._constants, {}, lambda: None)
        needed = {storage for call in varying for storage in call.reads} | {ref.storage for ref in finals}
        self._constants = {storage: one for storage, one in self._constants.items() if storage in needed}
        self._before = {storage: held for storage, held in before.items() if storage not in self._constants}
        self._program = _Program(varying, finals)
        self.nbytes = _most_at_once(varying, self._before, sizes)

    def replay(self, staged: Mapping[str, torch.Tensor], step: Callable[[], None]) -> list[torch.Tensor]:
        """Return the tensors that a load of ``staged`` makes.

        Args:
            staged: the incoming tensors; contiguous.
            step: called before each operator; it may raise.
        """
        return self._program.run(staged, dict(self._constants), self._before, step)


class _Slot(int):
    """The number of a tensor."""


class _Step(NamedTuple):
    """A call with ``_Slot`` in the place of tensors.

    Attributes:
        places: of the slots in ``args``; None if slots are elsewhere too.
        made: slot and storage of each result that has memory of its own.
        done: slots and storages that no later step needs.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[int, ...] | None
    made: tuple[tuple[_Slot, int] | None, ...]
    done: tuple[tuple[_Slot, ...], tuple[int, ...]]


class _Program:
    """Calls, prepared to run."""

    def __init__(self, calls: Sequence[Call], results: Sequence[Ref]) -> None:
        """
        Args:
            calls: in order.
            results: the tensors that a run returns.
        """
        self._slots: dict[Ref, _Slot] = {}
        self._by_storage: dict[int | str, list[_Slot]] = {}
        self._results = [self._slot(ref) for ref in results]
        self._steps = [self._step(call) for call in calls]
        self._refs = list(self._slots)

    def _slot(self, ref: Ref) -> _Slot:
        if ref not in self._slots:
            self._slots[ref] = _Slot(len(self._slots))
            self._by_storage.setdefault(ref.storage, []).append(self._slots[ref])
        return self._slots[ref]

    def _step(self, call: Call) -> _Step:
        args, kwargs = mapped(call.args, Ref, self._slot), mapped(call.kwargs, Ref, self._slot)
        places = tuple(place for place, one in enumerate(args) if isinstance(one, _Slot))
        elsewhere = any(_holds_slots(one) for one in (*args, *kwargs.values()) if not isinstance(one, _Slot))
        elsewhere = elsewhere or any(isinstance(one, _Slot) for one in kwargs.values())
        made = tuple(None if ref is None else (self._slot(ref), int(ref.storage)) for ref in call.made)
        # A slot of this storage that only later calls would name is named by none, because they do not need it.
        slots = tuple(slot for storage in call.done for slot in self._by_storage.get(storage, ()))
        return _Step(call.func, args, kwargs, None if elsewhere else places, made, (slots, call.done))

    def run(
        self,
        staged: Mapping[str, torch.Tensor],
        storages: Storages,
        before: Mapping[int, Before],
        step: Callable[[], None],
    ) -> list[torch.Tensor]:
        """Call all operators; return the results.

        Args:
            staged: the incoming tensors.
            storages: those that are there; the calls' own are added.
            before: what others hold before the first call.
            step: called before each operator.
        """
        tensors: list[torch.Tensor | None] = [None] * len(self._refs)

        def tensor_of(slot: _Slot) -> torch.Tensor:
            tensor = tensors[slot]
            if tensor is None:
                tensor = tensors[slot] = _tensor(self._refs[slot], staged, storages, before)
            return tensor

        for func, args, kwargs, places, made, (done_slots, done_storages) in self._steps:
            step()
            if places is None:
                result = func(*mapped(args, _Slot, tensor_of), **mapped(kwargs, _Slot, tensor_of))
            else:
                filled = list(args)
                for place in places:
                    filled[place] = tensor_of(args[place])
                result = func(*filled, **kwargs)
                del filled
            for new, tensor in zip(made, tensors_in((result,)), strict=True):
                if new is not None:
                    tensors[new[0]], storages[new[1]] = tensor, tensor.untyped_storage()
                del tensor
            del result
            for slot in done_slots:
                tensors[slot] = None
            for storage in done_storages:
                storages.pop(storage, None)
        return [tensor_of(slot) for slot in self._results]


def _tensor(
    ref: Ref, staged: Mapping[str, torch.Tensor], storages: Storages, before: Mapping[int, Before]
) -> torch.Tensor:
    offset = ref.slice.offset
    if isinstance(ref.storage, str):
        source = staged[ref.storage]
        storage = source.untyped_storage()
        offset += int(source.storage_offset()) * source.itemsize // ref.dtype.itemsize
    else:
        if ref.storage not in storages:
            storages[ref.storage] = _initial(before[ref.storage])
        storage = storages[ref.storage]
    tensor = torch.empty(0, dtype=ref.dtype, device=storage.device)
    return tensor.set_(storage, offset, ref.slice.shape, ref.slice.stride)


def _initial(held: Before) -> torch.UntypedStorage:
    """Return a storage as it was before the load. Of a large one nothing is kept: a proof fails if that matters."""
    if isinstance(held, torch.Tensor):
        return held.clone().untyped_storage()
    nbytes, device = held
    return torch.zeros(nbytes, dtype=torch.uint8, device=device).untyped_storage()


def _constant(calls: Sequence[Call], before: Mapping[int, Before], sizes: Sequence[int]) -> set[int]:
    """Return the storages that hold the same after each replay: small ones that no call writes weights to."""
    made = {ref.storage for call in calls for ref in call.made if ref is not None}
    held = {storage for storage, one in before.items() if isinstance(one, torch.Tensor)}
    constant = {storage for storage in made | held if isinstance(storage, int) and sizes[storage] <= CONSTANT_BYTES}
    while True:
        varying = {
            storage
            for call in calls
            if call.of_weights or not constant.issuperset(call.reads | call.writes)
            for storage in call.writes
        }
        if constant.isdisjoint(varying):
            return constant
        constant -= varying


def _most_at_once(calls: Sequence[Call], before: Collection[int], sizes: Sequence[int]) -> int:
    """Return the most bytes that the storages of a run use at once."""
    there, most = set[int](), 0
    used = 0
    for call in calls:
        for storage in call.reads | call.writes:
            if storage not in there and (storage in before or storage in call.writes):
                there.add(storage)
                used += sizes[storage]
        most = max(most, used)
        for storage in there.intersection(call.done):
            there.remove(storage)
            used -= sizes[storage]
    return most


def mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Return nested containers with ``change`` of each value of a kind."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(one, kind, change) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mapped(one, kind, change) for one in value)
    return value


def _holds_slots(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_slots, value.values()))
    return isinstance(value, _Slot) or (type(value) in (list, tuple) and any(map(_holds_slots, value)))


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, in order."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
