"""The weights that a trainer sends: full tensors under checkpoint names, checked before any bytes move."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch.nn.parameter import is_lazy

from ..errors import InvalidWeights
from ..integrity import checkpoint
from ..integrity.hugging_face import identity
from ..protocol import TensorMeta, Weights
from .adapters import Merged
from .modules import Named, gathered, is_sharded, parts_of
from .names import NameFinder
from .ties import SecondNames
from .zero3 import Partitioned

WeightSource = torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[Named]
# The dtype to send in: one for all floating-point tensors, or "auto" for that of each tensor in the engines' checkpoint.
Cast = torch.dtype | Literal["auto"]

# A dtype is wider than another if it holds every value of it. Neither of float16 and bfloat16 does.
_WIDTHS = {"float64": 3, "float32": 2, "bfloat16": 1, "float16": 1}
# A model has few tied weights. With more unknown names than this, they are not compared by value, which takes time.
_MOST_COPIES = 8


def named_weights(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint tensors of a module, a state dict or an iterable, one at a time.

    The parts of names that wrappers add (``torch.compile``, DDP, FSDP, activation checkpointing) are taken off a module's
    names. A Hugging Face model's tensors get the names under which the model saves them. For example, transformers 5 holds the
    experts of an MoE fused, and saves them one by one. A ``DTensor`` is gathered, which is a collective: in a sharded trainer
    every rank must walk through this iterator at the same time. ``EngineGroup.update(process_group=...)`` does that.
    """
    return gathered(named_parts(source))


def is_lasting(source: object) -> bool:
    """Return whether the tensors of a source stay as they are while it is walked. An iterator's may be freed."""
    return isinstance(source, (torch.nn.Module, Mapping, ItemsView, list, tuple))


def named_parts(source: WeightSource) -> Iterable[Named]:
    """Return the checkpoint tensors as this rank holds them: a ``DTensor`` is not gathered."""
    if isinstance(source, torch.nn.Module):
        source = parts_of(source)
    if isinstance(source, torch.Tensor) or not isinstance(source, Iterable):
        raise InvalidWeights(
            f"send(...) got {_kind(source)}: give a module, a state dict, an iterable of (name, tensor), or a path"
        )
    return _tensors(source.items() if isinstance(source, Mapping) else source)


def _tensors(pairs: Iterable[object]) -> Iterator[Named]:
    """Yield ``pairs``, each of which is a name and a dense tensor with values."""
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            shown = f"({', '.join(map(_kind, pair))})" if isinstance(pair, (tuple, list)) else _kind(pair)
            raise InvalidWeights(f"send(...) got {shown} where it needs (name, tensor): give model.named_parameters()")
        name, tensor = pair
        if reason := _unsendable_reason(tensor):
            raise InvalidWeights(f"{name} {reason}")
        yield name, tensor


def _unsendable_reason(value: object) -> str | None:
    """Return why ``value`` cannot be sent; None if it can."""
    if isinstance(value, Mapping):
        return "is a mapping, not a tensor: give the state dict inside it"
    if isinstance(value, (Merged, Partitioned)):
        return None
    if not isinstance(value, torch.Tensor):
        return f"is {_kind(value)}, not a tensor: leave it out, or give torch.as_tensor(...) of it"
    if getattr(value, "fake_mode", None) is not None:
        return "is a FakeTensor, so it has no values: give the real one"
    if is_lazy(value):
        return "is not initialized, so it has no values: call its module once"
    if value.is_meta:
        return "is on the meta device, so it has no values: load or gather it first"
    if value.layout != torch.strided:
        return f"is sparse ({value.layout}): give .to_dense() of it"
    if value.is_nested or value.is_quantized:
        return "is nested or quantized by torch: give a plain tensor"
    return None


def _kind(value: object) -> str:
    return type(value).__qualname__ if value is not None else "None"


