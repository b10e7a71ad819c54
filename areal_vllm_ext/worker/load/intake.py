"""What a model takes: which tensors of a checkpoint, under which names, and which of them it ignores.

The tensors in a checkpoint's files are not that. Files hold layers for drafters, second names of tied weights and buffers that
a model computes, and names can lack a prefix. So the model's own loaders load the files' names once, into a model without
memory. Where there are no files that can be read (``--load-format dummy``), the names are those that transformers saves for
the model's configuration.

A rank of a deployment needs a part of what its engine takes: its experts, its layers. A tensor is ignored by the engine only
if every rank ignores it, so ranks are asked one by one, and each requires what it needs itself.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec

from ...errors import NotACheckpoint
from ...integrity import checkpoint, hugging_face
from ...protocol import TensorMeta, Weights
from .provenance import Place, Places, places_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from .dry_load import DryModel

logger = logging.getLogger("vllm.areal_vllm_ext")


class Intake:
    """What one worker's model takes.

    Attributes:
        weights: what the worker tells its engine.
        known: the tensors that the engine takes or ignores, by name; empty if they are not known.
        required: the names that this worker needs.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.known = {tensor.name: tensor for tensor in weights.tensors}
        self.required = {name: meta for name, meta in self.known.items() if name not in weights.optional}

    @classmethod
    def of(cls, model: tuple[str, str | None], config: Any, dry: DryModel | None) -> Intake:
        """Find out what a model takes.

        Args:
            model: path or hub name of the checkpoint that it was started from, and the revision.
            config: vLLM's configuration of it.
            dry: the model without memory; None if there is none: then all tensors of the files are required.
        """
        started = time.monotonic()
        files, problem = _files(model)
        modules = dry.modules if dry is not None else ()
        intake = None
        if files:
            intake = _learned(modules, files)
            if intake is None:
                intake = cls(Weights(tensors=tuple(files)))
        elif named := _of_configuration(config, modules):
            intake = _learned(modules, named, complete=True)
        if intake is None:
            return cls(Weights(tensors=(), error=problem))
        description = hugging_face.described(getattr(config, "hf_config", None))
        intake.weights = msgspec.structs.replace(intake.weights, config=description)
        logger.info(
            "areal_vllm_ext: the model takes %d tensors and ignores %d of its checkpoint; learned in %.0f ms",
            len(intake.required),
            len(intake.known) - len(intake.required),
            (time.monotonic() - started) * 1e3,
        )
        return intake

    def find(self, name: str) -> str:
        """Return the engine's name for ``name``, which can lack a prefix or have one more."""
        return checkpoint.known_name(name, self.known, self.weights.prefixes)

    def ignores(self, name: str) -> bool:
        """Return whether the engine knows no tensor of this name and needs none: a second name, or a computed buffer."""
        return name not in self.known and (name in self.weights.ties or name.endswith(checkpoint.COMPUTED))

    def broken_tie(self, digests: Mapping[str, int]) -> str | None:
        """Return which two names of one tensor of the model have different values; None if there are none."""
        return checkpoint.broken_tie_reason(self.weights.ties, digests)


def _files(model: tuple[str, str | None]) -> tuple[list[TensorMeta], str]:
    """Return the tensors of a checkpoint's files; none with the reason if they cannot be read."""
    try:
        return checkpoint.describe(*model), ""
    except NotACheckpoint as error:
        return [], str(error)
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"


def _of_configuration(config: Any, modules: Iterable[Any]) -> list[TensorMeta]:
    """Return the tensors that transformers saves for a model of this configuration; none if it has no such model.

    Their dtypes are those of the parameters that they are loaded to.
    """
    try:
        if (model := hugging_face.without_memory(config.hf_config)) is None:
            return []
        state = hugging_face.checkpoint_format(model, model.state_dict(keep_vars=True))
    except Exception:
        logger.info("areal_vllm_ext: transformers cannot name the weights of this model", exc_info=True)
        return []
    default = str(config.dtype).removeprefix("torch.")
    metas = [TensorMeta(name, default, tuple(tensor.shape)) for name, tensor in state.items()]
    try:
        places, parameters = _places(modules, metas), _parameters(modules)
    except Exception:
        logger.info("areal_vllm_ext: the model does not take the names of transformers", exc_info=True)
        return []
    dtypes = {
        name: parameters[place.target].dtype
        for name, found in places.items()
        for place in found
        if place.target in parameters
    }
    return [
        meta if (dtype := dtypes.get(meta.name)) is None or not dtype.is_floating_point else _in_dtype(meta, dtype)
        for meta in metas
    ]


def _in_dtype(meta: TensorMeta, dtype: torch.dtype) -> TensorMeta:
    return TensorMeta(meta.name, str(dtype).removeprefix("torch."), meta.shape)


