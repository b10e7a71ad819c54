"""What a trainer sends: checkpoint names and full tensors, checked against the engines' checkpoint before anything moves."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import InvalidWeights
from ..integrity import checkpoint
from ..protocol import TensorMeta

Named = tuple[str, torch.Tensor]
WeightSource = torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[Named]


def named_weights(source: WeightSource) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint tensors of a module, a state dict or an iterable, one at a time.

    A Hugging Face model's tensors get the names under which it saves them (transformers 5 holds the experts of an MoE
    fused, and saves them one by one). A ``DTensor`` is gathered, which is a collective: in a sharded trainer every rank
    walks through this iterator at the same time (``EngineGroup.update(process_group=...)`` does that).
    """
    return gathered(named_parts(source))


def named_parts(source: WeightSource) -> Iterable[Named]:
    """The same, as this rank has them: a ``DTensor`` is not gathered yet."""
    if isinstance(source, torch.nn.Module):
        module = source.module if isinstance(source, torch.nn.parallel.DistributedDataParallel) else source
        source = checkpoint_format(module, dict(module.state_dict()))
    return source.items() if isinstance(source, Mapping) else source


def is_sharded(part: Any) -> bool:
    """Whether making it full is a collective."""
    return hasattr(part, "full_tensor")


def gathered(parts: Iterable[Named]) -> Iterator[Named]:
    """Full tensors, one at a time."""
    part: Any
    for name, part in parts:
        full: torch.Tensor = part.full_tensor() if is_sharded(part) else part
        yield name, full.detach() if full.requires_grad else full


def checkpoint_format(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` under the names that ``save_pretrained`` would write; unchanged for other modules than Hugging Face's."""
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
    """``state`` without the second names of tied weights, as ``save_pretrained`` leaves them out. A broken tie stays."""
    ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    return {
        name: tensor
        for name, tensor in state.items()
        if not ((source := state.get(ties.get(name, ""))) is not None and _identity(source) == _identity(tensor))
    }


class Checker:
    """Checks tensors on their way, by name, shape, dtype and value."""

    def __init__(self, expected: Iterable[TensorMeta], engine_dtype: str, cast: str | None) -> None:
        """
        Args:
            expected: the engines' checkpoint; empty where it cannot be told, then only values are checked.
            engine_dtype: the dtype in which the engines compute, welcome beside the checkpoint's own.
            cast: dtype to cast floating-point tensors to, if any.
        """
        self._expected = {tensor.name: tensor for tensor in expected}
        self._dtypes = (engine_dtype,)
        self._cast: torch.dtype | None = getattr(torch, cast) if cast else None
        self._tied: set[str] = set()

    def check(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, part: bool = False
    ) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """Yield what is to be sent.

        Args:
            weights: the tensors.
            part: whether others have the rest.

        Raises:
            InvalidWeights: for a tensor that the engines could not load, and at the end for one that is missing.
        """
        for meta, tensor in self._checked(weights, part=part):
            yield meta, _as(meta, tensor)

    def _checked(self, weights: Iterable[Named], *, part: bool = False) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """What is to be sent, not cast yet. No tensor is computed with, so that a ``DTensor`` costs no collective."""
        sent: set[str] = set()
        for name, tensor in weights:
            if name in self._tied:
                continue
            if name in sent:
                raise InvalidWeights(f"{name} is there twice")
            dtype = self._cast if self._cast is not None and tensor.is_floating_point() else tensor.dtype
            meta = TensorMeta(name, _name(dtype), tuple(tensor.shape))
            asked = self._expected and self._expected.get(name) != meta  # of few: most are as they are expected
            if asked and (problem := checkpoint.mismatch_reason(meta, self._expected, self._dtypes)):
                hint = "" if name in self._expected else "; if it is tied to one that is, leave it out of an iterable"
                raise InvalidWeights(problem + hint)
            sent.add(name)
            yield meta, tensor
        if not part:
            self.check_whole(sent)

    def check_whole(self, names: Collection[str]) -> None:
        """Raises InvalidWeights where ``names`` are not all that the engines need."""
        if not names:
            raise InvalidWeights("there was no tensor to send")
        if self._expected and (problem := checkpoint.missing_reason(names, self._expected)):
            raise InvalidWeights(problem)

    def check_source(
        self, source: WeightSource, gather: Callable[[Iterable[Named]], Iterator[Named]] = gathered
    ) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        """``check`` all of ``source``, as ``gather`` makes it full; what is there at once is checked ahead."""
        parts = named_parts(source)
        if isinstance(source, (torch.nn.Module, Mapping, list, tuple)):
            parts = list(parts)
            checked = {meta.name: meta for meta in self.check_ahead(parts)}
            # Second names of tied weights are not among them.
            return ((checked[name], _as(checked[name], tensor)) for name, tensor in gather(parts) if name in checked)
        return self.check(gather(parts))

    def check_ahead(self, weights: Sequence[tuple[str, torch.Tensor]], *, part: bool = False) -> tuple[TensorMeta, ...]:
        """Check names, shapes and dtypes of all of ``weights`` now, so that an error comes before any engine hears of it.

        ``part`` as in ``check``. Returns what is to be sent.

        Second names of tied weights, which checkpoints leave out, are found here, where all tensors are alive: memory that
        an iterable has freed, or used again, would look tied.
        """
        self._tied = set()
        if others := [(name, tensor) for name, tensor in weights if name not in self._expected]:
            identities = {_identity(tensor) for name, tensor in weights if name in self._expected}
            self._tied = {name for name, tensor in others if _identity(tensor) in identities}
        return tuple(meta for meta, _ in self._checked(weights, part=part))


def _as(meta: TensorMeta, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the dtype in which it is sent."""
    return tensor if _name(tensor.dtype) == meta.dtype else tensor.to(getattr(torch, meta.dtype))


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    if hasattr(tensor, "to_local"):  # a DTensor: ties are seen in its own part, before it is gathered
        tensor = tensor.to_local()
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def warn_unchecked(reason: str) -> None:
    """Say that names and shapes are not checked ahead."""
    warnings.warn(f"names and shapes cannot be checked before they are sent: {reason}", RuntimeWarning, stacklevel=3)


def storages(source: object) -> frozenset[int]:
    """Where the storages of a module's, a dict's or a list's tensors begin; a generator's tensors may not last."""
    if isinstance(source, torch.nn.Module):
        source = source.state_dict()
    tensors = (
        source.values()
        if isinstance(source, Mapping)
        else [one for _, one in source]
        if isinstance(source, list)
        else ()
    )
    return frozenset(one.untyped_storage().data_ptr() for one in tensors if not hasattr(one, "to_local"))
