"""LoRA adapters as trainers give them, copied into host memory: from a PeftModel, from peft's tensors, or from a directory."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import InvalidWeights, NotACheckpoint
from ..integrity import digest
from ..integrity.safetensors_file import SafetensorsFile, read_file
from ..protocol import Adapter, TensorMeta, Units
from ..transport.buckets import contents_of
from .modules import Named, gathered
from .names import without_wrappers
from .zero3 import Gathering

_LONGEST_NAME = 256


class PeftConfig(Protocol):
    """peft's ``LoraConfig``, as far as it is used."""

    def to_dict(self) -> dict[str, Any]: ...


# A PeftModel, the directory that its ``save_pretrained`` wrote, or what ``get_peft_model_state_dict`` gives and its LoraConfig.
AdapterSource = (
    torch.nn.Module | str | os.PathLike[str] | tuple[Mapping[str, torch.Tensor], Mapping[str, Any] | PeftConfig]
)


@dataclasses.dataclass(frozen=True, eq=False)
class SentAdapter:
    """An adapter in host memory.

    Attributes:
        unit: names it.
        tensors: peft's tensors, which nothing writes to.
        entries: what each tensor is, with its digest.
    """

    unit: Adapter
    tensors: dict[str, torch.Tensor]
    entries: list[tuple[TensorMeta, int]]

    @property
    def pairs(self) -> Iterator[tuple[TensorMeta, torch.Tensor]]:
        return ((meta, self.tensors[meta.name]) for meta, _ in self.entries)

    @property
    def is_relayed(self) -> bool:
        """Whether its tensors go from a trainer to the workers without passing through this process."""
        return not self.entries


class AdapterChanges:
    """What one update does to the engines' adapters.

    Attributes:
        sent: the adapters that it brings, by name.
        removed: the names of those that it removes.
    """

    def __init__(self) -> None:
        self.sent: dict[str, SentAdapter] = {}
        self.removed: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.sent or self.removed)

    def add(self, name: str, adapter: SentAdapter) -> None:
        self._check(name)
        self.sent[name] = adapter

    def remove(self, name: str) -> None:
        self._check(checked_name(name))
        self.removed.add(name)

    def bring_to(self, newest: Mapping[str, str | None], known: Mapping[str, SentAdapter]) -> None:
        """Bring every engine to what the newest engines have, where engines differ and this update changes nothing.

        Args:
            newest: the manifest of each such adapter, None if they have none.
            known: the adapters that this group has sent before.

        Raises:
            InvalidWeights: this group has not sent such an adapter.
        """
        for name, manifest in newest.items():
            adapter = known.get(name)
            if name in self.sent or name in self.removed:
                continue
            if manifest is None:
                self.removed.add(name)
            elif adapter is not None and adapter.unit.manifest == manifest:
                self.sent[name] = adapter
            else:
                raise InvalidWeights(
                    f"not every engine has adapter {name}, because one was restarted or missed an update: send the adapter in "
                    "this update too, or remove it"
                )

    def _check(self, name: str) -> None:
        if name in self.sent or name in self.removed:
            raise InvalidWeights(f"adapter {name} is in this update already: send or remove it once")

    def units(self, *, weights: bool, draft: bool = False) -> Units:
        """Return what the update consists of; ``weights`` and ``draft``: whether it brings base weights, and a drafter."""
        return Units(weights, tuple(one.unit for one in self.sent.values()), tuple(sorted(self.removed)), draft)