def checked_cast(dtype: str | torch.dtype | None) -> Cast | None:
    """Return the dtype to send in; None to cast only tensors that are wider than in the engines' checkpoint.

    Raises:
        TypeError: ``dtype`` is neither a string nor a torch dtype.
        ValueError: ``dtype`` is no floating-point dtype that checkpoints use.
    """
    if dtype is None or dtype == "auto":
        return "auto" if dtype else None
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype must be 'auto', a string or a torch.dtype, not {dtype!r}")
    name = _name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in _WIDTHS:
        raise ValueError(f"dtype must be one of 'auto', {', '.join(map(repr, _WIDTHS))}, not {dtype!r}")
    cast: torch.dtype = getattr(torch, name)
    return cast


class Checker:
    """Checks the tensors to send by name, shape and dtype.

    Attributes:
        second_names: compares what comes under two names of one tensor.
        set_aside: called with each tensor that has an engines' name, also with those that are not sent.
    """

    def __init__(self, taken: Weights, engine_dtype: str, dtype: str | torch.dtype | None) -> None:
        """
        Args:
            taken: what the engines take; without tensors if it is unknown, then nothing can be checked.
            engine_dtype: the dtype in which the engines compute, allowed in addition to the checkpoint's own.
            dtype: dtype to send in, see ``AsyncUpdate.send``.
        """
        self._expected = {tensor.name: tensor for tensor in taken.required}
        self._optional = frozenset(taken.optional)
        self._names, self._ties = NameFinder(taken), taken.ties
        self.second_names = SecondNames(self._ties, self._names)
        self._dtypes = (engine_dtype,)
        self._cast = checked_cast(dtype)
        self._tied: set[str] = set()
        self.set_aside: Callable[[str, torch.Tensor], None] = lambda _name, _tensor: None

    def check(self, weights: Iterable[Named], *, partial: bool = False) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """Yield the tensors to send.

        Args:
            weights: the tensors.
            partial: whether tensors may be missing: other ranks send the rest, or the engines keep it.

        Raises:
            InvalidWeights: the engines could not load a tensor; or, at the end, one is missing.
        """
        for meta, tensor in self._checked(self.renamed(self.second_names.compared(weights)), partial=partial):
            yield meta, _cast(meta, tensor)

    def as_saved(self, parts: list[Named]) -> list[Named]:
        """Return ``parts`` as the engines' model saves them, if they have the names that it has in transformers' modules.

        Sharded tensors stay as they are: only the model itself tells every rank how to gather them.
        """
        if self._names.all_known(parts) or any(is_sharded(tensor) for _, tensor in parts):
            return parts
        saved = self._names.as_saved(parts)
        return saved if self._names.all_known(saved) else parts

    def renamed(self, weights: Iterable[Named]) -> Iterator[Named]:
        """Yield ``weights`` under the engines' names, without what is no part of what engines serve."""
        for name, tensor in weights:
            if (known := self._names.find(name)) is None:
                continue
            self.set_aside(known, tensor)
            if known not in self._optional and known not in self._ties:
                yield known, tensor

    def _checked(self, weights: Iterable[Named], *, partial: bool = False) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """Yield the tensors to send before they are cast. No operation runs on them, so a ``DTensor`` costs no collective."""
        sent: set[str] = set()
        for name, tensor in weights:
            if name in self._tied:
                continue
            if name in sent:
                raise InvalidWeights(f"{name} is there twice; give each name once")
            meta = TensorMeta(name, self._dtype_of(name, _name(tensor.dtype)), tuple(tensor.shape))
            unexpected = self._expected and self._expected.get(name) != meta
            if unexpected and (problem := checkpoint.mismatch_reason(meta, self._expected, self._dtypes)):
                raise InvalidWeights(problem + self._names.hint(meta))
            sent.add(name)
            yield meta, tensor
        if not partial:
            self.check_complete(sent)

    def _dtype_of(self, name: str, given: str) -> str:
        """Return the dtype in which tensor ``name``, which has dtype ``given``, is sent."""
        known = self._expected.get(name)
        own = known.dtype if known else ""
        if given not in _WIDTHS or (known and own not in _WIDTHS):
            return given  # integers and quantized tensors are never cast
        if self._cast is None:
            return own if own and given not in (own, *self._dtypes) and _WIDTHS[given] > _WIDTHS[own] else given
        if self._cast == "auto":
            return own or given
        wanted = _name(self._cast)
        if own and _WIDTHS[wanted] < _WIDTHS[own]:
            # The checkpoint keeps this tensor in a wider dtype, so the model needs its precision (a router's bias).
            return own if _WIDTHS[given] > _WIDTHS[own] else given
        return wanted

    def check_complete(self, names: Collection[str]) -> None:
        """Raise InvalidWeights unless ``names`` are all that the engines need."""
        if not names:
            raise InvalidWeights("there was no tensor to send: send(...) got an empty source")
        if self._expected and (problem := checkpoint.missing_reason(names, self._expected)):
            raise InvalidWeights(f"{problem}; where engines are to keep what they have of them: partial=True")

    def check_source(
        self,
        source: WeightSource,
        gather: Callable[[Iterable[Named]], Iterator[Named]] = gathered,
        *,
        partial: bool = False,
    ) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """Check all of ``source``, and yield the tensors that ``gather`` makes full.

        A module, a mapping, its items or a list is checked before this returns; an iterator while it is walked.
        ``partial``: tensors may be missing.
        """
        parts = named_parts(source)
        if is_lasting(source):
            parts = list(parts)
            saved = self.as_saved(parts)
            self.second_names.compare(saved)
            # It lacks the second names of tied weights.
            checked = {meta.name: meta for meta in self.check_ahead(list(self.renamed(saved)), partial=partial)}
            # Every rank of a trainer gathers the same parts, under the names that it holds them by.
            full = self.renamed(gather(parts) if saved is parts else _instead(gather(parts), saved))
            return ((checked[name], _cast(checked[name], tensor)) for name, tensor in full if name in checked)
        return self.check(gather(parts), partial=partial)

    def check_ahead(self, weights: Sequence[Named], *, partial: bool = False) -> tuple[TensorMeta, ...]:
        """Check names, shapes and dtypes of all of ``weights`` before any engine is asked to begin.

        Second names of tied weights, which checkpoints leave out, are found here, where all tensors are alive: they share the
        memory of a tensor that the checkpoint has, or are a copy of it. In an iterable, two tensors can have one address,
        because the first was freed.

        Args:
            weights: the tensors, under the engines' names (``renamed``).
            partial: whether tensors may be missing: other ranks send the rest, or the engines keep it.

        Returns:
            the tensors to send.
        """
        self._tied = set()
        if others := [(name, tensor) for name, tensor in weights if name not in self._expected]:
            known = [tensor for name, tensor in weights if name in self._expected]
            comparable = known if len(others) <= _MOST_COPIES else []
            identities = {identity(tensor) for tensor in known}
            self._tied = {
                name
                for name, tensor in others
                if identity(tensor) in identities or any(_is_copy(tensor, one) for one in comparable)
            }
        return tuple(meta for meta, _ in self._checked(weights, partial=partial))


