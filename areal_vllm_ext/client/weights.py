"""The weights that a trainer sends: full tensors under checkpoint names, checked before any bytes move."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from ..errors import InvalidWeights
from ..integrity import checkpoint
from ..protocol import TensorMeta

Named = tuple[str, torch.Tensor]
WeightSource = torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[Named]
# The dtype to send in: one for all floating-point tensors, or "auto" for that of each tensor in the engines' checkpoint.
Cast = torch.dtype | Literal["auto"]

# A dtype is wider than another if it holds every value of it. Neither of float16 and bfloat16 does.
_WIDTHS = {"float64": 3, "float32": 2, "bfloat16": 1, "float16": 1}
# What modules keep beside their tensors (``torch.nn.Module.get_extra_state``); no part of a checkpoint.
_EXTRA_STATE = "_extra_state"
# A model has few tied weights. With more unknown names than this, they are not compared by value, which takes time.
_MOST_COPIES = 8
# Prefixes that wrappers of modules put into the names of tensors.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\."
)


def named_weights(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint tensors of a module, a state dict or an iterable, one at a time.

    A Hugging Face model's tensors get the names under which the model saves them. For example, transformers 5 holds the
    experts of an MoE fused, and saves them one by one. A ``DTensor`` is gathered, which is a collective: in a sharded trainer
    every rank must walk through this iterator at the same time. ``EngineGroup.update(process_group=...)`` does that.
    """
    return gathered(named_parts(source))


def named_parts(source: WeightSource) -> Iterable[Named]:
    """Return the checkpoint tensors as this rank holds them: a ``DTensor`` is not gathered."""
    if isinstance(source, torch.nn.Module):
        module = source.module if isinstance(source, torch.nn.parallel.DistributedDataParallel) else source
        state = {name: one for name, one in module.state_dict().items() if not name.endswith(_EXTRA_STATE)}
        source = checkpoint_format(module, state)
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
    if not isinstance(value, torch.Tensor):
        return f"is {_kind(value)}, not a tensor: leave it out, or give torch.as_tensor(...) of it"
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


def is_sharded(part: Any) -> bool:
    """Return whether gathering the full tensor is a collective."""
    return hasattr(part, "full_tensor")


def gathered(parts: Iterable[Named]) -> Iterator[Named]:
    """Yield full tensors, one at a time."""
    part: Any
    for name, part in parts:
        full: torch.Tensor = part.full_tensor() if is_sharded(part) else part
        yield name, full.detach() if full.requires_grad else full


def checkpoint_format(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``state`` under the names that ``save_pretrained`` writes; unchanged unless the module is Hugging Face's."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return state
    if not isinstance(module, PreTrainedModel):
        return state
    converted: dict[str, torch.Tensor] = revert_weight_conversion(module, without_ties(module, state))
    return converted


def without_ties(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``state`` without the second names of tied weights, as ``save_pretrained`` does. Broken ties stay."""
    ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    return {
        name: tensor
        for name, tensor in state.items()
        if not ((source := state.get(ties.get(name, ""))) is not None and _identity(source) == _identity(tensor))
    }


class Checker:
    """Checks the tensors to send by name, shape and dtype."""

    def __init__(self, expected: Iterable[TensorMeta], engine_dtype: str, dtype: str | torch.dtype | None) -> None:
        """
        Args:
            expected: the engines' checkpoint; empty if it is unknown, then nothing can be checked.
            engine_dtype: the dtype in which the engines compute, allowed in addition to the checkpoint's own.
            dtype: dtype to send in, see ``AsyncUpdate.send``.
        """
        self._expected = {tensor.name: tensor for tensor in expected}
        self._dtypes = (engine_dtype,)
        self._cast = checked_cast(dtype)
        self._tied: set[str] = set()

    def check(self, weights: Iterable[Named], *, partial: bool = False) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """Yield the tensors to send.

        Args:
            weights: the tensors.
            partial: whether other ranks send the rest.

        Raises:
            InvalidWeights: the engines could not load a tensor; or, at the end, one is missing.
        """
        for meta, tensor in self._checked(weights, partial=partial):
            yield meta, _cast(meta, tensor)

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
                raise InvalidWeights(problem + self._hint(meta))
            sent.add(name)
            yield meta, tensor
        if not partial:
            self.check_complete(sent)

    def _hint(self, meta: TensorMeta) -> str:
        """Return what to do about a name that the engines' checkpoint lacks; empty for other names."""
        name = meta.name
        if name in self._expected:
            return ""
        bare = _WRAPPERS.sub("", name)
        if bare in self._expected:
            return (
                f"; a wrapper has renamed {bare}: give the model inside it, or names without {name.replace(bare, '')!r}"
            )
        if longer := [known for known in self._expected if known.endswith(f".{name}")]:
            return f"; the checkpoint calls it {longer[0]}: add the prefix to all names"
        if shorter := [known for known in self._expected if name.endswith(f".{known}")]:
            return f"; the checkpoint calls it {shorter[0]}: remove the prefix from all names"
        like = [known.name for known in self._expected.values() if known.shape == meta.shape]
        return f"; if it is tied to {like[0]}, leave it out" if len(like) == 1 else ""

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
            raise InvalidWeights(problem)

    def check_source(
        self, source: WeightSource, gather: Callable[[Iterable[Named]], Iterator[Named]] = gathered
    ) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """Check all of ``source``, and yield the tensors that ``gather`` makes full.

        A module, a mapping or a list is checked before this returns; an iterator while it is walked.
        """
        parts = named_parts(source)
        if isinstance(source, (torch.nn.Module, Mapping, list, tuple)):
            parts = list(parts)
            checked = {meta.name: meta for meta in self.check_ahead(parts)}
            # ``checked`` lacks the second names of tied weights.
            return ((checked[name], _cast(checked[name], tensor)) for name, tensor in gather(parts) if name in checked)
        return self.check(gather(parts))

    def check_ahead(self, weights: Sequence[Named], *, partial: bool = False) -> tuple[TensorMeta, ...]:
        """Check names, shapes and dtypes of all of ``weights`` before any engine is asked to begin.

        Second names of tied weights, which checkpoints leave out, are found here, where all tensors are alive: they share the
        memory of a tensor that the checkpoint has, or are a copy of it. In an iterable, two tensors can have one address,
        because the first was freed.

        Args:
            weights: the tensors.
            partial: whether other ranks send the rest.

        Returns:
            the tensors to send.
        """
        self._tied = set()
        if others := [(name, tensor) for name, tensor in weights if name not in self._expected]:
            known = [tensor for name, tensor in weights if name in self._expected]
            comparable = known if len(others) <= _MOST_COPIES else []
            identities = {_identity(tensor) for tensor in known}
            self._tied = {
                name
                for name, tensor in others
                if _identity(tensor) in identities or any(_is_copy(tensor, one) for one in comparable)
            }
        return tuple(meta for meta, _ in self._checked(weights, partial=partial))


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


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if hasattr(tensor, "to_local"):  # a DTensor: compare this rank's shards, because gathering would be a collective
        tensor = tensor.to_local()
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


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
        if isinstance(source, list)
        else ()
    )
    return frozenset(
        one.untyped_storage().data_ptr()
        for one in tensors
        if isinstance(one, torch.Tensor) and one.layout == torch.strided and not hasattr(one, "to_local")
    )