def _learned(modules: Iterable[Any], metas: list[TensorMeta], *, complete: bool = False) -> Intake | None:
    """Return which of ``metas`` the models take; None if their loaders cannot be asked.

    Args:
        modules: the models without memory; a drafter that is loaded from the same checkpoint is one of them.
        metas: tensors in checkpoint format.
        complete: whether every parameter must be written, so that ``metas`` is known to be all that the models take.
    """
    modules = list(modules)
    if not modules:
        return None
    try:
        places = _places(modules, metas)
    except Exception as error:
        logger.warning("areal_vllm_ext: the model's loaders do not tell what they take (%s)", error, exc_info=True)
        return None
    parameters = _parameters(modules)
    written = {place.target for found in places.values() for place in found}
    if complete and (missing := [name for name, one in parameters.items() if one.numel() > 1 and name not in written]):
        logger.info("areal_vllm_ext: transformers has no names for %s", missing[:3])
        return None
    ties = _second_names(metas, places, parameters)
    return Intake(
        Weights(
            tensors=tuple(metas),
            optional=tuple(name for name, found in places.items() if not found or name in ties),
            ties=ties | _ignored_second_names(modules, places),
            prefixes=_prefixes(modules, metas, places),
        )
    )


def _places(modules: Iterable[Any], metas: list[TensorMeta]) -> Places:
    """Return where the models write each tensor; the places of a model after the first have its number."""
    together: dict[str, set[Place]] = {meta.name: set() for meta in metas}
    for number, module in enumerate(modules):
        for name, found in places_of(module, metas).items():
            together[name] |= {place._replace(target=_target(number, place.target)) for place in found}
    return {name: frozenset(found) for name, found in together.items()}


def _parameters(modules: Iterable[Any]) -> dict[str, torch.Tensor]:
    return {
        _target(number, name): tensor
        for number, module in enumerate(modules)
        for name, tensor in module.named_parameters()
    }


def _target(number: int, name: str) -> str:
    return f"{number}:{name}" if number else name


def _second_names(metas: list[TensorMeta], places: Places, parameters: Mapping[str, object]) -> dict[str, str]:
    """Return, by its second name, the first name of each tensor that is loaded to the same places under both."""
    groups: dict[tuple[frozenset[Place], tuple[int, ...]], list[str]] = {}
    for meta in metas:
        if places[meta.name]:
            groups.setdefault((places[meta.name], meta.shape), []).append(meta.name)
    ties: dict[str, str] = {}
    for together in groups.values():
        first = next((name for name in together if name in parameters), together[0])
        ties |= {name: first for name in together if name != first}
    return ties


def _ignored_second_names(modules: Iterable[Any], places: Places) -> dict[str, str]:
    """Return the second names of the model's tied parameters that are not loaded, with the tensor of the first name."""
    writers: dict[str, list[str]] = {}
    for name, found in places.items():
        for place in found:
            writers.setdefault(place.target, []).append(name)
    ties: dict[str, str] = {}
    for number, module in enumerate(modules):
        first = {id(tensor): name for name, tensor in module.named_parameters()}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            target = _target(number, first[id(tensor)])
            if name != first[id(tensor)] and not places.get(name) and len(writers.get(target, ())) == 1:
                ties[name] = writers[target][0]
    return ties


def _renamed(name: str, prefix: str, children: list[str]) -> str:
    """Return ``name`` without the prefix, or with it where it begins with none of the model's ``children``."""
    if name.startswith(prefix):
        return name.removeprefix(prefix)
    return name if name.partition(".")[0] in children else prefix + name


def _prefixes(modules: list[Any], metas: list[TensorMeta], places: Places) -> tuple[str, ...]:
    """Return the prefixes with and without which a name means the same tensor: hub names of GPT-2 and OPT lack them."""
    found: list[str] = []
    children = [name for name, child in modules[0].named_children() if next(child.parameters(), None) is not None]
    for prefix in (f"{child}." for child in children):
        other = {meta.name: _renamed(meta.name, prefix, children) for meta in metas}
        renamed = [TensorMeta(other[meta.name], meta.dtype, meta.shape) for meta in metas]
        probe = next((name for name in other if other[name] != name and places[name]), None)
        if probe is None:
            continue
        try:
            # One name first, because most prefixes are none, and loading all names takes long.
            alone = [meta for meta in renamed if meta.name == other[probe]]
            if _places(modules, alone)[other[probe]] != places[probe]:
                continue
            moved = _places(modules, renamed)
        except Exception:  # noqa: S112 - the loader does not know these names
            continue
        if all(moved[other[name]] == place for name, place in places.items()):
            found.append(prefix)
    return tuple(found)