def _instead(gathered_parts: Iterator[Named], saved: list[Named]) -> Iterator[Named]:
    """Yield ``saved``, after the other ranks were met in the gathering of what it was made of."""
    for _ in gathered_parts:
        pass
    yield from saved


def _cast(meta: TensorMeta, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in the dtype in which it is sent."""
    return tensor if _name(tensor.dtype) == meta.dtype else tensor.to(getattr(torch, meta.dtype))


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_copy(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two full tensors are equal. Of sharded ones, this rank has a part only."""
    if is_sharded(tensor) or is_sharded(other):
        return False
    alike = (tensor.shape, tensor.dtype, tensor.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(tensor, other)


def warn_unchecked(reason: str) -> None:
    """Warn that names and shapes are not checked before the tensors are sent."""
    warnings.warn(f"names and shapes cannot be checked before they are sent: {reason}", RuntimeWarning, stacklevel=3)


def persistent_storages(source: object) -> frozenset[int]:
    """Return the addresses of the storages of a module, mapping or list. An iterator's tensors may be freed, so it has none."""
    if isinstance(source, torch.nn.Module):
        source = source.state_dict()
    tensors = (
        source.values()
        if isinstance(source, Mapping)
        else [one for _, one in source]
        if isinstance(source, (list, ItemsView))
        else ()
    )
    return frozenset(
        one.untyped_storage().data_ptr()
        for one in tensors
        if isinstance(one, torch.Tensor) and one.layout == torch.strided and not hasattr(one, "to_local")
    )
