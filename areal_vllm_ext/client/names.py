"""``NameFinder``: which of the engines' tensors a trainer means by a name."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ..errors import InvalidWeights
from ..integrity import checkpoint, hugging_face

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from ..protocol import TensorMeta, Weights

logger = logging.getLogger("areal_vllm_ext")

# The head that PPO trainers put beside the model (trl's AutoModelForCausalLMWithValueHead).
VALUE_HEAD = "v_head"

# Parts of names that wrappers add wherever they are in a model. No model has modules of these names.
_INNER_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Parts that wrappers add: in front of a name, and (peft) where a layer has an adapter.
_OUTER_WRAPPERS = ("module.", "pretrained_model.", "base_model.model.")
_ADAPTED = re.compile(r"\.base_layer(?=\.)")
# Tensors of an adapter, which only its model can merge.
_ADAPTER = re.compile(r"\.(lora_|modules_to_save\.|original_module\.|ia3_|hada_|lokr_|vera_|oft_)")


class NameFinder:
    """Finds the engines' name for a trainer's."""

    def __init__(self, taken: Weights) -> None:
        """
        Args:
            taken: what the engines take; without tensors if it is not known.
        """
        self._known = {tensor.name: tensor for tensor in taken.tensors}
        self._ties, self._prefixes, self._config = taken.ties, taken.prefixes, taken.config

    def _is_known(self, name: str) -> bool:
        return name in self._known or name in self._ties

    def find(self, name: str) -> str | None:
        """Return the engines' name for ``name``; None if the tensor is no part of what engines serve.

        A name that nothing in the engines' model fits is returned as it is.

        Raises:
            InvalidWeights: it is a part of an adapter.
        """
        if self._is_known(name):
            return name
        for candidate in _candidates(name):
            found = checkpoint.known_name(candidate, self._known, self._prefixes)
            if self._is_known(found):
                return found
        if _ADAPTER.search(name):
            raise InvalidWeights(
                f"{name} is a part of an adapter: give send(...) the PeftModel itself, which is sent merged"
            )
        bare = without_wrappers(name)
        if bare.endswith(checkpoint.COMPUTED):
            return None
        if bare.removeprefix("module.").startswith(f"{VALUE_HEAD}."):
            say_left_out(VALUE_HEAD)
            return None
        return name if self._known else bare

    def all_known(self, parts: Iterable[tuple[str, object]]) -> bool:
        """Return whether the engines know all names, or the names of no tensor."""
        return not self._known or all((known := self.find(name)) is None or self._is_known(known) for name, _ in parts)

    def as_saved(self, parts: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Return ``parts``, which have the names of transformers' module of the engines' model, as this model saves them."""
        model = hugging_face.model_of(self._config) if self._config else None
        if model is None:
            return list(parts)
        own = {name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
        state = {next((one for one in _candidates(name) if one in own), name): tensor for name, tensor in parts}
        return list(hugging_face.checkpoint_format(model, state).items())

    def hint(self, meta: TensorMeta) -> str:
        """Return what to do about a tensor that the engines' model lacks; empty if its name is known."""
        name = meta.name
        if name in self._known:
            return ""
        if longer := [known for known in self._known if known.endswith(f".{name}")]:
            return f"; the checkpoint calls it {longer[0]}: add the prefix to all names"
        if shorter := [known for known in self._known if name.endswith(f".{known}")]:
            return f"; the checkpoint calls it {shorter[0]}: remove the prefix from all names"
        like = [known.name for known in self._known.values() if known.shape == meta.shape]
        return f"; if it is tied to {like[0]}, leave it out" if len(like) == 1 else ""


def _candidates(name: str) -> Iterator[str]:
    """Yield ``name`` without what wrappers add, less and less of it."""
    bare = without_wrappers(name)
    yield bare
    stripped = True
    while stripped:
        stripped = False
        for prefix in _OUTER_WRAPPERS:
            if bare.startswith(prefix):
                bare, stripped = bare.removeprefix(prefix), True
                yield bare
                yield _ADAPTED.sub("", bare)
    yield _ADAPTED.sub("", bare)


def without_wrappers(name: str) -> str:
    """Return ``name`` without the parts that wrappers inside of a model add."""
    return _INNER_WRAPPERS.sub("", name)


def say_left_out(name: str) -> None:
    """Log once that tensors of this name are no part of what engines serve."""
    if name not in _left_out:
        _left_out.add(name)
        logger.warning("%s of the trainer is not sent: the engines' model has no such tensors", name)


_left_out: set[str] = set()
