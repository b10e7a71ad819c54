"""The drafter of an engine that speculates (EAGLE, MTP, a draft model): a second model, which is loaded as the base model is.

vLLM lets a drafter share modules with the base model: the embedding, the head. These move with the base weights. All else is
the drafter's own, and its names begin with ``draft.`` where they stand beside the base model's.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ...integrity.checkpoint import DRAFT
from .apart import loading_of

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("vllm.areal_vllm_ext")

PREFIX = DRAFT
NAME = PREFIX.removesuffix(".")


class DrafterWorker:
    """vLLM's worker, as the loading of its drafter sees it: this drafter is its model.

    Attributes:
        rank, device, model_runner: of the worker.
        vllm_config: with which vLLM built the drafter.
        model_config: of the drafter.
        shared: paths of the modules that are the base model's.
        in_base_checkpoint: whether the drafter's tensors are in the base model's checkpoint (MTP).
    """

    def __init__(self, worker: Any, model: torch.nn.Module) -> None:
        """
        Args:
            worker: vLLM's worker.
            model: its drafter.
        """
        speculative = worker.vllm_config.speculative_config
        config = _config_of(worker)
        self.model_config = speculative.draft_model_config
        # vLLM's own prefix: layers register by name, and a draft model can have the base model's.
        prefix = "draft_model" if speculative.method == "draft_model" else ""
        self.vllm_config = loading_of(config, self.model_config, prefix)
        self.rank, self.device, self.model_runner = worker.rank, worker.device, worker.model_runner
        self.shared = tuple(shared_paths(model, worker.get_model()))
        base = worker.vllm_config.model_config
        self.in_base_checkpoint: bool = (self.model_config.model, self.model_config.revision) == (
            base.model,
            base.revision,
        )
        self._model = model

    @classmethod
    def of(cls, worker: Any) -> DrafterWorker | None:
        """Return the worker's drafter; None if it has none that is a model, or one that cannot be loaded."""
        try:
            model = drafter_of(worker)
            return cls(worker, model) if model is not None else None
        except Exception:
            logger.warning("areal_vllm_ext: this engine's drafter cannot be updated", exc_info=True)
            return None

    def get_model(self) -> torch.nn.Module:
        """Return the live drafter."""
        return self._model

    def is_own(self, name: str) -> bool:
        """Return whether a tensor of this name (without ``draft.``) is the drafter's own, not the base model's."""
        return not name.startswith(tuple(f"{path}." for path in self.shared))

    def take_shared_off(self, model: torch.nn.Module) -> None:
        """Take off a second drafter what the live one shares: it was not loaded, and must not be processed."""
        for path in self.shared:
            owner, name = _owner(model, path)
            if owner is not None:
                owner._modules.pop(name, None)  # noqa: SLF001 - a ModuleList deletes by number only

    def put_shared_on(self, model: torch.nn.Module) -> None:
        """Have a second drafter share with the base model what the live one shares."""
        for path in self.shared:
            owner, name = _owner(model, path)
            if owner is not None:
                owner._modules[name] = self._model.get_submodule(path)  # noqa: SLF001


def _config_of(worker: Any) -> Any:
    """Return vLLM's configuration with which it has built the drafter. Its two model runners make that in different ways."""
    runner = worker.model_runner
    proposer = runner.speculator if hasattr(runner, "speculator") else runner.drafter
    if getattr(proposer, "parallel_drafting_hidden_state_tensor", None) is not None:
        raise RuntimeError(
            "vLLM keeps a tensor that it has made of this drafter's weights at its start (parallel drafting)"
        )
    make_config = getattr(proposer, "_create_draft_vllm_config", None)
    if make_config is not None:
        return make_config()
    # The model runner V2, which GPUs have by default: of a draft model, and of EAGLE and MTP.
    if (made := getattr(proposer, "_draft_vllm_config", None)) is not None:
        return made
    return worker.vllm_config.speculative_config.apply_draft_overrides(worker.vllm_config)


def drafter_of(worker: Any) -> torch.nn.Module | None:
    """Return the model with which vLLM's worker drafts; None if it has none (n-grams, no speculation)."""
    if getattr(worker.vllm_config, "speculative_config", None) is None:
        return None
    if worker.vllm_config.speculative_config.draft_model_config is None:
        return None
    get_model = getattr(worker, "get_draft_model", None)
    model = get_model() if get_model else getattr(getattr(worker.model_runner, "drafter", None), "model", None)
    return model if isinstance(model, torch.nn.Module) else None


def shared_paths(model: torch.nn.Module, base: torch.nn.Module) -> Iterator[str]:
    """Yield the paths of the modules of a drafter that are the base model's, without those inside of them."""
    own = set(map(id, base.modules()))
    outer = ""
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in own and next(module.parameters(), None) is not None and not (outer and path.startswith(outer)):
            outer = f"{path}."
            yield path


def _owner(model: torch.nn.Module, path: str) -> tuple[torch.nn.Module | None, str]:
    owner, _, name = path.rpartition(".")
    try:
        return model.get_submodule(owner), name
    except AttributeError:
        return None, name


class OwnPart:
    """A drafter without memory, seen without what it shares: what a checkpoint holds of that is ignored."""

    def __init__(self, model: Any, worker: DrafterWorker) -> None:
        self._model, self._worker = model, worker
        self.load_weights, self.named_children = model.load_weights, model.named_children

    def named_parameters(self, **options: bool) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, one) for name, one in self._model.named_parameters(**options) if self._worker.is_own(name))

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, one) for name, one in self._model.named_buffers() if self._worker.is_own(name))


class _Together(torch.nn.Module):
    """A model and its drafter as one. The model's tensors keep their names."""

    def __init__(self, base: torch.nn.Module, drafter: torch.nn.Module) -> None:
        super().__init__()
        self._modules.update({"": base, NAME: drafter})


def together(base: torch.nn.Module, drafter: DrafterWorker | None) -> torch.nn.Module:
    """Return all that an engine computes with as one module, to be read."""
    return base if drafter is None else _Together(base, drafter.get_model())


def prefixed(path: str) -> str:
    """Return the path that an attribute of a drafter has beside the base model's."""
    return NAME + path if path.startswith(".") else PREFIX + path


def is_prefixed(path: str) -> bool:
    """Return whether a name or path is the drafter's."""
    return path.startswith(PREFIX)


def unprefixed(path: str) -> str:
    """Return the path that an attribute has in its drafter."""
    inner = path.removeprefix(PREFIX)
    return inner if "." in inner else f".{inner}"