def checked_name(name: object) -> str:
    """Return ``name`` if an adapter can be called so.

    Raises:
        InvalidWeights: it cannot.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise InvalidWeights(
            f"{name!r} names no adapter: give 1 to {_LONGEST_NAME} printable characters; requests give it as their model"
        )
    return name


def copied(
    name: str, source: AdapterSource, gather: Callable[[Iterable[Named]], Iterator[Named]] = gathered
) -> SentAdapter:
    """Return an adapter in host memory, as it is now. Gathering sharded tensors is a collective.

    Raises:
        InvalidWeights: it is no adapter, or has no values.
    """
    parts, config = adapter_parts(name, source)
    tensors: dict[str, torch.Tensor] = {}
    tensor: Any
    for key, tensor in gather(parts):
        dense = isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.layout == torch.strided
        if not dense or not tensor.numel():
            raise InvalidWeights(f"adapter {name}: {key} has no values that can be sent: give a dense tensor")
        tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensors[key]).all()):
            raise InvalidWeights(f"adapter {name}: {key} holds NaN or infinite values")
    if not tensors:
        raise InvalidWeights(f"adapter {name} has no tensors")
    entries = list(contents_of(tensors).values())
    return SentAdapter(Adapter(name, config, digest.adapter_manifest(config, entries)), tensors, entries)


def relayed(name: str, config: Mapping[str, Any], update: str) -> SentAdapter:
    """Return an adapter whose tensors a trainer without this package sends to the workers itself.

    Nobody announces digests of them. So its manifest is the id of its update, which no other version has, and the workers'
    votes are compared with each other.

    Raises:
        InvalidWeights: no adapter can be called so.
    """
    return SentAdapter(Adapter(checked_name(name), _encoded(name, config), f"update {update}"), {}, [])


def adapter_parts(name: str, source: AdapterSource) -> tuple[list[Named], str]:
    """Return an adapter's tensors as this rank holds them, and its configuration in JSON.

    Raises:
        InvalidWeights: it is no adapter.
    """
    checked_name(name)
    if isinstance(source, torch.nn.Module):
        return _of_model(name, source)
    if isinstance(source, (str, os.PathLike)):
        return _of_directory(name, Path(os.fspath(source)))
    given: Any = source
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Mapping):
        config = given[1].to_dict() if hasattr(given[1], "to_dict") else given[1]
        if isinstance(config, Mapping):
            return list(given[0].items()), _encoded(name, config)
    raise InvalidWeights(
        f"adapter {name} is {type(source).__name__}: give a PeftModel, the directory of one that was saved, or "
        "(get_peft_model_state_dict(model), LoraConfig)"
    )


def _of_model(name: str, model: Any) -> tuple[list[Named], str]:
    while not hasattr(model, "peft_config") and isinstance(inner := _wrapped(model), torch.nn.Module):
        model = inner
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise InvalidWeights(f"adapter {name}: this module has no adapter: give the PeftModel")
    from peft import get_peft_model_state_dict

    own = name if name in configs else model.active_adapter
    if not isinstance(own, str):
        raise InvalidWeights(f"adapter {name}: several adapters of the model are active: call model.set_adapter(...)")
    gathering = Gathering()
    state = {without_wrappers(key): tensor for key, tensor in model.state_dict(keep_vars=True).items()}
    own_state = get_peft_model_state_dict(model, state_dict=state, adapter_name=own, save_embedding_layers=False)
    parts = [(key, gathering.part(tensor)) for key, tensor in own_state.items()]
    return parts, _encoded(name, configs[own].to_dict())


def _wrapped(model: Any) -> Any:
    """Return the module inside a wrapper of ``torch.compile`` or DDP; None if it is no wrapper."""
    return getattr(model, "_orig_mod", None) or getattr(model, "module", None)


def _of_directory(name: str, path: Path) -> tuple[list[Named], str]:
    try:
        config = json.loads(read_file(path / "adapter_config.json"))
        with contextlib.closing(SafetensorsFile(path / "adapter_model.safetensors")) as file:
            return [(key, file.read(key)) for key in file.tensors], _encoded(name, config)
    except (OSError, ValueError, NotACheckpoint) as error:
        raise InvalidWeights(
            f"adapter {name} cannot be read from {path}: {error}; write it with save_pretrained(...), as safetensors"
        ) from None


def _encoded(name: str, config: Mapping[str, Any]) -> str:
    """Return a configuration as JSON, the same for equal ones."""

    def default(value: object) -> object:
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        return value.value if isinstance(value, enum.Enum) else str(value)

    try:
        return json.dumps(dict(config), default=default, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InvalidWeights(f"adapter {name}: its configuration cannot be written as JSON: {error}") from None
